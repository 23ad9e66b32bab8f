// gated_residual on one row of float32, one set of functions per instruction set.
#pragma once

#include "tile.h"

namespace vlmfast::cpu {

struct GatedResidualKernels {
  // out[j] <- residual[j] + factor[j] * hidden[j], and residual[j] itself where factor[j] is 0. out may be residual.
  void (*add)(const float* residual, const float* hidden, const float* factor, int64_t dim, float* out);

  // d_hidden[j] <- factor[j] * grad[j], 0 where factor[j] is 0; products[j] += grad[j] * hidden[j]. Either may be null.
  void (*gradient)(const float* grad, const float* hidden, const float* factor, int64_t dim, float* d_hidden,
                   float* products);
};

namespace baseline {
extern const GatedResidualKernels gated_residual;
}
namespace avx2 {
extern const GatedResidualKernels gated_residual;
}
namespace avx512 {
extern const GatedResidualKernels gated_residual;
}

}  // namespace vlmfast::cpu
