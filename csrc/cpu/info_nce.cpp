#include "info_nce.h"

#include <type_traits>

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

// exp_sums of kCount rows at once: their chains of instructions are independent, and column sums are loaded once for all.
template <int kCount>
inline void exp_sums_of_rows(const float* tile, int64_t stride, int64_t cols, float scale, float shift, double* row_sum,
                             float* columns, float* out, int64_t out_stride, bool past_caches) {
  Vec sums[kCount] = {};
  for_each_in_row(tile, cols, [&](Vec, int64_t j, int64_t count) {
    Vec column = load(columns + j);
    for (int r = 0; r < kCount; ++r) {
      const Vec x = load(tile + r * stride + j, count, 0.0f);
      const Vec e = keep_first(exp2_shifted(x, splat(scale), splat(shift)), count, 0.0f);
      sums[r] += e;
      column += e;
      float* to = out + r * out_stride + j;
      past_caches ? stream(to, e) : store(to, count, e);
    }
    store(columns + j, column);
  });
  for (int r = 0; r < kCount; ++r) row_sum[r] += reduce_add(sums[r]);
}

void exp_sums(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift, double* row_sum,
              double* col_sum, float* out, int64_t out_stride) {
  float columns[kMaxTile + kWidth] = {};
  // What is kept is read in backward, long after other data has taken its place in the caches.
  const bool past_caches = out != tile && cols % kWidth == 0 && out_stride % kWidth == 0 && streams_to(out);
  const auto sums_of = [&](auto rows_at_once, int64_t i) {
    exp_sums_of_rows<rows_at_once>(tile + i * stride, stride, cols, scale, shift, row_sum + i, columns, out + i * out_stride,
                                   out_stride, past_caches);
  };
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) sums_of(std::integral_constant<int, 4>(), i);
  for (; i < rows; ++i) sums_of(std::integral_constant<int, 1>(), i);
  if (past_caches) finish_streams();
  if (col_sum)
    for (int64_t j = 0; j < cols; ++j) col_sum[j] += columns[j];
}

// Folds (maximum, sum) of a tile into the running pair; maxima are integers, so the powers of two are exact.
inline void merge(float& running_max, double& running_sum, float tile_max, double tile_sum) {
  if (tile_max == -kInfinity) return;
  const float top = running_max > tile_max ? running_max : tile_max;
  if (running_max != -kInfinity) running_sum *= __builtin_exp2(double(running_max) - top);
  running_sum += tile_sum * __builtin_exp2(double(tile_max) - top);
  running_max = top;
}

// What sums are taken relative to, given the maximum: any finite number where there is none.
inline float base(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

void online_sums(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float* row_max,
                 double* row_sum, float* col_max, double* col_sum) {
  float column_max[kMaxTile + kWidth], column_base[kMaxTile + kWidth] = {}, column_sum[kMaxTile + kWidth] = {};
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
      sum += keep_first(exp2(multiply_add(x, splat(scale), splat(-base(maximum)))), count, 0.0f);
    });
    merge(row_max[i], row_sum[i], maximum, reduce_add(sum));
  }
  if (!col_sum) return;
  for (int64_t j = 0; j < cols; ++j) {
    column_max[j] = __builtin_rintf(column_max[j]);
    column_base[j] = base(column_max[j]);
  }
  for (int64_t i = 0; i < rows; ++i)
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t) {
      store(column_sum + j, load(column_sum + j) + exp2(multiply_add(x, splat(scale), -load(column_base + j))));
    });
  for (int64_t j = 0; j < cols; ++j) merge(col_max[j], col_sum[j], column_max[j], column_sum[j]);
}

void gradient_from_exp(const float* kept, int64_t stride, int64_t rows, int64_t cols, SoftmaxSide row, SoftmaxSide col,
                       float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; ++i)
    transform_row(kept + i * stride, cols, out + i * out_stride, [&](Vec e, int64_t j, int64_t count) {
      return e * (load(col.factor + j, count, 0.0f) + row.factor[i]);
    });
}

void gradient_from_dot(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float shift,
                       SoftmaxSide row, SoftmaxSide col) {
  for (int64_t i = 0; i < rows; ++i)
    transform_row(tile + i * stride, cols, tile + i * stride, [&](Vec x, int64_t j, int64_t count) {
      return exp2_shifted(x, splat(scale), splat(shift)) * (load(col.factor + j, count, 0.0f) + row.factor[i]);
    });
}

void gradient_two_shifts(const float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, SoftmaxSide row,
                         SoftmaxSide col, float* out, int64_t out_stride) {
  const auto term = [scale](Vec x, Vec shift, Vec factor) {
    const Vec value = exp2(multiply_add(x, splat(scale), -shift)) * factor;
    return factor == 0.0f ? Vec{} : value;
  };
  for (int64_t i = 0; i < rows; ++i)
    transform_row(tile + i * stride, cols, out + i * out_stride, [&](Vec x, int64_t j, int64_t count) {
      return term(x, splat(row.shift[i]), splat(row.factor[i])) +
             term(x, load(col.shift + j, count, 0.0f), load(col.factor + j, count, 0.0f));
    });
}

void subtract_matches(float* tile, int64_t stride, int64_t rows, int64_t cols, const int32_t* row_ids,
                      const int32_t* col_ids, SoftmaxSide row, SoftmaxSide col) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      if (row_ids[i] == col_ids[j]) tile[i * stride + j] -= row.target[i] + col.target[j];
}

}  // namespace

const InfoNceKernels info_nce = {exp_sums,          online_sums,         gradient_from_exp,
                                 gradient_from_dot, gradient_two_shifts, subtract_matches};

}  // namespace vlmfast::cpu::VLMFAST_ISA
