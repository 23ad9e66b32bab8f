#include "product.h"

#include "simd16.h"

namespace vlmfast::cpu::VLMFAST_ISA {
namespace {

// A block of c that fits the registers: 24 sums where there are 32 registers, 12 where there are 16.
constexpr int kBlockRows = 6;
// kDepth: as much of k at a time that b's columns of a block stay in a cache while a's rows pass by.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVectors = 4;
constexpr int64_t kDepth = 512;  // in the second-level cache
constexpr bool kPacks = false;
// a's rows often come from memory, a block of them at a time, too short for the processor to foresee: their first use asks
// ahead. info_nce's forward is 4 % faster for it on Zen 5, and no faster on Zen 3.
constexpr bool kFetches = true;
#else
constexpr int kBlockVectors = 2;
constexpr int64_t kDepth = 256;
// A narrow block's columns fit the first-level cache, but not where their rows lie far apart and fall into few of its sets:
// they are copied to one place first, 16 to 18 % faster on Zen 3.
constexpr bool kPacks = true;
constexpr bool kFetches = false;
#endif
// Fewer rows than this do not pay for the copy.
constexpr int64_t kLeastPacked = 4 * kBlockRows;

// The three kinds of operands below share one loop. Each says:
// - Sum: the type of a register of sums; spread(entry): an entry of a in all lanes; multiply_add(left, right, sum): the sum of
//   one more product;
// - kChain: how many steps of k are added in one register before the register is added to the result so far;
// - add(sum, before, r, j, lanes): the numbers to store in row r from column j, where `before` has been stored;
// - at(i, j): the same object for the part of c whose first row is i and first column j.
template <class Entries>
struct FloatSums {
  using Sum = Vec;
  static constexpr int64_t kChain = 128;  // one chain of roundings over all of k is less exact than a good BLAS
  static Vec add(Vec sum, Vec before, int64_t, int64_t, int64_t) { return sum + before; }
  static Entries at(int64_t, int64_t) { return {}; }
};

struct Floats : FloatSums<Floats> {
  static Vec spread(float entry) { return splat(entry); }
  static Vec multiply_add(Vec left, Vec right, Vec sum) { return VLMFAST_ISA::multiply_add(left, right, sum); }
};

// The bits of an entry in all lanes, which may be those of no number.
Vec spread_bits(float entry) {
  int32_t bits;
  std::memcpy(&bits, &entry, sizeof bits);
  return from_bits(IntVec{} + bits);
}

// Pairs of bfloat16, each seen as one float, whose products are added: sum + left[0] * right[0] + left[1] * right[1].
struct Pairs : FloatSums<Pairs> {
  static constexpr int64_t kChain = kDepth;  // the pairs were rounded to fewer bits than such a sum loses
  static Vec spread(float entry) { return spread_bits(entry); }
  static Vec multiply_add(Vec left, Vec right, Vec sum) {
#if defined(__AVX512BF16__) && VLMFAST_SIMD_WIDTH == 16
    return Vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(left), __m512bh(right)));
#else
    const auto first = [](Vec pairs) { return from_bits(bits_of(pairs) << 16); };
    const auto second = [](Vec pairs) { return from_bits(bits_of(pairs) & int32_t(0xffff0000)); };
    sum = VLMFAST_ISA::multiply_add(first(left), first(right), sum);
    return VLMFAST_ISA::multiply_add(second(left), second(right), sum);
#endif
  }
};

// Pairs of int16 likewise.
struct Shorts {
  using Sum = IntVec;
  static constexpr int64_t kChain = kDepth;  // sums are exact

  const float *row_steps, *col_steps;

  static Vec spread(float entry) { return spread_bits(entry); }
  static IntVec multiply_add(Vec left, Vec right, IntVec sum) {
#if defined(__AVX512VNNI__) && VLMFAST_SIMD_WIDTH == 16
    return IntVec(_mm512_dpwssd_epi32(__m512i(sum), __m512i(left), __m512i(right)));
#elif defined(__AVX2__) && VLMFAST_SIMD_WIDTH == 8
    return sum + IntVec(_mm256_madd_epi16(__m256i(left), __m256i(right)));
#else
    const IntVec a = bits_of(left), b = bits_of(right);
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  Vec add(IntVec sum, Vec before, int64_t r, int64_t j, int64_t lanes) const {
    const Vec step = col_steps ? load(col_steps + j, lanes, 0.0f) * row_steps[r] : splat(row_steps[r]);
    return VLMFAST_ISA::multiply_add(__builtin_convertvector(sum, Vec), step, before);
  }
  Shorts at(int64_t i, int64_t j) const { return {row_steps + i, col_steps ? col_steps + j : nullptr}; }
};

// c (kRows, kVectors vectors, of a single one `lanes` lanes) for all of k. kAhead: asks for as many of a's next rows meanwhile.
template <class Entries, int kRows, int kVectors, bool kAhead = false>
void multiply_block(int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c,
                    int64_t c_row, int64_t lanes, bool accumulate, Entries entries) {
  const int64_t count = kVectors == 1 ? lanes : kWidth;
  Vec parts[kRows][kVectors];              // the sum of the chains so far
  const Vec(*before)[kVectors] = nullptr;  // that, once there is one
  if (accumulate)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * c_row + v * kWidth, 1);
  constexpr int64_t chain = Entries::kChain;
  for (int64_t first = 0, last; first < k; first = last) {
    last = chain < kDepth && first + chain < k ? first + chain : k;
    typename Entries::Sum sums[kRows][kVectors] = {};
    for (int64_t p = first; p < last; ++p) {
      if (kAhead && p % kWidth == 0)
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(a + (kRows + r) * a_row + p);
      Vec right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + p * b_row + v * kWidth, count, 0.0f);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Vec left = Entries::spread(a[r * a_row + p * a_col]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Entries::multiply_add(left, right[v], sums[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * c_row + v * kWidth;
        const Vec there = last == k && accumulate ? load(to, count, 0.0f) : Vec{};
        Vec sum = entries.add(sums[r][v], before ? before[r][v] : there, r, v * kWidth, count);
        if (before) sum += there;
        if (last < k)
          parts[r][v] = sum;
        else
          store(to, count, sum);
      }
    before = parts;
  }
}

// The columns of one block, of all rows. What `next` points at, k rows of b, is asked for meanwhile; with `fetches`, which
// needs a_col 1, also each next block's rows of a.
template <class Entries, int kVectors>
void multiply_columns(int64_t m, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                      float* c, int64_t c_row, int64_t lanes, bool accumulate, const float* next, int64_t next_row,
                      bool fetches, Entries entries) {
  constexpr decltype(&multiply_block<Entries, 1, kVectors>) blocks[] = {
      multiply_block<Entries, 1, kVectors>, multiply_block<Entries, 2, kVectors>, multiply_block<Entries, 3, kVectors>,
      multiply_block<Entries, 4, kVectors>, multiply_block<Entries, 5, kVectors>, multiply_block<Entries, 6, kVectors>};
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const int64_t rows = m - i < kBlockRows ? m - i : kBlockRows;
    if (next)
      for (int64_t p = k * i / m; p < k * (i + rows) / m; ++p) __builtin_prefetch(next + p * next_row);
    constexpr bool ahead = kFetches && kVectors == kBlockVectors;
    const auto block =
        fetches && i + 2 * kBlockRows <= m ? multiply_block<Entries, kBlockRows, kVectors, ahead> : blocks[rows - 1];
    block(k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, lanes, accumulate, entries.at(i, 0));
  }
}

template <class Entries>
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
              float* c, int64_t c_row, bool accumulate, Entries entries) {
  constexpr decltype(&multiply_columns<Entries, 1>) widths[] = {  // the first kBlockVectors of them
      multiply_columns<Entries, 1>, multiply_columns<Entries, 2>, multiply_columns<Entries, kBlockVectors - 1>,
      multiply_columns<Entries, kBlockVectors>};
  constexpr int64_t wide = kBlockVectors * kWidth;
  alignas(64) float packed[kPacks ? kDepth * wide : 1];
  const bool packs = kPacks && m >= kLeastPacked;
  for (int64_t first = 0; first < k; first += kDepth, accumulate = true) {
    const int64_t depth = k - first < kDepth ? k - first : kDepth;
    const float *left = a + first * a_col, *right = b + first * b_row;
    for (int64_t j = 0, vectors; j < n; j += vectors * kWidth) {
      const int64_t whole = (n - j) / kWidth;
      vectors = whole < kBlockVectors ? (whole > 1 ? whole : 1) : kBlockVectors;
      if (kBlockVectors > 2 && whole == kBlockVectors + 1) --vectors;  // one alone takes the time of two
      const bool pack = packs && vectors == kBlockVectors;
      if (pack)
        for (int64_t p = 0; p < depth; ++p)
          for (int v = 0; v < kBlockVectors; ++v)
            store(packed + p * wide + v * kWidth, load(right + p * b_row + j + v * kWidth));
      const float* next = pack && j + 2 * wide <= n ? right + j + wide : nullptr;
      widths[vectors - 1](m, depth, left, a_row, a_col, pack ? packed : right + j, pack ? wide : b_row, c + j, c_row,
                          n - j < kWidth ? n - j : kWidth, accumulate, next, b_row, a_col == 1 && j == 0, entries.at(0, j));
    }
  }
}

template <class Entries>
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
              float* c, int64_t c_row, bool accumulate) {
  multiply(m, n, k, a, a_row, a_col, b, b_row, c, c_row, accumulate, Entries());
}

void multiply_shorts(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b,
                     int64_t b_row, float* c, int64_t c_row, bool accumulate, const float* row_steps,
                     const float* col_steps) {
  multiply(m, n, k, a, a_row, a_col, b, b_row, c, c_row, accumulate, Shorts{row_steps, col_steps});
}

}  // namespace

const ProductKernels product = {multiply<Floats>, multiply<Pairs>, multiply_shorts};

}  // namespace vlmfast::cpu::VLMFAST_ISA
