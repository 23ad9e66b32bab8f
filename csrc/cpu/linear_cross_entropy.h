// The sweeps of linear_cross_entropy over one tile of dot products, whose rows are words and whose columns are the rows of
// hidden; one set of functions per instruction set. z = tile + bias, x = z log2(e); shifts are integer-valued.
#pragma once

#include <cstdint>

namespace vlmfast::cpu {

struct LinearCrossEntropyKernels {
  // tile[i, j] <- z, with bias[i] unless bias is null; kept[i, j] <- z unless kept is null. For each column the running maximum of
  // x, rounded to an integer, and the running sum of 2^(x - maximum). Entries of -inf are in neither.
  void (*online_sums)(float* tile, int64_t stride, int64_t rows, int64_t cols, const float* bias, float* kept,
                      int64_t kept_stride, float* maximum, double* sum);

  // out[i, j] <- factor[j] * 2^(x - shift[j]) - offset[j]; out may be tile.
  void (*gradient)(const float* tile, int64_t stride, int64_t rows, int64_t cols, const float* bias, const float* shift,
                   const float* factor, const float* offset, float* out, int64_t out_stride);

  // sums[i] += the sum of row i.
  void (*row_sums)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* sums);
};

namespace baseline {
extern const LinearCrossEntropyKernels linear_cross_entropy;
}
namespace avx2 {
extern const LinearCrossEntropyKernels linear_cross_entropy;
}
namespace avx512 {
extern const LinearCrossEntropyKernels linear_cross_entropy;
}

}  // namespace vlmfast::cpu
