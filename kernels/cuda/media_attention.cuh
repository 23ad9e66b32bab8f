// What the kernels of media_attention share: attention of query rows to intervals of keys, without a mask in memory.
//
// A warp owns 16 rows of its block's tile, queries or (gradient of keys and values) keys, and two lanes each row. A step brings
// 32 keys or queries for all warps; the warp's scores pass through its strip of shared memory, because which lane holds which
// element of a fragment is unspecified. Sums over all steps stay in fragments. Forward and the queries' gradient visit the
// keys of their rows' hull alone, the gradient of keys and values the hulls that reach its keys: always in the same order.
#pragma once

#include "fragments.cuh"
#include "media_attention.h"

namespace vlmfast::cuda::attention {

constexpr int kStep = kHullRows;
constexpr int kLaneCols = kStep / 2;  // of its row's scores, that a lane holds
constexpr int kMaxTiles = kMaxHeadDim / kTile;
constexpr int kThreadsOfRows = 128;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr auto kRowMajor = nvcuda::wmma::mem_row_major;

// float32 tiles of as many rows would not fit into the shared memory of every architecture.
template <class T>
constexpr int kWarps = sizeof(T) == 2 ? 4 : 2;
template <class T>
constexpr int kRows = kTile * kWarps<T>;
// Kernels declare that one such block a multiprocessor is enough: else the compiler spills registers to fit in more.
template <class T>
constexpr int kThreads = kWarp * kWarps<T>;

// Neighbouring rows of a tile begin 16 bytes apart modulo the banks, so that warps read columns of it without conflicts.
constexpr int kScoreStride = kStep + 4;
template <class T>
constexpr int kWeightStride = kStep + 16 / int(sizeof(T));

__host__ __device__ inline int tiles_of(int dim) { return (dim + kTile - 1) / kTile; }
template <class T>
__host__ __device__ int stride_of(int dim) {
  return tiles_of(dim) * kTile + 16 / int(sizeof(T));
}

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a > b ? a : b; }

struct Key {
  float bias;
  bool valid;
};

struct Query {
  int first, last;   // as in RowIntervals
  float lse, delta;  // lse +inf where the row sees nothing, so that its weights are 0
};

// A block's shared memory, 76 KiB at most (heads of 128, float32, backward): every architecture has 99. On the host, with base
// null, it tells how many bytes.
template <class T>
struct Shared {
  T *own, *own_values;      // (rows of the block, dim), (rows of the block, v_dim); the latter not in forward
  T *other, *other_values;  // (kStep, dim), (kStep, v_dim)
  float* scores;            // (rows of the block, kStep)
  T* weights;               // likewise
  float* fades;             // (rows of the block, kTile), in forward only
  Key* keys;                // (kStep,)
  Query* queries;           // (kStep,)
  size_t bytes = 0;

  __host__ __device__ Shared(unsigned char* base, const Attention& a, bool forward) {
    own = take<T>(base, kRows<T> * stride_of<T>(a.dim));
    own_values = take<T>(base, forward ? 0 : kRows<T> * stride_of<T>(a.v_dim));
    other = take<T>(base, kStep * stride_of<T>(a.dim));
    other_values = take<T>(base, kStep * stride_of<T>(a.v_dim));
    scores = take<float>(base, kRows<T> * kScoreStride);
    weights = take<T>(base, kRows<T> * kWeightStride<T>);
    fades = take<float>(base, forward ? kRows<T> * kTile : 0);
    keys = take<Key>(base, kStep);
    queries = take<Query>(base, kStep);
  }

 private:
  template <class E>
  __host__ __device__ E* take(unsigned char* base, int count) {
    constexpr size_t alignment = 128;
    const size_t offset = bytes;
    bytes += (count * sizeof(E) + alignment - 1) / alignment * alignment;
    return base ? reinterpret_cast<E*>(base + offset) : nullptr;
  }
};

// Which tile of `rows` rows of which head a block computes; the tiles of a head are neighbours, which share its keys.
struct Item {
  int tile, head, sample;

  __device__ Item(int length, int rows, int heads) {
    const int tiles = (length + rows - 1) / rows;
    tile = int(blockIdx.x) % tiles;
    head = int(blockIdx.x) / tiles % heads;
    sample = int(blockIdx.x) / tiles / heads;
  }
};

// The warp's first row in the block's tile, the lane's row, and where the lane's columns begin.
struct Place {
  int warp_row = int(threadIdx.x) / kWarp * kTile;
  int row = warp_row + int(threadIdx.x) % kWarp / 2;
  int col = int(threadIdx.x) % 2 * kLaneCols;
};

template <class T>
__device__ const T* head_of(const Heads& heads, int sample, int head) {
  return static_cast<const T*>(heads.data) + sample * heads.sample + head * heads.head;
}

__device__ inline bool is_valid(const Attention& a, int sample, int key) {
  if (!a.media_len) return true;
  const int64_t media = a.keys / a.tokens_per_media;
  return key % a.tokens_per_media < a.media_len[sample * media + key / a.tokens_per_media];
}

__device__ inline Key key_at(const Attention& a, int sample, int key) {
  if (key >= a.keys) return {0.0f, false};
  return {a.key_bias ? a.key_bias[int64_t(sample) * a.keys + key] : 0.0f, is_valid(a, sample, key)};
}

__device__ inline Query query_at(const Attention& a, int sample, int query) {
  if (query >= a.queries) return {0, 0, INFINITY, 0.0f};
  const int64_t at = int64_t(sample) * a.queries + query;
  return {a.rows.first[at], a.rows.last[at], INFINITY, 0.0f};
}

__device__ inline float score(const Attention& a, float product, const Query& query, int at, const Key& key) {
  const bool sees = at >= query.first && at < query.last && (key.valid || query.first < 0);
  return sees ? fmaf(product, a.scale, key.bias) : -INFINITY;
}

// kCount rows of a matrix (.., dim) into shared memory, 0 where taken(row) says no, and beyond dim up to whole tiles.
template <int kCount, class T, class Taken>
__device__ void load_rows(const T* from, int64_t row_stride, int dim, T* to, Taken taken) {
  constexpr int lanes = 16, vector = 16 / int(sizeof(T));
  const int stride = stride_of<T>(dim), width = tiles_of(dim) * kTile;
  const bool whole = (reinterpret_cast<uintptr_t>(from) | row_stride * sizeof(T) | dim * sizeof(T)) % 16 == 0;
  for (int row = int(threadIdx.x) / lanes; row < kCount; row += kThreads<T> / lanes) {
    const bool there = taken(row);
    const T* source = from + row * row_stride;
    T* target = to + row * stride;
    for (int col = int(threadIdx.x) % lanes * vector; col < width; col += lanes * vector)
      if (whole || !there) {
        const uint4 value = there && col < dim ? *reinterpret_cast<const uint4*>(source + col) : make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(target + col) = value;
      } else {
        for (int c = col; c < col + vector; ++c) target[c] = c < dim ? source[c] : from_float<T>(0.0f);
      }
  }
}

// A warp's strip of scores (16, kStep) <- own (16, dim) @ other (kStep, dim).T
template <class T>
__device__ void multiply(const T* own, const T* other, int dim, float* scores) {
  using F = Fragments<T>;
  constexpr int strips = kStep / kTile;
  const int stride = stride_of<T>(dim);
  typename F::Sum sums[strips];
#pragma unroll
  for (auto& sum : sums) fill_fragment(sum, 0.0f);
  for (int d = 0; d < tiles_of(dim) * kTile; d += kTile) {
    typename F::Left left;
    load_matrix_sync(left, own + d, stride);
#pragma unroll
    for (int i = 0; i < strips; ++i) {
      typename F::Turned right;
      load_matrix_sync(right, other + i * kTile * stride + d, stride);
      mma_sync(sums[i], left, right, sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < strips; ++i) store_matrix_sync(scores + i * kTile, sums[i], kScoreStride, kRowMajor);
}

// Sums over steps of a warp's 16 rows, (16, dim).
template <class T>
struct Sums {
  using F = Fragments<T>;
  typename F::Sum of[kMaxTiles];

  __device__ Sums() {
#pragma unroll
    for (auto& sum : of) fill_fragment(sum, 0.0f);
  }

  // += weights (16, kStep) @ other (kStep, dim)
  __device__ void add(const T* weights, const T* other, int dim) {
    const int stride = stride_of<T>(dim);
    typename F::Left left[kStep / kTile];
#pragma unroll
    for (int k = 0; k < kStep / kTile; ++k) load_matrix_sync(left[k], weights + k * kTile, kWeightStride<T>);
#pragma unroll
    for (int i = 0; i < kMaxTiles; ++i)
      if (i < tiles_of(dim)) {
#pragma unroll
        for (int k = 0; k < kStep / kTile; ++k) {
          typename F::Right right;
          load_matrix_sync(right, other + k * kTile * stride + i * kTile, stride);
          mma_sync(of[i], left[k], right, of[i]);
        }
      }
  }

  // *= fades (16, 16), whose columns are equal: a fragment of it holds each row's factor where those of the sums hold the row.
  __device__ void fade(const float* fades) {
    typename F::Sum factors;
    load_matrix_sync(factors, fades, kTile, kRowMajor);
#pragma unroll
    for (auto& sum : of)
#pragma unroll
      for (int e = 0; e < factors.num_elements; ++e) sum.x[e] *= factors.x[e];
  }

  // The first `count` rows, times each row's factor of its lanes, to memory; 0 where the factor is. `strip` is the warp's.
  __device__ void write(float factor, float* strip, T* to, int64_t row_stride, int count, int dim) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kMaxTiles; ++i)
      if (i < tiles_of(dim)) {
        __syncwarp();
        store_matrix_sync(strip, of[i], kScoreStride, kRowMajor);
        __syncwarp();
        const int col = lane % kTile;
        for (int row = lane / kTile; row < kTile; row += kWarp / kTile) {
          const float of_row = __shfl_sync(kAllLanes, factor, row * 2);
          const float value = of_row == 0.0f ? 0.0f : strip[row * kScoreStride + col] * of_row;
          if (row < count && i * kTile + col < dim) to[row * row_stride + i * kTile + col] = from_float<T>(value);
        }
      }
  }
};

// f(column, score) for a lane's part of the warp's strip.
template <class F>
__device__ void for_each_score(const float* scores, const Place& place, F f) {
  const float* own = scores + place.row * kScoreStride + place.col;
#pragma unroll
  for (int c = 0; c < kLaneCols; c += 4) {
    const float4 four = *reinterpret_cast<const float4*>(own + c);
    f(c, four.x);
    f(c + 1, four.y);
    f(c + 2, four.z);
    f(c + 3, four.w);
  }
}

// The keys and values from start on, before stop, and what is added to their scores.
template <class T>
__device__ void load_keys(const Attention& a, const Shared<T>& shared, const T* k, const T* v, int sample, int start,
                          int stop) {
  const auto taken = [&](int row) { return start + row < stop && (a.empty_all || is_valid(a, sample, start + row)); };
  load_rows<kStep>(k + start * a.k.row, a.k.row, a.dim, shared.other, taken);
  load_rows<kStep>(v + start * a.v.row, a.v.row, a.v_dim, shared.other_values, taken);
  if (threadIdx.x < kStep) shared.keys[threadIdx.x] = key_at(a, sample, start + int(threadIdx.x));
}

// The keys that some row of a block's tile sees.
template <class T>
__device__ void hull_of(const Attention& a, const Item& item, int& begin, int& end) {
  constexpr int of_block = kRows<T> / kHullRows;
  const int hulls = (a.queries + kHullRows - 1) / kHullRows;
  begin = a.keys;
  end = 0;
  for (int hull = item.tile * of_block; hull < smaller(hulls, (item.tile + 1) * of_block); ++hull) {
    const int64_t at = int64_t(item.sample) * hulls + hull;
    begin = smaller(begin, a.rows.hull_first[at]);
    end = larger(end, a.rows.hull_last[at]);
  }
}

template <class T>
unsigned blocks_for(const Attention& a, int length, int heads) {
  return unsigned(ceil_div(length, kRows<T>) * heads * a.batch);
}

}  // namespace vlmfast::cuda::attention
