#include "linear_cross_entropy.h"

#include <type_traits>

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

constexpr float kLog2e = 1.44269504f;

// f(vectors, j, count): columns j and on, as many vectors as an integral constant says; `count` of the lanes of a single one.
template <class F>
inline void for_each_group(int64_t cols, const F& f) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= cols; j += 4 * kWidth) f(std::integral_constant<int, 4>(), j, kWidth);
  for (; j < cols; j += kWidth) f(std::integral_constant<int, 1>(), j, cols - j < kWidth ? cols - j : kWidth);
}

// Folds a tile's maximum and sum into the running pair; maxima are integers, so the powers of two are exact.
inline void merge(float& maximum, double& sum, float tile_max, double tile_sum) {
  if (tile_max == -kInfinity && tile_sum == 0.0) return;
  const float top = maximum > tile_max ? maximum : tile_max;
  if (maximum != -kInfinity) sum *= __builtin_exp2(double(maximum) - top);
  sum += tile_sum * __builtin_exp2(double(tile_max) - top);
  maximum = top;
}

void online_sums(float* tile, int64_t stride, int64_t rows, int64_t cols, const float* bias, float* kept, int64_t kept_stride,
                 float* maximum, double* sum) {
  // What is kept is read in backward, long after other data has taken its place in the caches.
  const bool past_caches = kept && cols % kWidth == 0 && kept_stride % kWidth == 0 && streams_to(kept);
  for_each_group(cols, [&](auto vectors, int64_t j, int64_t count) {
    Vec top[vectors], base[vectors], total[vectors] = {};
    for (Vec& t : top) t = splat(-kInfinity);
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) {
        float* at = tile + i * stride + j + v * kWidth;
        Vec z = load(at, count, 0.0f);
        if (bias) {
          z += bias[i];
          store(at, count, z);
        }
        top[v] = max(top[v], z);
        if (!kept) continue;
        float* to = kept + i * kept_stride + j + v * kWidth;
        past_caches ? stream(to, z) : store(to, count, z);
      }
    float tops[kWidth], sums[kWidth];
    for (int v = 0; v < vectors; ++v) {
      store(tops, top[v] * kLog2e);
      for (float& t : tops) t = __builtin_rintf(t);
      top[v] = load(tops);
      base[v] = top[v] == -kInfinity ? Vec{} : top[v];
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v)
        total[v] += exp2(multiply_add(load(tile + i * stride + j + v * kWidth, count, 0.0f), splat(kLog2e), -base[v]));
    for (int v = 0; v < vectors; ++v) {
      store(tops, top[v]);
      store(sums, total[v]);
      for (int64_t k = 0; k < count; ++k) merge(maximum[j + v * kWidth + k], sum[j + v * kWidth + k], tops[k], sums[k]);
    }
  });
  if (past_caches) finish_streams();
}

void gradient(const float* tile, int64_t stride, int64_t rows, int64_t cols, const float* bias, const float* shift,
              const float* factor, const float* offset, float* out, int64_t out_stride) {
  for_each_group(cols, [&](auto vectors, int64_t j, int64_t count) {
    Vec base[vectors], scale[vectors], less[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t k = j + v * kWidth;
      base[v] = load(shift + k, count, 0.0f);
      scale[v] = load(factor + k, count, 0.0f);
      less[v] = load(offset + k, count, 0.0f);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) {
        const int64_t k = j + v * kWidth;
        Vec z = load(tile + i * stride + k, count, 0.0f);
        if (bias) z += bias[i];
        store(out + i * out_stride + k, count, scale[v] * exp2(multiply_add(z, splat(kLog2e), -base[v])) - less[v]);
      }
  });
}

void row_sums(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec sum = {};
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t, int64_t) { sum += x; });
    sums[i] += reduce_add(sum);
  }
}

}  // namespace

const LinearCrossEntropyKernels linear_cross_entropy = {online_sums, gradient, row_sums};

}  // namespace vlmfast::cpu::VLMFAST_ISA
