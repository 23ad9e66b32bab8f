#include "media_attention.h"

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

constexpr float kLog2e = 1.44269504f;

// The columns of a tile that one row sees, and their biases.
struct RowKeys {
  int64_t begin, end;
  const float* bias;

  RowKeys(const VisibleKeys& keys, int64_t row, int64_t cols)
      : begin(keys.first[row] - keys.k0), end(keys.last[row] - keys.k0),
        bias(keys.everything && keys.everything[row] ? keys.all_bias : keys.bias) {
    begin = begin < 0 ? 0 : begin;
    end = end > cols ? cols : end;
  }

  bool none() const { return begin >= end; }

  // v with `fill` in the lanes whose columns, from j on, the row does not see.
  Vec select(Vec v, int64_t j, float fill) const {
    if (j >= begin && j + kWidth <= end) return v;
    IntVec column;
    for (int32_t k = 0; k < kWidth; ++k) column[k] = int32_t(j) + k;
    return (column >= int32_t(begin)) & (column < int32_t(end)) ? v : splat(fill);
  }

  // scale * x + bias - shift in the columns that the row sees, -inf in the others.
  Vec score(Vec x, int64_t j, int64_t count, float scale, float shift) const {
    return select(multiply_add(x, splat(scale), load(bias + j, count, 0.0f) - shift), j, -kInfinity);
  }
};

inline Vec exp(Vec x) { return exp2(x * kLog2e); }

inline void clear(float* row, int64_t cols) { std::memset(row, 0, cols * sizeof(float)); }

void softmax_step(float* tile, int64_t stride, int64_t rows, int64_t cols, VisibleKeys keys, float scale, float* top,
                  float* sum, float* sums, int64_t sums_stride, int64_t dim) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * stride;
    const RowKeys seen(keys, i, cols);
    if (seen.none()) {
      clear(row, cols);
      continue;
    }
    Vec most = splat(-kInfinity);
    transform_row(row, cols, row, [&](Vec x, int64_t j, int64_t count) {
      const Vec score = seen.score(x, j, count, scale, 0.0f);
      most = max(most, score);
      return score;
    });
    const float here = reduce_max(most), shift = here > top[i] ? here : top[i];
    const float base = shift == -kInfinity ? 0.0f : shift;  // biases of -inf leave no key so far
    Vec total = {};
    transform_row(row, cols, row, [&](Vec score, int64_t j, int64_t count) {
      const Vec e = seen.select(exp(score - base), j, 0.0f);
      total += keep_first(e, count, 0.0f);
      return e;
    });
    if (top[i] != shift) {
      const float factor = __builtin_expf(top[i] - shift);
      transform_row(sums + i * sums_stride, dim, sums + i * sums_stride, [&](Vec x, int64_t, int64_t) { return x * factor; });
      sum[i] *= factor;
      top[i] = shift;
    }
    sum[i] += reduce_add(total);
  }
}

void finish(int64_t rows, const float* top, const float* sum, float* sums, int64_t sums_stride, int64_t dim, float* lse) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = sums + i * sums_stride;
    if (sum[i] == 0.0f) {
      clear(row, dim);
      lse[i] = -kInfinity;
      continue;
    }
    const float factor = 1.0f / sum[i];
    transform_row(row, dim, row, [&](Vec x, int64_t, int64_t) { return x * factor; });
    lse[i] = float(double(top[i]) + __builtin_log(double(sum[i])));
  }
}

void gradient(float* tile, float* d_tile, int64_t stride, int64_t rows, int64_t cols, VisibleKeys keys, float scale,
              const float* lse, const float* delta) {
  for (int64_t i = 0; i < rows; ++i) {
    float *row = tile + i * stride, *d_row = d_tile + i * stride;
    const RowKeys seen(keys, i, cols);
    if (seen.none() || lse[i] == -kInfinity) {
      clear(row, cols);
      clear(d_row, cols);
      continue;
    }
    for_each_in_row(row, cols, [&](Vec x, int64_t j, int64_t count) {
      const Vec p = exp(seen.score(x, j, count, scale, lse[i]));
      const Vec d = p * (load(d_row + j, count, 0.0f) - delta[i]) * scale;
      store(row + j, count, p);
      store(d_row + j, count, p == 0.0f ? Vec{} : d);  // keys that the row does not see may hold anything
    });
  }
}

void row_scores(const float* q, const float* k, int64_t k_stride, int64_t keys, int64_t dim, float* out) {
  for (int64_t j = 0; j < keys; ++j) {
    Vec sum = {};
    for_each_in_row(q, dim, [&](Vec x, int64_t d, int64_t count) { sum += x * load(k + j * k_stride + d, count, 0.0f); });
    out[j] = reduce_add(sum);
  }
}

void add_row_values(const float* p, const float* v, int64_t v_stride, int64_t keys, int64_t dim, float* sums) {
  transform_row(sums, dim, sums, [&](Vec sum, int64_t d, int64_t count) {
    for (int64_t j = 0; j < keys; ++j) sum += p[j] * load(v + j * v_stride + d, count, 0.0f);
    return sum;
  });
}

}  // namespace

const MediaAttentionKernels media_attention = {softmax_step, finish, gradient, row_scores, add_row_values};

}  // namespace vlmfast::cpu::VLMFAST_ISA
