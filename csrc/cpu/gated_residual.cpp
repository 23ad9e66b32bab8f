#include "gated_residual.h"

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

void add(const float* residual, const float* hidden, const float* factor, int64_t dim, float* out) {
  transform_row(residual, dim, out, [&](Vec x, int64_t j, int64_t count) {
    const Vec g = load(factor + j, count, 0.0f);
    return g == 0.0f ? x : multiply_add(g, load(hidden + j, count, 0.0f), x);
  });
}

void gradient(const float* grad, const float* hidden, const float* factor, int64_t dim, float* d_hidden, float* products) {
  for_each_in_row(grad, dim, [&](Vec x, int64_t j, int64_t count) {
    const Vec g = load(factor + j, count, 0.0f);
    if (products) store(products + j, count, multiply_add(x, load(hidden + j, count, 0.0f), load(products + j, count, 0.0f)));
    if (d_hidden) store(d_hidden + j, count, g == 0.0f ? Vec{} : g * x);
  });
}

}  // namespace

const GatedResidualKernels gated_residual = {add, gradient};

}  // namespace vlmfast::cpu::VLMFAST_ISA
