// The sweep of sigmoid_loss over one tile of dot products, one function per instruction set.
#pragma once

#include "tile.h"

namespace vlmfast::cpu {

// Sums over the pairs of a tile, and then of all tiles.
struct SigmoidSums {
  double loss = 0.0, scale = 0.0, bias = 0.0;
};

struct SigmoidLossKernels {
  // With z = -1 where row_ids[i] == col_ids[j] and 1 elsewhere, t = z * (scale * tile[i, j] + bias) and g = z * sigmoid(t):
  // sums.loss += softplus(t), sums.scale += g * tile[i, j], sums.bias += g, tile[i, j] <- g.
  void (*sweep)(float* tile, int64_t stride, int64_t rows, int64_t cols, float scale, float bias, const int32_t* row_ids,
                const int32_t* col_ids, SigmoidSums& sums);
};

namespace baseline {
extern const SigmoidLossKernels sigmoid_loss;
}
namespace avx2 {
extern const SigmoidLossKernels sigmoid_loss;
}
namespace avx512 {
extern const SigmoidLossKernels sigmoid_loss;
}

}  // namespace vlmfast::cpu
