// bfloat16 and float16 from and to vectors of float32, rounded to nearest even. On integer lanes, so that it needs no
// instruction set of its own.
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
  const IntVec bits = __builtin_convertvector(x, IntVec), sign = (bits & 0x8000) << 16;
  const IntVec magnitude = (bits & 0x7fff) << 13;
  const IntVec finite = bits_of(from_bits(magnitude) * 0x1p112f);  // also right for float16's subnormal numbers
  return from_bits(((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite) | sign);
}

// bfloat16 in the upper halves, anything in the lower ones.
static inline IntVec bf16_bits(Vec x) {
  const IntVec bits = bits_of(x);
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

static inline ShortVec to_bf16(Vec x) { return __builtin_convertvector((bf16_bits(x) >> 16) & 0xffff, ShortVec); }

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

// The first `count` numbers at p, 0 in the lanes after them.
static inline ShortVec load(const uint16_t* p, int64_t count) {
  ShortVec v = {};
  std::memcpy(&v, p, count * sizeof(uint16_t));
  return v;
}

static inline void store(uint16_t* p, int64_t count, ShortVec v) { std::memcpy(p, &v, count * sizeof(uint16_t)); }

// The first `count` lanes, as float32 or bfloat16.
static inline void put(float* to, Vec x, int64_t count) { store(to, count, x); }
static inline void put(uint16_t* to, Vec x, int64_t count) { store(to, count, to_bf16(x)); }

}  // namespace vlmfast::cpu::VLMFAST_ISA
