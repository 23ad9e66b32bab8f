#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace vlmfast {

std::string cpu_isa() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return "avx512";
  if (capability == "AVX2") return "avx2";
#endif
  return "baseline";
}

namespace {

std::string forced_schedule;

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

// AMX is oneDNN's: it sets up what AMX needs of the system and of each thread.
bool uses_brgemm() {
  static const bool amx = cpu_isa() == "avx512" && __builtin_cpu_supports("amx-bf16");
  return (amx || forced_schedule == "brgemm") && has_brgemm();
}

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

bool has_vnni() {
#if defined(__x86_64__)
  static const bool available = cpu_isa() == "avx512" && __builtin_cpu_supports("avx512vnni");
  return available;
#else
  return false;
#endif
}

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

bool wants_bf16_schedule() { return forced_schedule.empty() ? has_bf16_products() : forced_schedule != "int16"; }

bool wants_int16_schedule() {
  return forced_schedule.empty() ? has_vnni() || cpu_isa() == "avx2" : forced_schedule == "int16";
}

bool has_bf16_products() {
#if defined(__x86_64__)
  static const bool available = cpu_isa() == "avx512" && __builtin_cpu_supports("avx512bf16");
  return available;
#else
  return false;
#endif
}

void force_schedule(const std::string& name) { forced_schedule = name; }

void release_thread() {
  if (uses_brgemm()) release_brgemm();
}

namespace {

// Asks the system for large pages under a tensor that is about to be written for the first time. Only for what is held and
// written again: where a virtual machine has to get the memory first, large pages cost more than small ones, once.
void advise_huge_pages([[maybe_unused]] const at::Tensor& fresh) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + fresh.nbytes()) / page * page;
  // Advice: where the system does not take it, small pages serve.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

at::Tensor HeldBuffers::take(at::IntArrayRef sizes, at::ScalarType dtype, bool large_pages) {
  constexpr size_t most = size_t(1) << 30;  // a larger one is not held between calls
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  for (const auto& storage : held_)
    if (storage && storage.use_count() == 1 && storage.nbytes() == bytes)
      return at::empty({0}, dtype).set_(storage, 0, sizes);
  auto& place = held_[oldest_];
  place = c10::Storage();
  auto fresh = at::empty(sizes, dtype);
  if (bytes <= most) {
    if (large_pages) advise_huge_pages(fresh);
    place = fresh.storage();
    oldest_ = (oldest_ + 1) % held_.size();
  }
  return fresh;
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
