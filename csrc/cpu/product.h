// Products of tiles that stay in cache, with float32 sums: one set of functions per instruction set.
#pragma once

#include <cstdint>

namespace vlmfast::cpu {

struct ProductKernels {
  // c[i, j] = sum over p of a[i, p] b[p, j], or += with accumulate, for c (m, n), on the calling thread. a[i, p] is at
  // a[i * a_row + p * a_col], so that a may be transposed at no cost; rows of b and c are contiguous, b_row and c_row apart.
  void (*multiply)(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                   int64_t b_row, float* c, int64_t c_row, bool accumulate);

  // The same where each entry of a and b is a pair of bfloat16, seen as one float: c[i, j] = sum over p of the two products
  // of a[i, p] and b[p, j].
  decltype(multiply) multiply_pairs;

  // The same where each entry is a pair of int16: sums are exact, and as numbers of 32 bits they must not overflow over all of
  // k. c[i, j] = row_steps[i] * col_steps[j] * the sum; col_steps is null for ones.
  void (*multiply_shorts)(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                          int64_t b_row, float* c, int64_t c_row, bool accumulate, const float* row_steps,
                          const float* col_steps);
};

namespace baseline {
extern const ProductKernels product;
}
namespace avx2 {
extern const ProductKernels product;
}
namespace avx512 {
extern const ProductKernels product;
}
namespace avx512_vnni {
extern const ProductKernels product;
}
namespace avx512_bf16 {
extern const ProductKernels product;
}

}  // namespace vlmfast::cpu
