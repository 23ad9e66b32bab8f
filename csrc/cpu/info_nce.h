// The sweeps of info_nce over one tile of dot products, one set of functions per instruction set.
// Everything is in powers of two: scale is s * log2(e), and every shift is integer-valued.
#pragma once

#include "tile.h"

namespace vlmfast::cpu {

// Of one tile's rows, or of its columns: what turns 2^(logit - shift) into a weighted probability, and the share of a
// positive that is subtracted.
struct SoftmaxSide {
  const float *shift, *factor, *target;
};

struct InfoNceKernels {
  // out[i, j] <- 2^(scale * tile[i, j] - shift), |shift| < 2^21; row_sum[i] += its row, col_sum[j] += its column (unless
  // null). out may be tile.
  void (*exp_sums)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift,
                   double* row_sum, double* col_sum, float* out, int64_t out_stride);

  // For each row, and for each column unless col_sum is null: the running maximum of scale * tile, rounded to an integer,
  // and the running sum of 2^(scale * tile - maximum). Entries of -inf are in neither. The tile is left as it is.
  void (*online_sums)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float* row_max,
                      double* row_sum, float* col_max, double* col_sum);

  // kept holds what exp_sums left: out[i, j] <- kept[i, j] * (row.factor[i] + col.factor[j]).
  void (*gradient_from_exp)(const float* kept, int64_t stride, int64_t rows, int64_t cols, SoftmaxSide row,
                            SoftmaxSide col, float* out, int64_t out_stride);

  // tile holds dot products, one shift serves all: tile[i, j] <- 2^(scale * tile[i, j] - shift) * (row.factor[i] +
  // col.factor[j]).
  void (*gradient_from_dot)(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift,
                            SoftmaxSide row, SoftmaxSide col);

  // tile holds dot products, a shift per row and column: out[i, j] <- 2^(scale * tile[i, j] - row.shift[i]) *
  // row.factor[i] + 2^(scale * tile[i, j] - col.shift[j]) * col.factor[j], a term with factor 0 left out.
  void (*gradient_two_shifts)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale,
                              SoftmaxSide row, SoftmaxSide col, float* out, int64_t out_stride);

  // tile[i, j] -= row.target[i] + col.target[j] where row_ids[i] == col_ids[j].
  void (*subtract_matches)(float* tile, int64_t stride, int64_t rows, int64_t cols, const int32_t* row_ids,
                           const int32_t* col_ids, SoftmaxSide row, SoftmaxSide col);
};

namespace baseline {
extern const InfoNceKernels info_nce;
}
namespace avx2 {
extern const InfoNceKernels info_nce;
}
namespace avx512 {
extern const InfoNceKernels info_nce;
}

}  // namespace vlmfast::cpu
