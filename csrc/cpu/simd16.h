// bfloat16 and float16 from and to vectors of float32, rounded to nearest even. On integer lanes, so that it needs no
// instruction set of its own, but where AVX-512 has one.
#pragma once

#include "simd.h"

namespace vlmfast::cpu::VLMFAST_ISA {

using ShortVec = uint16_t __attribute__((vector_size(VLMFAST_SIMD_WIDTH * 2)));

static inline IntVec bits_of(Vec x) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline Vec from_bits(IntVec bits) {
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline Vec from_bf16(ShortVec x) { return from_bits(__builtin_convertvector(x, IntVec) << 16); }

static inline Vec from_half(ShortVec x) {
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  return Vec(_mm512_maskz_cvtph_ps(0xffff, __m256i(x)));
#else
  const IntVec bits = __builtin_convertvector(x, IntVec), sign = (bits & 0x8000) << 16;
  const IntVec magnitude = (bits & 0x7fff) << 13;
  const IntVec finite = bits_of(from_bits(magnitude) * 0x1p112f);  // also right for float16's subnormal numbers
  return from_bits(((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite) | sign);
#endif
}

// bfloat16 in the upper halves, anything in the lower ones.
static inline IntVec bf16_bits(Vec x) {
  const IntVec bits = bits_of(x);
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

// With AVX-512 BF16 subnormal numbers become 0.
static inline ShortVec to_bf16(Vec x) {
#if defined(__AVX512BF16__) && VLMFAST_SIMD_WIDTH == 16
  return ShortVec(_mm512_cvtneps_pbh(__m512(x)));
#else
  return __builtin_convertvector((bf16_bits(x) >> 16) & 0xffff, ShortVec);
#endif
}

// Lane k is the pair of first[k], second[k] as bfloat16.
static inline Vec bf16_pairs(Vec first, Vec second) {
  return from_bits(((bf16_bits(first) >> 16) & 0xffff) | (bf16_bits(second) & int32_t(0xffff0000)));
}

static inline ShortVec to_half(Vec x) {
  const IntVec bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const IntVec normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 leaves float16's subnormal numbers, multiples of 2^-24, in the low bits.
  const IntVec subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000;
  IntVec half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? IntVec{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? IntVec{} + 0x7e00 : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), ShortVec);
}

// Lane k is x[k] + error[k] rounded to an integer of at most 2^15 - 1, in its lower half; anything in the upper one. What was
// rounded away is left in error.
static inline IntVec short_bits(Vec x, Vec& error) {
  const Vec sum = x + error, rounded = sum + kRoundToInteger;
  error = sum - (rounded - kRoundToInteger);
  return bits_of(rounded);
}

// The first `count` numbers at p, 0 in the lanes after them.
static inline ShortVec load(const uint16_t* p, int64_t count) {
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  if (count != kWidth) return ShortVec(_mm256_maskz_loadu_epi16(first_lanes(count), p));
#endif
  ShortVec v = {};
  std::memcpy(&v, p, count * sizeof(uint16_t));
  return v;
}

static inline void store(uint16_t* p, int64_t count, ShortVec v) {
  if (count == kWidth)
    std::memcpy(p, &v, sizeof v);
  else
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
    _mm256_mask_storeu_epi16(p, first_lanes(count), __m256i(v));
#else
    for (int64_t k = 0; k < count; ++k) p[k] = v[k];
#endif
}

// row[j] for any number of columns, as simd.h has it for floats.
template <class F>
static inline void for_each_in_row(const uint16_t* row, int64_t cols, F f) {
  const int64_t rest = cols % kWidth, whole = cols - rest;
  for (int64_t j = 0; j < whole; j += kWidth) f(load(row + j, kWidth), j, kWidth);
  if (rest) f(load(row + whole, rest), whole, rest);
}

// The first `count` lanes, as float32 or bfloat16.
static inline void put(float* to, Vec x, int64_t count) { store(to, count, x); }
static inline void put(uint16_t* to, Vec x, int64_t count) { store(to, count, to_bf16(x)); }

// The lower halves of the first `count` lanes.
static inline void put(int16_t* to, IntVec x, int64_t count) {
  store(reinterpret_cast<uint16_t*>(to), count, __builtin_convertvector(x & 0xffff, ShortVec));
}

}  // namespace vlmfast::cpu::VLMFAST_ISA
