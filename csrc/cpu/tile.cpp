#include "tile.h"

#include "simd16.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t block = 1024;
  double total = 0.0;
  for (int64_t k0 = 0; k0 < count; k0 += block) {
    Vec sum = {};
    for_each_in_row(a + k0, count - k0 < block ? count - k0 : block,
                    [&](Vec x, int64_t k, int64_t lanes) { sum += x * load(b + k0 + k, lanes, 0.0f); });
    total += reduce_add(sum);
  }
  return total;
}

void widen(const uint16_t* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; j += kWidth) {
      const int64_t count = cols - j < kWidth ? cols - j : kWidth;
      const ShortVec x = load(from + i * from_stride + j, count);
      store(to + i * to_stride + j, count, bf16 ? from_bf16(x) : from_half(x));
    }
}

void narrow(const float* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, uint16_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for_each_in_row(from + i * from_stride, cols, [&](Vec x, int64_t j, int64_t count) {
      store(to + i * to_stride + j, count, bf16 ? to_bf16(x) : to_half(x));
    });
}

// Rows r and r + half of a square trade the blocks of `half` lanes that belong to the other.
template <int half>
inline void trade(Vec* square) {
  IntVec low, high;
  for (int k = 0; k < kWidth; ++k) {
    const bool own = (k & half) == 0;
    low[k] = own ? k : kWidth + k - half;
    high[k] = own ? k + half : kWidth + k;
  }
  for (int r = 0; r < kWidth; ++r)
    if ((r & half) == 0) {
      const Vec a = square[r], b = square[r + half];
      square[r] = shuffle(a, b, low);
      square[r + half] = shuffle(a, b, high);
    }
}

template <int half>
inline void transpose_square(Vec* square) {
  trade<half>(square);
  if constexpr (half > 1) transpose_square<half / 2>(square);
}

void transpose(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  for (int64_t i0 = 0; i0 < rows; i0 += kWidth)
    for (int64_t j0 = 0; j0 < cols; j0 += kWidth) {
      const int64_t height = rows - i0 < kWidth ? rows - i0 : kWidth, width = cols - j0 < kWidth ? cols - j0 : kWidth;
      Vec square[kWidth] = {};
      for (int64_t r = 0; r < height; ++r) square[r] = load(tile + (i0 + r) * stride + j0, width, 0.0f);
      transpose_square<kWidth / 2>(square);
      for (int64_t c = 0; c < width; ++c) store(out + (j0 + c) * out_stride + i0, height, square[c]);
    }
}

void pair_rows(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float* next = tile + (i + 1) * stride;
    transform_row(tile + i * stride, cols, out + i / 2 * out_stride, [&](Vec x, int64_t j, int64_t count) {
      return bf16_pairs(x, i + 1 < rows ? load(next + j, count, 0.0f) : Vec{});
    });
  }
}

void sum_matches(const float* tile, int64_t stride, int64_t rows, int64_t cols, const int32_t* row_ids,
                 const int32_t* col_ids, float* row_sum, float* col_sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      if (row_ids[i] == col_ids[j]) {
        row_sum[i] += tile[i * stride + j];
        if (col_sum) col_sum[j] += tile[i * stride + j];
      }
}

}  // namespace

const TileKernels tile = {dot, widen, narrow, transpose, pair_rows, sum_matches};

}  // namespace vlmfast::cpu::VLMFAST_ISA
