// A gated branch added to its residual, and the gradients of branch and gate. Types are told at run time: the kernels wait for
// memory, and there would be 27 of each.
#include "gated_residual.h"

#include <cstring>
#include <initializer_list>

#include "launch.cuh"

namespace vlmfast::cuda {
namespace {

constexpr int kLanes = 32;      // threads along a row
constexpr int kLines = 8;       // rows of a block at a time
constexpr int kRowsOfAdd = 32;  // of a block in the forward
constexpr int kMaxRanges = 256;  // of rows, whose products are summed apart; not by device, so that results are the same
constexpr int kGateThreads = 256;

__device__ float decoded(unsigned bits, Type type) {
  if (type == Type::float32) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  const auto half_bits = static_cast<unsigned short>(bits);
  if (type == Type::float16) {
    __half x;
    memcpy(&x, &half_bits, sizeof x);
    return to_float(x);
  }
  __nv_bfloat16 x;
  memcpy(&x, &half_bits, sizeof x);
  return to_float(x);
}

// Rounded to nearest even.
__device__ unsigned encoded(float x, Type type) {
  if (type == Type::float32) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  unsigned short bits;
  if (type == Type::float16) {
    const __half half = from_float<__half>(x);
    memcpy(&bits, &half, sizeof bits);
  } else {
    const __nv_bfloat16 half = from_float<__nv_bfloat16>(x);
    memcpy(&bits, &half, sizeof bits);
  }
  return bits;
}

// The bits of kCount neighbours, each in a word of its own: a copy of the residual must not go by way of a conversion.
template <int kCount>
struct Bits {
  unsigned of[kCount];

  __device__ static Bits load(const Elements& from, int64_t at) {
    if constexpr (kCount == 4) {
      if (from.type == Type::float32) {
        const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const float*>(from.data) + at);
        return {{words.x, words.y, words.z, words.w}};
      }
      const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const unsigned short*>(from.data) + at);
      return {{pairs.x & 0xffff, pairs.x >> 16, pairs.y & 0xffff, pairs.y >> 16}};
    } else {
      if (from.type == Type::float32) return {{static_cast<const unsigned*>(from.data)[at]}};
      return {{static_cast<const unsigned short*>(from.data)[at]}};
    }
  }

  __device__ void store(void* to, Type type, int64_t at) const {
    if constexpr (kCount == 4) {
      if (type == Type::float32)
        *reinterpret_cast<uint4*>(static_cast<float*>(to) + at) = {of[0], of[1], of[2], of[3]};
      else
        *reinterpret_cast<uint2*>(static_cast<unsigned short*>(to) + at) = {of[0] | of[1] << 16, of[2] | of[3] << 16};
    } else {
      if (type == Type::float32)
        static_cast<unsigned*>(to)[at] = of[0];
      else
        static_cast<unsigned short*>(to)[at] = static_cast<unsigned short>(of[0]);
    }
  }
};

__device__ float factor_of(const GatedBranch& branch, int64_t channel) {
  const float gate = decoded(Bits<1>::load(branch.gate, branch.per_channel ? channel : 0).of[0], branch.gate.type);
  return branch.tanh ? tanhf(gate) : gate;
}

// The range of rows and the columns of a thread, with their factors.
template <int kCount>
struct Part {
  int64_t col, begin, end;
  bool inside;
  float factor[kCount];

  __device__ Part(const GatedBranch& branch, int64_t rows_of_block)
      : col((int64_t(blockIdx.y) * kLanes + threadIdx.x) * kCount),
        begin(blockIdx.x * rows_of_block),
        end(begin + rows_of_block < branch.rows ? begin + rows_of_block : branch.rows),
        inside(col < branch.dim) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) factor[c] = inside ? factor_of(branch, col + c) : 0.0f;
  }
};

template <int kCount>
__global__ void __launch_bounds__(kLanes * kLines) add_kernel(Elements residual, GatedBranch branch, void* out) {
  const Part<kCount> part(branch, kRowsOfAdd);
  if (!part.inside) return;
  for (int64_t row = part.begin + threadIdx.y; row < part.end; row += kLines) {
    const int64_t at = row * branch.dim + part.col;
    auto result = Bits<kCount>::load(residual, at);
    if (!branch.row_mask || branch.row_mask[row]) {
      const auto hidden = Bits<kCount>::load(branch.hidden, at);
#pragma unroll
      for (int c = 0; c < kCount; ++c)
        if (part.factor[c] != 0.0f) {
          const float added = part.factor[c] * decoded(hidden.of[c], branch.hidden.type);
          result.of[c] = encoded(decoded(result.of[c], residual.type) + added, residual.type);
        }
    }
    result.store(out, residual.type, at);
  }
}

template <int kCount>
__global__ void __launch_bounds__(kLanes * kLines)
    gradient_kernel(Elements grad, GatedBranch branch, int64_t rows_of_block, void* d_hidden, float* sums) {
  VLMFAST_SHARED(float, lines);  // (kLines, kLanes * kCount)
  constexpr int columns = kLanes * kCount;
  const Part<kCount> part(branch, rows_of_block);
  float sum[kCount] = {};
  for (int64_t row = part.begin + threadIdx.y; part.inside && row < part.end; row += kLines) {
    const int64_t at = row * branch.dim + part.col;
    const bool active = !branch.row_mask || branch.row_mask[row];
    const auto dy = Bits<kCount>::load(grad, at);
    if (d_hidden) {
      Bits<kCount> result;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const bool added = active && part.factor[c] != 0.0f;
        result.of[c] = encoded(added ? part.factor[c] * decoded(dy.of[c], grad.type) : 0.0f, branch.hidden.type);
      }
      result.store(d_hidden, branch.hidden.type, at);
    }
    if (sums && active) {
      const auto hidden = Bits<kCount>::load(branch.hidden, at);
#pragma unroll
      for (int c = 0; c < kCount; ++c)
        sum[c] = fmaf(decoded(dy.of[c], grad.type), decoded(hidden.of[c], branch.hidden.type), sum[c]);
    }
  }
  if (!sums) return;
#pragma unroll
  for (int c = 0; c < kCount; ++c) lines[threadIdx.y * columns + threadIdx.x * kCount + c] = sum[c];
  __syncthreads();
  if (threadIdx.y) return;
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    float of_column = 0.0f;
    for (int line = 0; line < kLines; ++line) of_column += lines[line * columns + threadIdx.x * kCount + c];
    if (branch.per_channel && part.inside) sums[blockIdx.x * branch.dim + part.col + c] = of_column;
    total += of_column;
  }
  if (branch.per_channel) return;
  constexpr int lanes = kLanes / kCount;  // of kLanes columns, whatever kCount is
  for (int bits = lanes / 2; bits; bits /= 2) total += __shfl_xor_sync(kAllLanes, total, bits);
  if (threadIdx.x % lanes == 0 && part.inside)
    sums[blockIdx.x * ((branch.dim + kLanes - 1) / kLanes) + part.col / kLanes] = total;
}

// A block sums for `channels` neighbouring channels, by kGateThreads / channels threads each.
__global__ void __launch_bounds__(kGateThreads)
    gate_kernel(GatedBranch branch, const float* sums, int64_t count, int channels, void* d_gate) {
  VLMFAST_SHARED(double, parts);  // (kGateThreads,)
  const int64_t width = branch.per_channel ? branch.dim : 1;
  const int64_t channel = int64_t(blockIdx.x) * channels + threadIdx.x % channels;
  double sum = 0.0;
  if (channel < width)
    for (int64_t i = threadIdx.x / channels; i < count; i += kGateThreads / channels) sum += sums[i * width + channel];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= unsigned(channels) || channel >= width) return;
  double total = 0.0;
  for (int i = threadIdx.x; i < kGateThreads; i += channels) total += parts[i];
  const double factor = factor_of(branch, channel);
  const float result = float(branch.tanh ? total * (1.0 - factor * factor) : total);
  Bits<1>{{encoded(result, branch.gate.type)}}.store(d_gate, branch.gate.type, channel);
}

// Whether rows begin where four neighbours can be loaded at once.
bool fours(const GatedBranch& branch, std::initializer_list<const void*> pointers) {
  bool aligned = branch.dim % 4 == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
  return aligned;
}

dim3 grid_of(const GatedBranch& branch, int64_t rows_of_block, int count) {
  return dim3(unsigned(ceil_div(branch.rows, rows_of_block)), unsigned(ceil_div(branch.dim, kLanes * count)));
}

int64_t rows_of_range(const GatedBranch& branch) { return ceil_div(ceil_div(branch.rows, kMaxRanges), kLines) * kLines; }

}  // namespace

void gated_residual_add(const Elements& residual, const GatedBranch& branch, void* out, cudaStream_t stream) {
  const dim3 block(kLanes, kLines);
  if (fours(branch, {residual.data, branch.hidden.data, out}))
    launch(add_kernel<4>, grid_of(branch, kRowsOfAdd, 4), block, 0, stream, residual, branch, out);
  else
    launch(add_kernel<1>, grid_of(branch, kRowsOfAdd, 1), block, 0, stream, residual, branch, out);
}

int64_t gated_residual_sums(const GatedBranch& branch) {
  const int64_t ranges = ceil_div(branch.rows, rows_of_range(branch));
  return branch.per_channel ? ranges : ranges * ceil_div(branch.dim, kLanes);
}

void gated_residual_gradient(const Elements& grad, const GatedBranch& branch, void* d_hidden, float* sums,
                             cudaStream_t stream) {
  const dim3 block(kLanes, kLines);
  const int64_t rows = rows_of_range(branch);
  const auto run = [&](auto kernel, int count) {
    launch(kernel, grid_of(branch, rows, count), block, kLines * kLanes * count * sizeof(float), stream, grad, branch, rows,
           d_hidden, sums);
  };
  if (fours(branch, {grad.data, branch.hidden.data, d_hidden}))
    run(gradient_kernel<4>, 4);
  else
    run(gradient_kernel<1>, 1);
}

void gated_residual_gate_gradient(const GatedBranch& branch, const float* sums, void* d_gate, cudaStream_t stream) {
  const int channels = branch.per_channel ? kLanes : 1;
  launch(gate_kernel, unsigned(ceil_div(branch.per_channel ? branch.dim : 1, channels)), kGateThreads,
         kGateThreads * sizeof(double), stream, branch, sums, gated_residual_sums(branch), channels, d_gate);
}

}  // namespace vlmfast::cuda
