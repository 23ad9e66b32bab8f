// The pairwise sigmoid loss and its gradient over chunks of logits.
#include "sigmoid_loss.h"

#include "logits.cuh"

namespace vlmfast::cuda {
namespace {

constexpr int kBlockRows = 32;  // that a block sweeps, one after the other: few enough for a thread to add in float32

__device__ double warp_sum(double x) {
  for (int bits = kWarp / 2; bits; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

template <class Out>
__global__ void __launch_bounds__(kSweepThreads)
    sigmoid_loss_kernel(Logits logits, const float* scale_, const float* bias_, double* sums, Out* out) {
  constexpr int warps = kSweepThreads / kWarp;
  VLMFAST_SHARED(double, of_warps);  // (3, warps)
  const int64_t col = int64_t(blockIdx.x) * kSweepThreads + threadIdx.x, row0 = int64_t(blockIdx.y) * kBlockRows;
  const int64_t last = row0 + kBlockRows < logits.rows ? row0 + kBlockRows : logits.rows;
  const float scale = *scale_, bias = *bias_;
  float total[3] = {};
  for (int64_t row = row0; col < logits.cols && row < last; ++row) {
    const float value = logits.dots[row * logits.stride + col];
    const float sign = is_positive(logits, row, col) ? -1.0f : 1.0f;
    const float t = sign * fmaf(value, scale, bias);
    const float e = expf(-fabsf(t));
    const float g = sign * (t < 0.0f ? e : 1.0f) / (1.0f + e);
    total[0] += fmaxf(t, 0.0f) + log1pf(e);
    total[1] += g * value;
    total[2] += g;
    if (out) out[row * logits.cols + col] = stored_gradient<Out>(g);
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int kind = 0; kind < 3; ++kind) {
    const double sum = warp_sum(double(total[kind]));
    if (lane == 0) of_warps[kind * warps + warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 3) return;
  double sum = 0.0;
  for (int w = 0; w < warps; ++w) sum += of_warps[threadIdx.x * warps + w];
  const int64_t blocks = int64_t(gridDim.x) * gridDim.y;
  sums[threadIdx.x * blocks + int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

dim3 grid(const Logits& logits) {
  return dim3(unsigned(ceil_div(logits.cols, kSweepThreads)), unsigned(ceil_div(logits.rows, kBlockRows)));
}

}  // namespace

int64_t sigmoid_loss_blocks(const Logits& logits) { return int64_t(grid(logits).x) * grid(logits).y; }

void sigmoid_loss_chunk(const Logits& logits, const float* scale, const float* bias, double* sums, void* out, Type out_type,
                        cudaStream_t stream) {
  constexpr size_t shared = 3 * (kSweepThreads / kWarp) * sizeof(double);
  if (out_type == Type::float16)
    launch(sigmoid_loss_kernel<__half>, grid(logits), kSweepThreads, shared, stream, logits, scale, bias, sums,
           static_cast<__half*>(out));
  else
    launch(sigmoid_loss_kernel<float>, grid(logits), kSweepThreads, shared, stream, logits, scale, bias, sums,
           static_cast<float*>(out));
}

}  // namespace vlmfast::cuda
