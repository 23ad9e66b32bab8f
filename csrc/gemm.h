// Products of tiles that stay in cache, which every CPU schedule is made of.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cpu/product.h"
#include "cpu/tile.h"
#include "processor.h"

namespace vlmfast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most rows of a tile, and its columns: three operands of a product stay in a second-level cache of 1 MB.
constexpr int64_t kRows = 192, kCols = 128;
static_assert(kRows <= cpu::kMaxTile && kCols <= cpu::kMaxTile);

// `rows` cut into steps of at most kRows that are as equal as multiples of 6, the rows of a block of cpu/product.cpp, can be.
inline int64_t equal_steps(int64_t rows) { return ceil_div(ceil_div(rows, ceil_div(rows, kRows)), 6) * 6; }

// c (m, n) = a (m, k) b (k, n), or += with accumulate; row-major with the given row strides, on the calling thread.
inline void tile_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc, bool accumulate) {
  VLMFAST_KERNELS(product).multiply(m, n, k, a, lda, 1, b, ldb, c, ldc, accumulate);
}

// The same with the transpose of a (k, m).
inline void transposed_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                            float* c, int64_t ldc, bool accumulate) {
  VLMFAST_KERNELS(product).multiply(m, n, k, a, 1, lda, b, ldb, c, ldc, accumulate);
}

// Both for bfloat16 operands and a float32 result. k is even, and right-hand sides are in pairs of rows: (k / 2, n, 2), 2 * ldb
// elements from one pair to the next; so is the a that is transposed, (k / 2, m, 2). lda is even.
void tile_gemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate);
void transposed_gemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
                     float* c, int64_t ldc, bool accumulate);

// And for int16 operands, in the same layout: c[i, j] = row_steps[i] * col_steps[j] * (a b)[i, j]; col_steps is null for ones.
void tile_gemm(int64_t m, int64_t n, int64_t k, const int16_t* a, int64_t lda, const int16_t* b, int64_t ldb, float* c,
               int64_t ldc, bool accumulate, const float* row_steps, const float* col_steps);
void transposed_gemm(int64_t m, int64_t n, int64_t k, const int16_t* a, int64_t lda, const int16_t* b, int64_t ldb, float* c,
                     int64_t ldc, bool accumulate, const float* row_steps, const float* col_steps);

// Frees what tile products hold on the calling thread; once at the end of each parallel region.
void release_thread();

}  // namespace vlmfast
