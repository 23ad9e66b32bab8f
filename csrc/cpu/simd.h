// One vector type for every instruction set: VLMFAST_SIMD_WIDTH floats, written with the vector extensions that GCC and
// Clang share, so that the same source becomes AVX-512, AVX2, SSE2 or NEON code by the flags it is compiled with.
// No torch, and nothing with external linkage: this header is compiled several times into one library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if !defined(VLMFAST_SIMD_WIDTH) || !defined(VLMFAST_ISA)
#error "VLMFAST_SIMD_WIDTH (floats per vector) and VLMFAST_ISA (namespace) come from CMakeLists.txt"
#endif

namespace vlmfast::cpu::VLMFAST_ISA {

constexpr int64_t kWidth = VLMFAST_SIMD_WIDTH;
constexpr float kInfinity = __builtin_inff();

using Vec = float __attribute__((vector_size(VLMFAST_SIMD_WIDTH * 4)));
using IntVec = int32_t __attribute__((vector_size(VLMFAST_SIMD_WIDTH * 4)));

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

static inline Vec splat(float x) { return x - Vec{}; }

// a * b + c, rounded once where the instruction set has a fused multiply-add. Said explicitly, since a compiler that fuses in
// one sweep and not in another makes forward and backward disagree by the rounding of a large logit.
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__) && VLMFAST_SIMD_WIDTH == 8
  return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// lane k is lane which[k] of a followed by b.
static inline Vec shuffle(Vec a, Vec b, IntVec which) {
#if defined(__clang__)
  Vec out;
  for (int64_t k = 0; k < kWidth; ++k) out[k] = which[k] < kWidth ? a[which[k]] : b[which[k] - kWidth];
  return out;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
static inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
#elif defined(__AVX2__) && VLMFAST_SIMD_WIDTH == 8
static inline IntVec first_lanes(int64_t count) { return IntVec{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(count); }
#endif

// The first `count` floats at p; `fill` in the lanes after them.
static inline Vec load(const float* p, int64_t count, float fill) {
  if (count == kWidth) return load(p);
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  return Vec(_mm512_mask_loadu_ps(__m512(splat(fill)), first_lanes(count), p));
#elif defined(__AVX2__) && VLMFAST_SIMD_WIDTH == 8
  const IntVec first = first_lanes(count);
  return first ? Vec(_mm256_maskload_ps(p, __m256i(first))) : splat(fill);
#endif
  float lanes[kWidth];
  for (int64_t k = 0; k < kWidth; ++k) lanes[k] = k < count ? p[k] : fill;
  return load(lanes);
}

static inline void store(float* p, int64_t count, Vec v) {
  if (count == kWidth) return store(p, v);
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  return _mm512_mask_storeu_ps(p, first_lanes(count), __m512(v));
#elif defined(__AVX2__) && VLMFAST_SIMD_WIDTH == 8
  return _mm256_maskstore_ps(p, __m256i(first_lanes(count)), __m256(v));
#endif
  float lanes[kWidth];
  store(lanes, v);
  for (int64_t k = 0; k < count; ++k) p[k] = lanes[k];
}

// A store past the caches, to an address for which streams_to holds. Others may read it after finish_streams.
static inline void stream(float* p, Vec v) {
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  _mm512_stream_ps(p, __m512(v));
#elif defined(__AVX2__) && VLMFAST_SIMD_WIDTH == 8
  _mm256_stream_ps(p, __m256(v));
#else
  store(p, v);
#endif
}

static inline bool streams_to(const float* p) { return uintptr_t(p) % sizeof(Vec) == 0; }

static inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// v with `fill` in all lanes but the first `count`.
static inline Vec keep_first(Vec v, int64_t count, float fill) {
  if (count == kWidth) return v;
  float lanes[kWidth];
  store(lanes, v);
  for (int64_t k = count; k < kWidth; ++k) lanes[k] = fill;
  return load(lanes);
}

// row[j] for any number of columns: f(vector, j, count) with `count` lanes of data and 0 in the rest.
template <class F>
static inline void for_each_in_row(const float* row, int64_t cols, F f) {
  int64_t j = 0;
  for (; j + kWidth <= cols; j += kWidth) f(load(row + j), j, kWidth);
  if (j < cols) f(load(row + j, cols - j, 0.0f), j, cols - j);
}

// out[j] <- f(row[j], j, count) likewise; lanes after the last column are not written. out may be row.
template <class F>
static inline void transform_row(const float* row, int64_t cols, float* out, F f) {
  for_each_in_row(row, cols, [&](Vec x, int64_t j, int64_t count) { store(out + j, count, f(x, j, count)); });
}

static inline float reduce_add(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

static inline float reduce_max(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int64_t half = kWidth / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) lanes[k] = lanes[k] > lanes[k + half] ? lanes[k] : lanes[k + half];
  return lanes[0];
}

constexpr float kRoundToInteger = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits

// 2^(exponent), given exponent = n + fraction with n an integer, fraction in [-1/2, 1/2], and rounded = n + 1.5 * 2^23.
// 0 below 2^-149 or, without AVX-512, 2^-125; +inf above 2^127; NaN for NaN. With AVX-512 it is only told for |n| < 2^21 that
// it is finite: beyond, also what should be 0 may be infinite or NaN.
static inline Vec exp2_parts([[maybe_unused]] Vec exponent, Vec rounded, Vec fraction) {
  // Minimax polynomial of 2^f on [-1/2, 1/2] (Cephes exp2f).
  Vec p = splat(1.535336188319500e-4f);
  p = p * fraction + 1.339887440266574e-3f;
  p = p * fraction + 9.618437357674640e-3f;
  p = p * fraction + 5.550332471162809e-2f;
  p = p * fraction + 2.402264791363012e-1f;
  p = p * fraction + 6.931472028550421e-1f;
  p = p * fraction + 1.0f;
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  return Vec(_mm512_maskz_scalef_ps(0xffff, __m512(p), __m512(rounded - kRoundToInteger)));
#else
  IntVec n, power_bits;
  std::memcpy(&n, &rounded, sizeof n);  // the low bits of rounded are n; the shift drops the others
  std::memcpy(&power_bits, &p, sizeof power_bits);
  power_bits += n << 23;
  Vec power;
  std::memcpy(&power, &power_bits, sizeof power);
  power = exponent < -125.0f ? Vec{} : power;
  power = exponent > 127.0f ? splat(kInfinity) : power;
  return exponent == exponent ? power : exponent;
#endif
}

// 2^exponent: 0 below 2^-149 or, without AVX-512, 2^-125; +inf above 2^127; NaN for NaN.
static inline Vec exp2(Vec exponent) {
  exponent = exponent < -200.0f ? splat(-200.0f) : exponent;
  exponent = exponent > 200.0f ? splat(200.0f) : exponent;
  const Vec rounded = exponent + kRoundToInteger;
  return exp2_parts(exponent, rounded, exponent - (rounded - kRoundToInteger));
}

// 2^(x * scale - shift) for an integer-valued shift of magnitude below 2^21. With a fused multiply-add nothing is rounded
// before the polynomial but the fraction, so the relative error stays near 1e-7 however large x * scale and shift are.
// Where |x * scale| is not below 2^21 either, infinite or NaN may come out instead of 0.
static inline Vec exp2_shifted(Vec x, Vec scale, Vec shift) {
  const Vec offset = kRoundToInteger - shift;
  const Vec rounded = multiply_add(x, scale, offset);
  return exp2_parts(multiply_add(x, scale, -shift), rounded, multiply_add(x, scale, offset - rounded));
}

}  // namespace vlmfast::cpu::VLMFAST_ISA
