// Kernels that are wrong, each in its own way, and one that is right: what cuda_host.h must tell apart. See test_cuda_host.py.
#include "launch.cuh"

#include <cstdio>

using namespace vlmfast::cuda;

// The sum of 0 to 63 over shared memory, without the barrier that it needs.
template <bool barrier>
__global__ void neighbours(float* out) {
  VLMFAST_SHARED(float, values);
  values[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

__global__ void leaves_early(float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void half_a_warp(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

// A warp's product of two tiles, read before all lanes have written them unless it waits.
template <bool wait>
__global__ void product(float* out) {
  using namespace nvcuda::wmma;
  VLMFAST_SHARED(__half, tile);
  for (int e = 0; e < 8; ++e) tile[e * 32 + threadIdx.x] = from_float<__half>(float(e) - float(threadIdx.x % 4));
  if (wait) __syncwarp();
  fragment<matrix_a, 16, 16, 16, __half, row_major> a;
  fragment<matrix_b, 16, 16, 16, __half, col_major> b;
  fragment<accumulator, 16, 16, 16, float> sum;
  fill_fragment(sum, 0.0f);
  load_matrix_sync(a, tile, 16);
  load_matrix_sync(b, tile, 16);
  mma_sync(sum, a, b, sum);
  for (int e = 0; e < sum.num_elements; ++e) sum.x[e] *= 0.5f;
  store_matrix_sync(out, sum, 16, mem_row_major);
}

__global__ void beyond_its_memory(float* out) {
  VLMFAST_SHARED(float, values);
  values[threadIdx.x + 1] = 0.0f;
  out[threadIdx.x] = values[threadIdx.x];
}

// Prints the results of kernel argv[1], or what was found to be wrong with it.
int main(int, char** argv) {
  const std::string name = argv[1];
  alignas(128) float out[256] = {};
  try {
    if (name == "neighbours") launch(neighbours<true>, 1, 64, 256, nullptr, out);
    if (name == "race") launch(neighbours<false>, 1, 64, 256, nullptr, out);
    if (name == "leaves early") launch(leaves_early, 1, 64, 0, nullptr, out);
    if (name == "half a warp") launch(half_a_warp, 1, 32, 0, nullptr, out);
    if (name == "product") launch(product<true>, 1, 32, 512, nullptr, out);
    if (name == "product without waiting") launch(product<false>, 1, 32, 512, nullptr, out);
    if (name == "beyond its memory") launch(beyond_its_memory, 1, 64, 256, nullptr, out);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  for (float x : out) std::printf("%a ", x);
}
