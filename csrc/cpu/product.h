// Products of float32 tiles that stay in cache: one function per instruction set.
#pragma once

#include <cstdint>

namespace vlmfast::cpu {

struct ProductKernels {
  // c[i, j] = sum over p of a[i, p] b[p, j], or += with accumulate, for c (m, n), on the calling thread. a[i, p] is at
  // a[i * a_row + p * a_col], so that a may be transposed at no cost; rows of b and c are contiguous, b_row and c_row apart.
  void (*multiply)(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                   int64_t b_row, float* c, int64_t c_row, bool accumulate);
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

}  // namespace vlmfast::cpu
