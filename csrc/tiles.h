// What the CPU schedules of the losses share: tiles of dot products between two sets of features, the products that turn a
// tile into gradients, and an order of tiles in which threads never meet.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "gemm.h"

namespace vlmfast {

// Features (n, D) and (m, D) in the forms that tile products read: float32 or, where both are bfloat16 and the processor
// multiplies it, bfloat16 with float32 sums.
class FeatureTiles {
 public:
  // with_dot: `dot` will be called; image_grad, text_grad: `add_gradients` will be, for these sides.
  FeatureTiles(const at::Tensor& image, const at::Tensor& text, bool with_dot, bool image_grad, bool text_grad);

  int64_t n, m, dim, col_tiles, bands;
  int64_t step, row_tiles;  // rows of a tile, at most kRows: such that bands get equal shares
  at::Tensor image, text;   // float32, contiguous

  int64_t first_row(int64_t i) const { return i * step; }
  int64_t rows(int64_t i) const { return std::min(step, n - i * step); }
  int64_t cols(int64_t j) const { return std::min(kCols, m - j * kCols); }

  // tile (rows(i), cols(j)), row stride kCols.
  void dot(int64_t i, int64_t j, float* tile) const;

  // d_image (n, D) += the tile times text, d_text (m, D) += the tile transposed times image; null where not wanted. `scratch`
  // is of a tile's size; the tile itself is overwritten.
  void add_gradients(int64_t i, int64_t j, float* tile, float* scratch, float* d_image, float* d_text) const;

 private:
  bool bf16_;
  at::Tensor panels_;                                               // text as right-hand sides of `dot`
  at::Tensor image_bf16_, text_pairs_, image_rows_, text_rows_;  // bfloat16: operands of dot, right-hand sides of gradients

  void add_product(int64_t out_rows, int64_t inner, const at::BFloat16* tile, const at::Tensor& pairs, int64_t k,
                   float* out) const;
};

// Calls f(band, row_tile, col_tile) for every tile of the grid. The grid is cut into bands x bands blocks; in step t band b
// works on block (b, b + t), so that at any moment no two threads share a row tile or a column tile: f may accumulate into
// both without locks, and the order of accumulation depends on nothing but the number of bands.
template <class F>
void for_each_tile(const FeatureTiles& tiles, const F& f) {
  const int64_t bands = tiles.bands;
  for (int64_t step = 0; step < bands; ++step)
    at::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t other = (band + step) % bands;
        for (int64_t j = tiles.col_tiles * other / bands; j < tiles.col_tiles * (other + 1) / bands; ++j)
          for (int64_t i = tiles.row_tiles * band / bands; i < tiles.row_tiles * (band + 1) / bands; ++i) f(band, i, j);
      }
      release_thread();
    });
}

}  // namespace vlmfast
