// Forward of media_attention, and what each row sees.
#include "media_attention.cuh"

namespace vlmfast::cuda {
namespace {

using namespace attention;

__global__ void __launch_bounds__(kThreadsOfRows) rows_kernel(Attention a, const int32_t* lo, const int32_t* hi) {
  const int blocks = (a.queries + kThreadsOfRows - 1) / kThreadsOfRows;
  const int sample = int(blockIdx.x) / blocks, row = int(blockIdx.x) % blocks * kThreadsOfRows + int(threadIdx.x);
  const int media = a.keys / a.tokens_per_media;
  const int64_t at = int64_t(sample) * a.queries + row;
  int first = 0, last = 0;
  if (row < a.queries) {
    const int from = lo ? larger(lo[at], 1) : 1, to = hi ? smaller(hi[at], media) : media;
    bool sees = to >= from;
    if (sees && a.media_len) {
      const int32_t* lengths = a.media_len + int64_t(sample) * media;
      int medium = from;
      while (medium <= to && lengths[medium - 1] <= 0) ++medium;
      sees = medium <= to;
    }
    if (sees) {
      first = (from - 1) * a.tokens_per_media;
      last = to * a.tokens_per_media;
    } else if (a.empty_all) {
      first = -1;
      last = a.keys;
    }
    a.rows.first[at] = first;
    a.rows.last[at] = last;
  }
  int hull_first = last ? larger(first, 0) : a.keys, hull_last = last;
  for (int bits = kWarp / 2; bits; bits /= 2) {
    hull_first = smaller(hull_first, __shfl_xor_sync(kAllLanes, hull_first, bits));
    hull_last = larger(hull_last, __shfl_xor_sync(kAllLanes, hull_last, bits));
  }
  if (row % kHullRows == 0 && row < a.queries) {
    const int64_t hull = int64_t(sample) * ((a.queries + kHullRows - 1) / kHullRows) + row / kHullRows;
    a.rows.hull_first[hull] = hull_first;
    a.rows.hull_last[hull] = hull_last;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>, 1) forward_kernel(Attention a, T* out, float* lse) {
  VLMFAST_SHARED(unsigned char, memory);
  const Shared<T> shared(memory, a, true);
  const Item item(a.queries, kRows<T>, a.heads);
  const Place place;
  const int first_row = item.tile * kRows<T>, row = first_row + place.row, kv_head = item.head / (a.heads / a.kv_heads);
  const T *k = head_of<T>(a.k, item.sample, kv_head), *v = head_of<T>(a.v, item.sample, kv_head);
  load_rows<kRows<T>>(head_of<T>(a.q, item.sample, item.head) + first_row * a.q.row, a.q.row, a.dim, shared.own,
                      [&](int r) { return first_row + r < a.queries; });
  const Query query = query_at(a, item.sample, row);
  float* scores = shared.scores + place.warp_row * kScoreStride;
  T* weights = shared.weights + place.warp_row * kWeightStride<T>;
  float* fades = shared.fades + place.warp_row * kTile;
  Sums<T> found;
  float top = -INFINITY, sum = 0.0f;
  int begin, end;
  hull_of<T>(a, item, begin, end);
  for (int start = begin; start < end; start += kStep) {
    __syncthreads();
    load_keys(a, shared, k, v, item.sample, start, end);
    __syncthreads();
    multiply(shared.own + place.warp_row * stride_of<T>(a.dim), shared.other, a.dim, scores);
    __syncwarp();
    float x[kLaneCols], higher = top;
    for_each_score(shared.scores, place, [&](int c, float product) {
      x[c] = score(a, product, query, start + place.col + c, shared.keys[place.col + c]);
      higher = fmaxf(higher, x[c]);
    });
    higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 1));
    const float shift = higher == -INFINITY ? 0.0f : higher, fade = fast_exp2((top - shift) * kLog2e);
    float part = 0.0f;
#pragma unroll
    for (int c = 0; c < kLaneCols; ++c) {
      const float weight = fast_exp2((x[c] - shift) * kLog2e);
      part += weight;
      shared.weights[place.row * kWeightStride<T> + place.col + c] = from_float<T>(weight);
    }
    sum = sum * fade + part + __shfl_xor_sync(kAllLanes, part, 1);
    top = higher;
#pragma unroll
    for (int c = 0; c < kTile / 2; ++c) shared.fades[place.row * kTile + place.col / 2 + c] = fade;
    __syncwarp();
    found.fade(fades);
    found.add(weights, shared.other_values, a.v_dim);
  }
  const bool seen = sum != 0.0f;  // not a number is something
  const int64_t row_stride = int64_t(a.heads) * a.v_dim;
  const int64_t warp_row = int64_t(item.sample) * a.queries + first_row + place.warp_row;
  found.write(seen ? 1.0f / sum : 0.0f, scores, out + warp_row * row_stride + item.head * a.v_dim, row_stride,
              a.queries - first_row - place.warp_row, a.v_dim);
  if (place.col == 0 && row < a.queries)
    lse[(int64_t(item.sample) * a.heads + item.head) * a.queries + row] = seen ? top + log2f(sum) * kLn2 : -INFINITY;
}

}  // namespace

void attention_rows(const Attention& a, const int32_t* lo, const int32_t* hi, cudaStream_t stream) {
  launch(rows_kernel, unsigned(ceil_div(a.queries, kThreadsOfRows) * a.batch), kThreadsOfRows, 0, stream, a, lo, hi);
}

void attention_forward(const Attention& a, void* out, float* lse, cudaStream_t stream) {
  with_float(a.type, [&](auto element) {
    using T = decltype(element);
    launch(forward_kernel<T>, blocks_for<T>(a, a.queries, a.heads), kThreads<T>, Shared<T>(nullptr, a, true).bytes, stream, a,
           static_cast<T*>(out), lse);
  });
}

}  // namespace vlmfast::cuda
