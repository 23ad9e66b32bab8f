#include "patch_embed.h"

#include <type_traits>

#include "simd16.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

// kWidth or, with count, fewer elements as floats; the rest of the lanes 0.
inline Vec widened(const float* p) { return load(p); }

using Bytes = uint8_t __attribute__((vector_size(VLMFAST_SIMD_WIDTH)));

// By way of 16 bits: GCC 12 takes a vector apart to widen it by more than a factor of 2.
inline Vec widened(Bytes bytes) {
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, ShortVec), IntVec), Vec);
}

inline Vec widened(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return widened(bytes);
}

inline Vec widened(const uint16_t* p) { return from_bf16(load(p, kWidth)); }

inline Vec widened(const float* p, int64_t count) { return load(p, count, 0.0f); }

template <class T>
inline Vec widened(const T* p, int64_t count) {
  if (count == kWidth) return widened(p);
#if defined(__AVX512F__) && VLMFAST_SIMD_WIDTH == 16
  if constexpr (sizeof(T) == 1) return widened(Bytes(_mm_maskz_loadu_epi8(first_lanes(count), p)));
#endif
  T lanes[kWidth] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return widened(lanes);
}

// f(k, lanes) for `count` entries in steps of a vector, the last of fewer lanes.
template <class F>
inline void for_each_vector(int64_t count, F f) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) f(k, kWidth);
  if (k < count) f(k, count - k);
}

template <class Pixel, class Out>
inline void read_line(const Pixel* in, const float* factor, const float* shift, int64_t count, Out* out) {
  for_each_vector(count, [&](int64_t k, int64_t lanes) {
    put(out + k, multiply_add(widened(in + k, lanes), load(factor + k, lanes, 0.0f), load(shift + k, lanes, 0.0f)), lanes);
  });
}

template <class Pixel, class Out>
void read_as(const Patches& patches, int64_t image, int64_t patch, Out* out) {
  const int64_t row = patch / patches.grid_cols, col = patch % patches.grid_cols;
  const auto* pixels = static_cast<const Pixel*>(patches.pixels) + corner(patches, image, patch);
  const int64_t rows = patches.height - row * patches.patch_height,
                left = patches.row_elements - col * patches.run;
  const int64_t count = left < patches.run ? left : patches.run;
  for (int64_t l = 0; l < patches.lines; ++l) {
    const int64_t k = l * patches.run, inside = patches.line_row[l] < rows ? count : 0;
    read_line(pixels + patches.line_offset[l], patches.factor + k, patches.shift + k, inside, out + k);
    std::memset(out + k + inside, 0, (patches.run - inside) * sizeof(Out));
  }
}

template <class Pixel>
constexpr PatchKernels<Pixel> readers = {read_as<Pixel, float>, read_as<Pixel, uint16_t>};

template <class Out>
void finish_as(const float* products, const float* bias, const float* position, int64_t count, Out* out) {
  for_each_vector(count, [&](int64_t k, int64_t lanes) {
    Vec x = load(products + k, lanes, 0.0f);
    if (bias) x += load(bias + k, lanes, 0.0f);
    if (position) x += load(position + k, lanes, 0.0f);
    put(out + k, x, lanes);
  });
}

// f(channels) with a constant in the place of the usual 3, for which compilers find vector code.
template <class F>
inline void with_constant(int64_t channels, const F& f) {
  if (channels == 3)
    f(std::integral_constant<int64_t, 3>());
  else
    f(channels);
}

template <class T>
void interleave(const T* in, int64_t channels, int64_t count, T* __restrict__ out) {
  with_constant(channels, [=](auto all) {
    for (int64_t x = 0; x < count; ++x)
      for (int64_t c = 0; c < all; ++c) out[x * all + c] = in[c * count + x];
  });
}

void separate(const float* in, int64_t channels, int64_t count, float* __restrict__ out) {
  with_constant(channels, [=](auto all) {
    for (int64_t x = 0; x < count; ++x)
      for (int64_t c = 0; c < all; ++c) out[c * count + x] = in[x * all + c];
  });
}

template <class In>
void add(const In* in, int64_t count, float* out) {
  for_each_vector(count, [&](int64_t k, int64_t lanes) {
    store(out + k, lanes, load(out + k, lanes, 0.0f) + widened(in + k, lanes));
  });
}

void add_double(const float* in, int64_t count, double* out) {
  using DoubleVec = double __attribute__((vector_size(kWidth * sizeof(double))));
  for_each_in_row(in, count, [&](Vec x, int64_t k, int64_t lanes) {
    DoubleVec sum = {};
    std::memcpy(&sum, out + k, lanes * sizeof(double));
    sum += __builtin_convertvector(x, DoubleVec);
    std::memcpy(out + k, &sum, lanes * sizeof(double));
  });
}

}  // namespace

const PatchEmbedKernels patch_embed = {
    readers<uint8_t>,  readers<uint16_t>,    readers<float>, finish_as<float>, finish_as<uint16_t>,
    interleave<float>, interleave<uint16_t>, separate,       add<float>,       add<uint16_t>,
    add_double,
};

}  // namespace vlmfast::cpu::VLMFAST_ISA
