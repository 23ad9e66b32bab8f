#include "info_nce.h"

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

// row[j] <- f(row[j], j, count) over a row of any length: `count` lanes hold data, the rest 0, and only those are written.
template <class F>
inline void transform_row(float* row, int64_t cols, F f) {
  int64_t j = 0;
  for (; j + kWidth <= cols; j += kWidth) store(row + j, f(load(row + j), j, kWidth));
  if (j < cols) store(row + j, cols - j, f(load(row + j, cols - j, 0.0f), j, cols - j));
}

template <class F>
inline void for_each_in_row(const float* row, int64_t cols, F f) {
  int64_t j = 0;
  for (; j + kWidth <= cols; j += kWidth) f(load(row + j), j, kWidth);
  if (j < cols) f(load(row + j, cols - j, 0.0f), j, cols - j);
}

void exp_sums(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift, double* row_sum,
              double* col_sum) {
  float columns[kMaxTileCols + kWidth] = {};
  for (int64_t i = 0; i < rows; ++i) {
    Vec sum = {};
    transform_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t count) {
      const Vec e = keep_first(exp2_shifted(x, splat(scale), splat(shift)), count, 0.0f);
      sum += e;
      store(columns + j, load(columns + j) + e);
      return e;
    });
    row_sum[i] += reduce_add(sum);
  }
  if (col_sum)
    for (int64_t j = 0; j < cols; ++j) col_sum[j] += columns[j];
}

// Folds (maximum, sum) of a tile into the running pair; maxima are integers, so the powers of two are exact.
inline void merge(float& running_max, double& running_sum, float tile_max, double tile_sum) {
  const float top = running_max > tile_max ? running_max : tile_max;
  if (running_max != -kInfinity) running_sum *= __builtin_exp2(double(running_max) - top);
  running_sum += tile_sum * __builtin_exp2(double(tile_max) - top);
  running_max = top;
}

void online_sums(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float* row_max,
                 double* row_sum, float* col_max, double* col_sum) {
  float column_max[kMaxTileCols + kWidth], column_sum[kMaxTileCols + kWidth] = {};
  for (float& m : column_max) m = -kInfinity;
  for (int64_t i = 0; i < rows; ++i) {
    Vec top = splat(-kInfinity);
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t count) {
      const Vec logit = keep_first(x * scale, count, -kInfinity);
      top = max(top, logit);
      store(column_max + j, max(load(column_max + j), logit));
    });
    const float maximum = __builtin_rintf(reduce_max(top));
    Vec sum = {};
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t, int64_t count) {
      sum += keep_first(exp2(multiply_add(x, splat(scale), splat(-maximum))), count, 0.0f);
    });
    merge(row_max[i], row_sum[i], maximum, reduce_add(sum));
  }
  if (!col_sum) return;
  for (int64_t j = 0; j < cols; ++j) column_max[j] = __builtin_rintf(column_max[j]);
  for (int64_t i = 0; i < rows; ++i)
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t) {
      store(column_sum + j, load(column_sum + j) + exp2(multiply_add(x, splat(scale), -load(column_max + j))));
    });
  for (int64_t j = 0; j < cols; ++j) merge(col_max[j], col_sum[j], column_max[j], column_sum[j]);
}

void gradient_from_exp(float* tile, int64_t stride, int64_t rows, int64_t cols, const float* row_factor,
                       const float* col_factor) {
  for (int64_t i = 0; i < rows; ++i)
    transform_row(tile + i * stride, cols, [&](Vec e, int64_t j, int64_t count) {
      return e * (load(col_factor + j, count, 0.0f) + row_factor[i]);
    });
}

void gradient_from_dot(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift,
                       const float* row_factor, const float* col_factor) {
  for (int64_t i = 0; i < rows; ++i)
    transform_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t count) {
      return exp2_shifted(x, splat(scale), splat(shift)) * (load(col_factor + j, count, 0.0f) + row_factor[i]);
    });
}

void gradient_two_shifts(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, const float* row_shift,
                         const float* row_factor, const float* col_shift, const float* col_factor) {
  for (int64_t i = 0; i < rows; ++i)
    transform_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t count) {
      const Vec row = exp2(multiply_add(x, splat(scale), splat(-row_shift[i]))) * row_factor[i];
      const Vec col = exp2(multiply_add(x, splat(scale), -load(col_shift + j, count, 0.0f)));
      return row + col * load(col_factor + j, count, 0.0f);
    });
}

double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t block = 1024;
  double total = 0.0;
  for (int64_t k0 = 0; k0 < count; k0 += block) {
    Vec sum = {};
    for_each_in_row(a + k0, count - k0 < block ? count - k0 : block,
                    [&](Vec x, int64_t k, int64_t lanes) { sum += x * load(b + k0 + k, lanes, 0.0f); });
    total += reduce_add(sum);
  }
  return total;
}

void round_to_bf16(const float* tile, int64_t stride, int64_t rows, int64_t cols, uint16_t* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    uint16_t* to = out + i * out_stride;
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t count) {
      IntVec bits;
      std::memcpy(&bits, &x, sizeof bits);
      const IntVec rounded = x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
      for (int64_t k = 0; k < count; ++k) to[j + k] = uint16_t(uint32_t(rounded[k]) >> 16);
    });
    for (int64_t j = cols; j < stride; ++j) to[j] = 0;
  }
}

void transpose(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  constexpr int64_t block = 16;  // one cache line of floats each way
  for (int64_t i0 = 0; i0 < rows; i0 += block)
    for (int64_t j0 = 0; j0 < cols; j0 += block) {
      const int64_t i1 = i0 + block < rows ? i0 + block : rows, j1 = j0 + block < cols ? j0 + block : cols;
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < i1; ++i) out[j * out_stride + i] = tile[i * stride + j];
    }
}

}  // namespace

const InfoNceKernels info_nce = {exp_sums,          online_sums, gradient_from_exp, gradient_from_dot,
                                 gradient_two_shifts, dot,         round_to_bf16,     transpose};

}  // namespace vlmfast::cpu::VLMFAST_ISA
