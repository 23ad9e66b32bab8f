#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <chrono>

namespace vlmfast {

namespace {

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
// Whether oneDNN multiplies bfloat16, in the layout that is relied on here: one product of integers proves it.
bool has_brgemm() {
  static const bool available = [] {
    const at::BFloat16 a[8] = {1, 2, 3, 4, 5, 6, 7, 8}, b[8] = {1, 3, 2, 4, 5, 7, 6, 8};  // (2, 4) and (4, 2) in pairs
    float product[4];
    try {
      at::native::cpublas::brgemm(2, 2, 4, 4, 2, 2, false, a, b, product, true);
      at::native::cpublas::brgemm_release(true);
    } catch (const c10::Error&) {
      return false;
    }
    return product[0] == 50 && product[1] == 60 && product[2] == 114 && product[3] == 140;
  }();
  return available && at::globalContext().userEnabledMkldnn();
}

bool uses_brgemm() { return wants_brgemm() && has_brgemm(); }

void brgemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
            int64_t ldc, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, true);
}

void release_brgemm() { at::native::cpublas::brgemm_release(true); }
#else
bool uses_brgemm() { return false; }
void brgemm(int64_t, int64_t, int64_t, const at::BFloat16*, int64_t, const at::BFloat16*, int64_t, float*, int64_t, bool) {}
void release_brgemm() {}
#endif

// The products of pairs of this processor.
const cpu::ProductKernels& pair_products() {
#if defined(__x86_64__)
  if (has_bf16_products()) return cpu::avx512_bf16::product;
#endif
  return VLMFAST_KERNELS(product);
}

// Those of int16.
const cpu::ProductKernels& short_products() {
#if defined(__x86_64__)
  if (has_vnni()) return cpu::avx512_vnni::product;
#endif
  return VLMFAST_KERNELS(product);
}

template <class T>
const float* as_pairs(const T* data) {
  return reinterpret_cast<const float*>(data);
}

}  // namespace

void release_thread() {
  if (uses_brgemm()) release_brgemm();
}

void tile_gemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate) {
  if (uses_brgemm())
    brgemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  else
    pair_products().multiply_pairs(m, n, k / 2, as_pairs(a), lda / 2, 1, as_pairs(b), ldb, c, ldc, accumulate);
}

void transposed_gemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb,
                     float* c, int64_t ldc, bool accumulate) {
  if (!uses_brgemm()) {
    pair_products().multiply_pairs(m, n, k / 2, as_pairs(a), 1, lda, as_pairs(b), ldb, c, ldc, accumulate);
    return;
  }
  const auto rows = at::empty({m, k}, at::kBFloat16);
  VLMFAST_KERNELS(tile).transpose(as_pairs(a), lda, k / 2, m, static_cast<float*>(rows.mutable_data_ptr()), k / 2);
  brgemm(m, n, k, rows.const_data_ptr<at::BFloat16>(), k, b, ldb, c, ldc, accumulate);
}

void tile_gemm(int64_t m, int64_t n, int64_t k, const int16_t* a, int64_t lda, const int16_t* b, int64_t ldb, float* c,
               int64_t ldc, bool accumulate, const float* row_steps, const float* col_steps) {
  short_products().multiply_shorts(m, n, k / 2, as_pairs(a), lda / 2, 1, as_pairs(b), ldb, c, ldc, accumulate, row_steps,
                                   col_steps);
}

void transposed_gemm(int64_t m, int64_t n, int64_t k, const int16_t* a, int64_t lda, const int16_t* b, int64_t ldb, float* c,
                     int64_t ldc, bool accumulate, const float* row_steps, const float* col_steps) {
  short_products().multiply_shorts(m, n, k / 2, as_pairs(a), 1, lda, as_pairs(b), ldb, c, ldc, accumulate, row_steps,
                                   col_steps);
}

namespace {

template <class T>
double product_gflops() {
  constexpr int64_t dim = 512, repeats = 40;
  const int64_t threads = at::get_num_threads();
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  const auto a = at::ones({threads, kRows, dim}, dtype), b = at::ones({threads, dim, kCols}, dtype);
  auto c = at::empty({threads, kRows, kCols}, at::kFloat);
  const auto run = [&](int64_t count) {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T *left = a.template const_data_ptr<T>() + t * kRows * dim, *right = b.template const_data_ptr<T>() + t * dim * kCols;
        float* out = c.template mutable_data_ptr<float>() + t * kRows * kCols;
        for (int64_t k = 0; k < count; ++k) tile_gemm(kRows, kCols, dim, left, dim, right, kCols, out, kCols, false);
      }
      release_thread();
    });
  };
  run(1);
  const auto start = std::chrono::steady_clock::now();
  run(repeats);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return 2e-9 * double(threads * repeats * kRows * kCols * dim) / elapsed.count();
}

}  // namespace

double tile_product_gflops(bool bf16) { return bf16 ? product_gflops<at::BFloat16>() : product_gflops<float>(); }

}  // namespace vlmfast
