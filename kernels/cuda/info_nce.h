// Launchers of info_nce's kernels; the schedule is csrc/cuda/info_nce.cpp, the equations are in vlmfast/ops/info_nce.py.
#pragma once

#include "logits.h"

namespace vlmfast::cuda {

// Rows and columns of the tiles that sums are made of.
constexpr int kSumRows = 64, kSumCols = 128;

// Per tile: for each row the largest base-2 logit, rounded (-inf where there is none), the sum of 2^(logit - it) and the sum
// of the positives' dot products, into row_partials (3, tiles of columns, rows); likewise for each column, into col_partials
// (3, tiles of rows, cols) unless it is null. Positives are in the sums only with codes.
void info_nce_tile_sums(const Logits& logits, const float* scale2, float* row_partials, float* col_partials,
                        cudaStream_t stream);

// Adds partials (3, tiles, count) to `count` of the stats (3, total) from the first on, in the order of tiles.
void info_nce_merge(const float* partials, int64_t tiles, int64_t count, float* stats, int64_t total, int64_t first,
                    cudaStream_t stream);

// What backward knows of rows and columns: (3, n) and (3, m) of shift, factor and target.
struct Sides {
  const float *rows, *cols;
  int64_t n, m;
};

// G of a chunk into out (rows, cols), of float32, or of float16 times kGradientScale. Where *kept_shift is finite, dots holds
// 2^(logit - *kept_shift); null: it holds dot products.
void info_nce_gradient(const Logits& logits, const float* scale2, const Sides& sides, const float* kept_shift, void* out,
                       Type out_type, cudaStream_t stream);

}  // namespace vlmfast::cuda
