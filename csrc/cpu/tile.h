// What every op does to a tile of float32: one set of functions per instruction set.
#pragma once

#include <cstdint>

namespace vlmfast::cpu {

// The most rows and columns of a tile.
constexpr int64_t kMaxTile = 256;

// The largest count of steps in an int16, with room for what rounding adds.
constexpr float kMostSteps = 32700.0f;

struct TileKernels {
  // sum of a[k] * b[k], in double across blocks.
  double (*dot)(const float* a, const float* b, int64_t count);

  // to[k] <- factor * from[k]; to may be from.
  void (*scale)(const float* from, int64_t count, float factor, float* to);

  // to[i, j] <- from[i, j]: bfloat16, or else float16, to float32 and back, rounded to nearest even.
  void (*widen)(const uint16_t* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, float* to,
                int64_t to_stride);
  void (*narrow)(const float* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, uint16_t* to,
                 int64_t to_stride);

  // out[j, i] <- tile[i, j].
  void (*transpose)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride);
  // out[2 * k], out[2 * k + 1] <- even[k], odd[k].
  void (*interleave)(const uint16_t* even, const uint16_t* odd, int64_t count, uint16_t* out);
  // out[i / 2, j], a pair of bfloat16 seen as one float, <- tile[i, j] and tile[i + 1, j], or 0 after the last row.
  void (*pair_rows)(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride);

  // out[i, j] <- from[i, j], bfloat16 or else float16, as int16 in steps of steps[i]: as fine as lets every row's 2-norm be at
  // most 46,000 steps, so that the product of two rows is an int32, and every entry at most kMostSteps. A row of zeros has step 0;
  // what is not finite makes its row's step so.
  void (*fixed_point)(const uint16_t* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, int16_t* out,
                      int64_t out_stride, float* steps);
  // out[i, j] <- tile[i, j] * factors[j] as int16, in steps of steps[i] <- the row's 2-norm / limit: in units of its step, no row
  // is longer than limit (at most kMostSteps) but for rounding. What rounding takes from an entry goes to another one of its row, so
  // that many small ones are not lost together. Steps of 0 and what is not finite as above.
  void (*quantise_rows)(const float* tile, int64_t stride, int64_t rows, int64_t cols, const float* factors, float limit,
                        int16_t* out, int64_t out_stride, float* steps);
  // The same for columns, in pairs: out[i / 2, j], a pair of int16 seen as one float, <- tile[i, j] * factors[i] and
  // tile[i + 1, j] * factors[i + 1], or 0 after the last row, in steps of steps[j].
  void (*quantise_columns)(const float* tile, int64_t stride, int64_t rows, int64_t cols, const float* factors, float limit,
                           float* out, int64_t out_stride, float* steps);

  // Where row_ids[i] == col_ids[j]: row_sum[i] += tile[i, j] and, unless it is null, col_sum[j] += tile[i, j].
  void (*sum_matches)(const float* tile, int64_t stride, int64_t rows, int64_t cols, const int32_t* row_ids,
                      const int32_t* col_ids, float* row_sum, float* col_sum);
};

namespace baseline {
extern const TileKernels tile;
}
namespace avx2 {
extern const TileKernels tile;
}
namespace avx512 {
extern const TileKernels tile;
}

}  // namespace vlmfast::cpu
