#include "tile.h"

#include "simd16.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t block = 1024;
  double total = 0.0;
  for (int64_t k0 = 0; k0 < count; k0 += block) {
    Vec sum = {};
    for_each_in_row(a + k0, count - k0 < block ? count - k0 : block,
                    [&](Vec x, int64_t k, int64_t lanes) { sum += x * load(b + k0 + k, lanes, 0.0f); });
    total += reduce_add(sum);
  }
  return total;
}

void scale(const float* from, int64_t count, float factor, float* to) {
  transform_row(from, count, to, [=](Vec x, int64_t, int64_t) { return x * factor; });
}

void widen(const uint16_t* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for_each_in_row(from + i * from_stride, cols, [&](ShortVec x, int64_t j, int64_t count) {
      store(to + i * to_stride + j, count, bf16 ? from_bf16(x) : from_half(x));
    });
}

void narrow(const float* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, uint16_t* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for_each_in_row(from + i * from_stride, cols, [&](Vec x, int64_t j, int64_t count) {
      store(to + i * to_stride + j, count, bf16 ? to_bf16(x) : to_half(x));
    });
}

// Rows r and r + half of a square trade the blocks of `half` lanes that belong to the other.
template <int half>
inline void trade(Vec* square) {
  IntVec low, high;
  for (int k = 0; k < kWidth; ++k) {
    const bool own = (k & half) == 0;
    low[k] = own ? k : kWidth + k - half;
    high[k] = own ? k + half : kWidth + k;
  }
  for (int r = 0; r < kWidth; ++r)
    if ((r & half) == 0) {
      const Vec a = square[r], b = square[r + half];
      square[r] = shuffle(a, b, low);
      square[r + half] = shuffle(a, b, high);
    }
}

template <int half>
inline void transpose_square(Vec* square) {
  trade<half>(square);
  if constexpr (half > 1) transpose_square<half / 2>(square);
}

void transpose(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  for (int64_t i0 = 0; i0 < rows; i0 += kWidth)
    for (int64_t j0 = 0; j0 < cols; j0 += kWidth) {
      const int64_t height = rows - i0 < kWidth ? rows - i0 : kWidth, width = cols - j0 < kWidth ? cols - j0 : kWidth;
      Vec square[kWidth] = {};
      for (int64_t r = 0; r < height; ++r) square[r] = load(tile + (i0 + r) * stride + j0, width, 0.0f);
      transpose_square<kWidth / 2>(square);
      for (int64_t c = 0; c < width; ++c) store(out + (j0 + c) * out_stride + i0, height, square[c]);
    }
}

void interleave(const uint16_t* even, const uint16_t* odd, int64_t count, uint16_t* out) {
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t pair = uint32_t(even[k]) | uint32_t(odd[k]) << 16;
    std::memcpy(out + 2 * k, &pair, sizeof pair);
  }
}

void pair_rows(const float* tile, int64_t stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float* next = tile + (i + 1) * stride;
    transform_row(tile + i * stride, cols, out + i / 2 * out_stride, [&](Vec x, int64_t j, int64_t count) {
      return bf16_pairs(x, i + 1 < rows ? load(next + j, count, 0.0f) : Vec{});
    });
  }
}

// A step, and what to multiply by to count in it.
struct Step {
  float step, inverse;
  explicit Step(float step) : step(step), inverse(step == 0.0f ? 0.0f : 1.0f / step) {}
};

void fixed_point(const uint16_t* from, int64_t from_stride, bool bf16, int64_t rows, int64_t cols, int16_t* out,
                 int64_t out_stride, float* steps) {
  for (int64_t i = 0; i < rows; ++i) {
    const auto for_each = [&](const auto& f) {
      for_each_in_row(from + i * from_stride, cols, [&](ShortVec x, int64_t j, int64_t count) {
        f(bf16 ? from_bf16(x) : from_half(x), j, count);
      });
    };
    Vec squares = {}, top = {};
    for_each([&](Vec x, int64_t, int64_t) {
      squares = multiply_add(x, x, squares);
      top = max(top, max(x, -x));
    });
    const float by_norm = __builtin_sqrtf(reduce_add(squares)) / 46000.0f, by_entry = reduce_max(top) / kMostSteps;
    const Step step(by_entry > by_norm ? by_entry : by_norm);  // by_norm is NaN if an entry is
    steps[i] = step.step;
    for_each([&](Vec x, int64_t j, int64_t count) {
      put(out + i * out_stride + j, bits_of(x * step.inverse + kRoundToInteger), count);
    });
  }
}

// quantise_rows of kCount rows at once: what is passed from vector to vector makes a chain of each row, and chains run beside
// each other.
template <int kCount>
inline void quantise_some_rows(const float* tile, int64_t stride, int64_t cols, const float* factors, float limit, int16_t* out,
                               int64_t out_stride, float* steps) {
  Vec squares[kCount] = {}, error[kCount] = {};
  float inverse[kCount];
  for_each_in_row(factors, cols, [&](Vec factor, int64_t j, int64_t count) {
    for (int r = 0; r < kCount; ++r) {
      const Vec value = load(tile + r * stride + j, count, 0.0f) * factor;
      squares[r] = multiply_add(value, value, squares[r]);
    }
  });
  for (int r = 0; r < kCount; ++r) {
    const Step step(__builtin_sqrtf(reduce_add(squares[r])) / limit);
    steps[r] = step.step;
    inverse[r] = step.inverse;
  }
  for_each_in_row(factors, cols, [&](Vec factor, int64_t j, int64_t count) {
    for (int r = 0; r < kCount; ++r) {
      const Vec value = load(tile + r * stride + j, count, 0.0f) * factor * inverse[r];
      put(out + r * out_stride + j, short_bits(value, error[r]), count);
    }
  });
}

void quantise_rows(const float* tile, int64_t stride, int64_t rows, int64_t cols, const float* factors, float limit,
                   int16_t* out, int64_t out_stride, float* steps) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    quantise_some_rows<4>(tile + i * stride, stride, cols, factors, limit, out + i * out_stride, out_stride, steps + i);
  for (; i < rows; ++i)
    quantise_some_rows<1>(tile + i * stride, stride, cols, factors, limit, out + i * out_stride, out_stride, steps + i);
}

void quantise_columns(const float* tile, int64_t stride, int64_t rows, int64_t cols, const float* factors, float limit,
                      float* out, int64_t out_stride, float* steps) {
  float squares[kMaxTile + kWidth] = {}, errors[kMaxTile + kWidth] = {}, inverses[kMaxTile + kWidth];
  for (int64_t i = 0; i < rows; ++i)
    for_each_in_row(tile + i * stride, cols, [&](Vec x, int64_t j, int64_t) {
      const Vec value = x * factors[i];
      store(squares + j, multiply_add(value, value, load(squares + j)));
    });
  for (int64_t j = 0; j < cols; ++j) {
    const Step step(__builtin_sqrtf(squares[j]) / limit);
    steps[j] = step.step;
    inverses[j] = step.inverse;
  }
  for (int64_t i = 0; i < rows; i += 2) {
    const float* next = i + 1 < rows ? tile + (i + 1) * stride : nullptr;
    const float next_factor = next ? factors[i + 1] : 0.0f;
    transform_row(tile + i * stride, cols, out + i / 2 * out_stride, [&](Vec x, int64_t j, int64_t count) {
      const Vec inverse = load(inverses + j);
      Vec error = load(errors + j);
      const IntVec first = short_bits(x * factors[i] * inverse, error) & 0xffff;
      if (!next) return from_bits(first);
      const IntVec second = short_bits(load(next + j, count, 0.0f) * next_factor * inverse, error) << 16;
      store(errors + j, error);
      return from_bits(first | second);
    });
  }
}

void sum_matches(const float* tile, int64_t stride, int64_t rows, int64_t cols, const int32_t* row_ids,
                 const int32_t* col_ids, float* row_sum, float* col_sum) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      if (row_ids[i] == col_ids[j]) {
        row_sum[i] += tile[i * stride + j];
        if (col_sum) col_sum[j] += tile[i * stride + j];
      }
}

}  // namespace

const TileKernels tile = {dot,       scale,       widen,         narrow,           transpose,  interleave,
                          pair_rows, fixed_point, quantise_rows, quantise_columns, sum_matches};

}  // namespace vlmfast::cpu::VLMFAST_ISA
