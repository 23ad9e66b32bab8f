#include "product.h"

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

// A block of c that fits the registers: 24 sums where there are 32 registers, 12 where there are 16.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
// One chain of roundings over all of k is less exact than a good BLAS; in pieces of this length it is not.
constexpr int64_t kChain = 192;
// As much of k at a time that b's columns of a block stay in a second-level cache while a's rows pass by.
constexpr int64_t kDepth = 3 * kChain;

// c (kRows, kVectors vectors, of the last one `lanes` lanes) for all of k.
template <int kRows, int kVectors>
void multiply_block(int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                    int64_t c_row, int64_t lanes, bool accumulate) {
  const auto lanes_of = [lanes](int v) { return v + 1 < kVectors ? kWidth : lanes; };
  for (int64_t first = 0; first < k; first += kChain, accumulate = true) {
    const int64_t last = first + kChain < k ? first + kChain : k;
    Vec sums[kRows][kVectors] = {};
    if (accumulate && first == 0)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * c_row + v * kWidth, 1);
    for (int64_t p = first; p < last; ++p) {
      Vec right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + p * b_row + v * kWidth, lanes_of(v), 0.0f);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Vec left = splat(a[r * a_row + p * a_col]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(left, right[v], sums[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * c_row + v * kWidth;
        store(to, lanes_of(v), accumulate ? sums[r][v] + load(to, lanes_of(v), 0.0f) : sums[r][v]);
      }
  }
}

// The columns of one block, of all rows.
template <int kVectors>
void multiply_columns(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                      float* c, int64_t c_row, int64_t lanes, bool accumulate) {
  constexpr decltype(&multiply_block<1, kVectors>) blocks[] = {
      multiply_block<1, kVectors>, multiply_block<2, kVectors>, multiply_block<3, kVectors>,
      multiply_block<4, kVectors>, multiply_block<5, kVectors>, multiply_block<6, kVectors>};
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const int64_t rows = m - i < kBlockRows ? m - i : kBlockRows;
    blocks[rows - 1](k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, lanes, accumulate);
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
              float* c, int64_t c_row, bool accumulate) {
  constexpr int64_t wide = kBlockVectors * kWidth;
  for (int64_t first = 0; first < k; first += kDepth, accumulate = true) {
    const int64_t depth = k - first < kDepth ? k - first : kDepth;
    const float *left = a + first * a_col, *right = b + first * b_row;
    int64_t j = 0;
    for (; j + wide <= n; j += wide)
      multiply_columns<kBlockVectors>(m, depth, left, a_row, a_col, right + j, b_row, c + j, c_row, kWidth, accumulate);
    for (; j < n; j += kWidth)
      multiply_columns<1>(m, depth, left, a_row, a_col, right + j, b_row, c + j, c_row, n - j < kWidth ? n - j : kWidth,
                          accumulate);
  }
}

}  // namespace

const ProductKernels product = {multiply};

}  // namespace vlmfast::cpu::VLMFAST_ISA
