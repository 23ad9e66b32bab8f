// The element-wise sweeps of info_nce over one tile of dot products, one set of functions per instruction set.
// Everything is in powers of two: scale is s * log2(e), and every shift is integer-valued.
#pragma once

#include <cstdint>

namespace vlmfast::cpu {

constexpr int64_t kMaxTileCols = 256;

struct InfoNceKernels {
  // tile[i, j] <- 2^(scale * tile[i, j] - shift), |shift| < 2^21; row_sum[i] += its row, col_sum[j] += its column (unless null).
  void (*exp_sums)(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift, double* row_sum,
                   double* col_sum);

  // For each row, and for each column unless col_sum is null: the running maximum of scale * tile, rounded to an integer,
  // and the running sum of 2^(scale * tile - maximum). The tile is left as it is.
  void (*online_sums)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float* row_max,
                      double* row_sum, float* col_max, double* col_sum);

  // tile holds what exp_sums left: tile[i, j] <- tile[i, j] * (row_factor[i] + col_factor[j]).
  void (*gradient_from_exp)(float* tile, int64_t stride, int64_t rows, int64_t cols, const float* row_factor,
                            const float* col_factor);

  // tile holds dot products, one shift serves all: tile[i, j] <- 2^(scale * tile[i, j] - shift) * (row_factor[i] + col_factor[j]).
  void (*gradient_from_dot)(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift,
                            const float* row_factor, const float* col_factor);

  // tile holds dot products, a shift per row and column:
  // tile[i, j] <- 2^(scale * tile[i, j] - row_shift[i]) * row_factor[i] + 2^(scale * tile[i, j] - col_shift[j]) * col_factor[j].
  void (*gradient_two_shifts)(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale,
                              const float* row_shift, const float* row_factor, const float* col_shift,
                              const float* col_factor);

  // sum of a[k] * b[k], in double across blocks.
  double (*dot)(const float* a, const float* b, int64_t count);

  // out[i, j] <- tile[i, j] as bfloat16, rounded to nearest even; 0 in columns cols to stride. out may be tile itself, with
  // out_stride at most 2 * stride.
  void (*round_to_bf16)(const float* tile, int64_t stride, int64_t rows, int64_t cols, uint16_t* out, int64_t out_stride);

  // out[j, i] <- tile[i, j].
  void (*transpose)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride);
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
