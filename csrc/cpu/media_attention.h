// The sweeps of media_attention over one tile of scores, query rows by keys, one set of functions per instruction set.
#pragma once

#include "tile.h"

namespace vlmfast::cpu {

// What the rows of a tile see of the keys from k0 on: row r sees the keys first[r] to last[r] - 1, `bias` added to their
// scores, -inf where a key is no key; rows marked in `everything` (unless it is null) have all_bias instead.
struct VisibleKeys {
  const int32_t *first, *last;
  const uint8_t* everything;
  const float *bias, *all_bias;
  int64_t k0;
};

struct MediaAttentionKernels {
  // One step of a softmax over tiles. With x_ij = scale * tile[i, j] + bias of the keys that row i sees, top[i] becomes the
  // largest x so far, sum[i] and sums[i, :dim] are rescaled to it, tile[i, j] <- e^(x_ij - top[i]) or 0, and their sum is
  // added to sum[i]. The caller then adds the tile's product with the values to sums.
  void (*softmax_step)(float* tile, int64_t stride, int64_t rows, int64_t cols, VisibleKeys keys, float scale, float* top,
                       float* sum, float* sums, int64_t sums_stride, int64_t dim);

  // sums[i, :dim] /= sum[i], lse[i] <- ln(sum[i]) + top[i]; 0 and -inf where sum[i] is 0.
  void (*finish)(int64_t rows, const float* top, const float* sum, float* sums, int64_t sums_stride, int64_t dim,
                 float* lse);

  // tile[i, j] <- P = e^(x_ij - lse[i]) or 0, d_tile[i, j] <- scale * P * (d_tile[i, j] - delta[i]).
  void (*gradient)(float* tile, float* d_tile, int64_t stride, int64_t rows, int64_t cols, VisibleKeys keys, float scale,
                   const float* lse, const float* delta);

  // For a single query row: out[j] <- <q, k[j]>, and sums += sum_j p[j] v[j].
  void (*row_scores)(const float* q, const float* k, int64_t k_stride, int64_t keys, int64_t dim, float* out);
  void (*add_row_values)(const float* p, const float* v, int64_t v_stride, int64_t keys, int64_t dim, float* sums);
};

namespace baseline {
extern const MediaAttentionKernels media_attention;
}
namespace avx2 {
extern const MediaAttentionKernels media_attention;
}
namespace avx512 {
extern const MediaAttentionKernels media_attention;
}

}  // namespace vlmfast::cpu
