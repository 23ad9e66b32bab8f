// What the CPU schedules of the losses share: tiles of dot products between two sets of features, the products that turn a
// tile into gradients, and an order of tiles in which threads never meet.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "gemm.h"

namespace vlmfast {

// The most columns of a tile. Sums over as many make the gradients' products 6 % faster than sums over kCols.
constexpr int64_t kMostCols = 2 * kCols;
static_assert(kMostCols <= cpu::kMaxTile);

// Where a tile lies in the (n, m) matrix of dot products, the band of rows that it belongs to, which is one thread's, and
// whether none before it had the same rows or columns; of columns, none of the same copy of their gradient.
struct Tile {
  int64_t band, row, rows, col, cols;
  bool first_of_rows, first_of_cols;
};

// kSquare: sides of like sizes; a band goes over its rows for each tile of columns. kByRows: many more rows than columns; a band
// goes over its columns for each tile of rows, and there may be several copies of the columns' gradient, to be added.
enum class TileOrder { kSquare, kByRows };

// Features (n, D) and (m, D) in the forms that tile products read: float32 or, where they have 16 bits and the processor
// multiplies that faster, bfloat16 with float32 sums or int16 with exact ones. As int16 each row of features counts in steps of
// its own, as fine as float16's, and so does each row and column of a swept tile.
class FeatureTiles {
 public:
  // with_dot: `dot` will be called; image_grad, text_grad: `add_gradients` will be, for these sides.
  FeatureTiles(const at::Tensor& image, const at::Tensor& text, bool with_dot, bool image_grad, bool text_grad,
               TileOrder order = TileOrder::kSquare);

  int64_t n, m, dim;
  TileOrder order;
  int64_t bands, band_rows;      // bands of equal shares of the rows
  int64_t blocks, copies;        // blocks of shares of the columns, and copies of their gradient: a band's is band / blocks
  int64_t tile_rows, tile_cols;  // a tile's at most; tile_cols is kMostCols, or kCols where that shares columns more equally

  // out (tile.rows, tile.cols), row stride tile_cols.
  void dot(const Tile& tile, float* out) const;

  // d_image (n, D) += the tile's values times text, d_text (m, D) += their transpose times image; = of the first tile of
  // these rows; null where not wanted. Row stride tile_cols; `scratch` is of a tile's size.
  void add_gradients(const Tile& tile, const float* values, float* scratch, float* d_image, float* d_text) const;

  // The same from the tile's first row of each gradient.
  void add_to_rows(const Tile& tile, const float* values, float* scratch, float* image_rows, float* text_rows) const;

 private:
  // The rows of image that a tile has, in pairs.
  const float* image_pairs(const Tile& tile) const;

  // add_to_rows for each kind of operands.
  void add_float32(const Tile& tile, const float* values, float* image_rows, float* text_rows) const;
  void add_bfloat16(const Tile& tile, const float* values, float* scratch, float* image_rows, float* text_rows) const;
  void add_int16(const Tile& tile, const float* values, float* scratch, float* image_rows, float* text_rows) const;

  enum { kFloat32, kBFloat16, kInt16 } operands_;
  at::Tensor image_, text_;                      // (n, D) and (m, D), text in float32 only; in 16 bits D is made even
  at::Tensor panels_;                            // text as right-hand sides of `dot`
  at::Tensor image_row_pairs_, text_row_pairs_;  // 16 bits: right-hand sides of gradients
  bool pairs_by_band_ = false;                   // image_row_pairs_ is (bands, tile_rows / 2, D): of the rows that a band is at
  at::Tensor image_steps_, text_steps_;          // int16: the step of each row
  // int16: the longest vector, in its own steps, whose products with rows of image or text do not overflow 32 bits.
  float image_limit_, text_limit_;
};

// (rows, dim), float32, for add_gradients. What is `returned` to a caller who holds it is often taken afresh, in small pages.
at::Tensor gradient_sums(int64_t rows, int64_t dim, bool returned);

// Calls f(tile) for every tile of the matrix. It is cut into bands x blocks; in step t band b works on block (b + t), so that at
// any moment no two threads share a row, or a column of one copy: f may accumulate into both without locks, and the order of
// accumulation depends on nothing but the number of bands.
template <class F>
void for_each_tile(const FeatureTiles& tiles, const F& f) {
  const int64_t bands = tiles.bands, blocks = tiles.blocks, cols = tiles.tile_cols, col_tiles = ceil_div(tiles.m, cols);
  for (int64_t step = 0; step < blocks; ++step)
    at::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t other = (band + step) % blocks;
        const int64_t first_row = band * tiles.band_rows, last_row = std::min(tiles.n, first_row + tiles.band_rows);
        const int64_t first_col = col_tiles * other / blocks * cols;
        const int64_t last_col = std::min(tiles.m, col_tiles * (other + 1) / blocks * cols);
        const auto visit = [&](int64_t row, int64_t col) {
          f(Tile{band, row, std::min(tiles.tile_rows, last_row - row), col, std::min(cols, last_col - col),
                 step == 0 && col == first_col, step == 0 && row == first_row});
        };
        if (tiles.order == TileOrder::kByRows)
          for (int64_t row = first_row; row < last_row; row += tiles.tile_rows)
            for (int64_t col = first_col; col < last_col; col += cols) visit(row, col);
        else
          for (int64_t col = first_col; col < last_col; col += cols)
            for (int64_t row = first_row; row < last_row; row += tiles.tile_rows) visit(row, col);
      }
      release_thread();
    });
}

}  // namespace vlmfast
