// What the kernels of both losses do alike.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "logits.h"

namespace vlmfast::cuda {

// Whether (row, col), counted within the chunk, is a positive.
__device__ inline bool is_positive(const Logits& logits, int64_t row, int64_t col) {
  const int64_t i = logits.first_row + row, j = logits.first_col + col;
  return logits.row_codes ? logits.row_codes[i] == logits.col_codes[j] : i + logits.label_offset == j;
}

__device__ inline float warp_sum(float x) {
  for (int bits = kWarp / 2; bits; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int bits = kWarp / 2; bits; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// G into a chunk of float32, or of float16 away from its subnormals.
template <class Out>
__device__ Out stored_gradient(float g) {
  return from_float<Out>(std::is_same_v<Out, __half> ? g * kGradientScale : g);
}

// Blocks of 256 threads that sweep a chunk, a column of it per thread: so many that each multiprocessor has its fill twice.
// What a row and a column give does not depend on how rows are shared out.
constexpr int kSweepThreads = 256;
inline dim3 sweep_grid(const Logits& logits) {
  const int64_t across = ceil_div(logits.cols, kSweepThreads), wanted = 2 * (2048 / kSweepThreads) * multiprocessor_count();
  return dim3(unsigned(across), unsigned(std::clamp<int64_t>(ceil_div(wanted, across), 1, logits.rows)));
}

}  // namespace vlmfast::cuda
