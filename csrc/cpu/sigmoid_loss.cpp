#include "sigmoid_loss.h"

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

// ln(1 + e) for e in [0, 1], to float32's relative accuracy: 2 artanh(e / (2 + e)) by its series, of which the argument's
// square, at most 1/9, needs nine terms.
inline Vec log1p_of_fraction(Vec e) {
  const Vec t = e / (2.0f + e), square = t * t;
  Vec series = splat(2.0f / 17);
  for (int odd = 15; odd > 0; odd -= 2) series = series * square + 2.0f / float(odd);
  return t * series;
}

inline IntVec load_ids(const int32_t* p, int64_t count) {
  IntVec v = {};
  std::memcpy(&v, p, count * sizeof(int32_t));
  return v;
}

void sweep(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float bias, const int32_t* row_ids,
           const int32_t* col_ids, SigmoidSums& sums) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec loss = {}, scale_sum = {}, bias_sum = {};
    transform_row(tile + i * stride, cols, tile + i * stride, [&](Vec x, int64_t j, int64_t count) {
      const IntVec positive = load_ids(col_ids + j, count) == row_ids[i];
      const Vec z = positive ? splat(-1.0f) : splat(1.0f);
      const Vec t = z * multiply_add(x, splat(scale), splat(bias));
      const Vec magnitude = t < 0.0f ? -t : t;
      const Vec e = exp2(magnitude * -1.44269504f);
      const Vec larger = t < 0.0f ? Vec{} : t;
      const Vec g = z * (t < 0.0f ? e : splat(1.0f)) / (1.0f + e);
      loss += keep_first(larger + log1p_of_fraction(e), count, 0.0f);
      scale_sum += keep_first(g * x, count, 0.0f);
      bias_sum += keep_first(g, count, 0.0f);
      return g;
    });
    sums.loss += reduce_add(loss);
    sums.scale += reduce_add(scale_sum);
    sums.bias += reduce_add(bias_sum);
  }
}

}  // namespace

const SigmoidLossKernels sigmoid_loss = {sweep};

}  // namespace vlmfast::cpu::VLMFAST_ISA
