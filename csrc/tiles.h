// What the CPU schedules share: a matrix product on a tile, and an order of tiles in which threads never meet.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

namespace vlmfast {

// c (m, n) = a (m, k) b (k, n), or += with accumulate; float32, row-major with the given row strides, on the calling thread.
void tile_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
               int64_t ldc, bool accumulate);

// The same for bfloat16 operands and a float32 result, with b in pairs of rows: (k / 2, n, 2), k even. Where the processor
// has no bfloat16 products, on widened copies.
void tile_gemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, float* c,
               int64_t ldc, bool accumulate);

// Frees what tile_gemm holds on the calling thread; once at the end of each parallel region.
void tile_gemm_release();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(band, row_tile, col_tile) for every tile of the grid. The grid is cut into bands x bands blocks; in step t band b
// works on block (b, b + t), so that at any moment no two threads share a row tile or a column tile: f may accumulate into
// both without locks, and the order of accumulation depends on nothing but the number of bands.
template <class F>
void for_each_tile(int64_t bands, int64_t row_tiles, int64_t col_tiles, const F& f) {
  for (int64_t step = 0; step < bands; ++step)
    at::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t other = (band + step) % bands;
        for (int64_t j = col_tiles * other / bands; j < col_tiles * (other + 1) / bands; ++j)
          for (int64_t i = row_tiles * band / bands; i < row_tiles * (band + 1) / bands; ++i) f(band, i, j);
      }
      tile_gemm_release();
    });
}

// One band a thread, and no band without tiles.
inline int64_t count_bands(int64_t row_tiles, int64_t col_tiles) {
  return std::max<int64_t>(1, std::min({int64_t(at::get_num_threads()), row_tiles, col_tiles}));
}

}  // namespace vlmfast
