// Backward of media_attention.
#include "media_attention.cuh"

namespace vlmfast::cuda {
namespace {

using namespace attention;

__device__ Query query_with_gradient(const Attention& a, const AttentionGradient& gradient, int sample, int head, int query) {
  Query found = query_at(a, sample, query);
  if (query >= a.queries) return found;
  const int64_t at = (int64_t(sample) * a.heads + head) * a.queries + query;
  const float lse = gradient.lse[at];
  found.lse = lse == -INFINITY ? INFINITY : lse;
  found.delta = gradient.delta[at];
  return found;
}

// dS / scale where the weight is not 0, else 0, whatever the values there are.
__device__ float slope(float weight, float product, const Query& query) {
  return weight == 0.0f ? 0.0f : weight * (product - query.delta);
}

template <class T>
__global__ void __launch_bounds__(kThreadsOfRows) delta_kernel(Attention a, Heads grad_out, Heads out, float* delta) {
  const int64_t at = int64_t(blockIdx.x) * (kThreadsOfRows / kWarp) + threadIdx.x / kWarp;
  const int64_t row = at % a.queries, head = at / a.queries % a.heads, sample = at / a.queries / a.heads;
  if (sample >= a.batch) return;
  const T* g = head_of<T>(grad_out, int(sample), int(head)) + row * grad_out.row;
  const T* o = head_of<T>(out, int(sample), int(head)) + row * out.row;
  float sum = 0.0f;
  for (int d = int(threadIdx.x) % kWarp; d < a.v_dim; d += kWarp) sum = fmaf(to_float(g[d]), to_float(o[d]), sum);
  for (int bits = kWarp / 2; bits; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  if (threadIdx.x % kWarp == 0) delta[at] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>, 1) query_grad_kernel(Attention a, AttentionGradient gradient, T* dq) {
  VLMFAST_SHARED(unsigned char, memory);
  const Shared<T> shared(memory, a, false);
  const Item item(a.queries, kRows<T>, a.heads);
  const Place place;
  const int first_row = item.tile * kRows<T>, kv_head = item.head / (a.heads / a.kv_heads);
  const T *k = head_of<T>(a.k, item.sample, kv_head), *v = head_of<T>(a.v, item.sample, kv_head);
  const T *q = head_of<T>(a.q, item.sample, item.head), *grad = head_of<T>(gradient.grad_out, item.sample, item.head);
  const auto taken = [&](int r) { return first_row + r < a.queries; };
  load_rows<kRows<T>>(q + first_row * a.q.row, a.q.row, a.dim, shared.own, taken);
  load_rows<kRows<T>>(grad + first_row * gradient.grad_out.row, gradient.grad_out.row, a.v_dim, shared.own_values, taken);
  const Query query = query_with_gradient(a, gradient, item.sample, item.head, first_row + place.row);
  float* scores = shared.scores + place.warp_row * kScoreStride;
  Sums<T> found;
  int begin, end;
  hull_of<T>(a, item, begin, end);
  for (int start = begin; start < end; start += kStep) {
    __syncthreads();
    load_keys(a, shared, k, v, item.sample, start, end);
    __syncthreads();
    multiply(shared.own + place.warp_row * stride_of<T>(a.dim), shared.other, a.dim, scores);
    __syncwarp();
    float weight[kLaneCols];
    for_each_score(shared.scores, place, [&](int c, float product) {
      const float x = score(a, product, query, start + place.col + c, shared.keys[place.col + c]);
      weight[c] = fast_exp2((x - query.lse) * kLog2e);
    });
    __syncwarp();
    multiply(shared.own_values + place.warp_row * stride_of<T>(a.v_dim), shared.other_values, a.v_dim, scores);
    __syncwarp();
    for_each_score(shared.scores, place, [&](int c, float product) {
      shared.weights[place.row * kWeightStride<T> + place.col + c] = from_float<T>(slope(weight[c], product, query));
    });
    __syncwarp();
    found.add(shared.weights + place.warp_row * kWeightStride<T>, shared.other, a.dim);
  }
  const int64_t row_stride = int64_t(a.heads) * a.dim;
  const int64_t warp_row = int64_t(item.sample) * a.queries + first_row + place.warp_row;
  found.write(a.scale, scores, dq + warp_row * row_stride + item.head * a.dim, row_stride,
              a.queries - first_row - place.warp_row, a.dim);
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>, 1) key_grad_kernel(Attention a, AttentionGradient gradient, T* dk, T* dv) {
  VLMFAST_SHARED(unsigned char, memory);
  const Shared<T> shared(memory, a, false);
  const Item item(a.keys, kRows<T>, a.kv_heads);
  const Place place;
  const int group = a.heads / a.kv_heads, first_key = item.tile * kRows<T>, row = first_key + place.row;
  const auto taken = [&](int r) {
    return first_key + r < a.keys && (a.empty_all || is_valid(a, item.sample, first_key + r));
  };
  load_rows<kRows<T>>(head_of<T>(a.k, item.sample, item.head) + first_key * a.k.row, a.k.row, a.dim, shared.own, taken);
  load_rows<kRows<T>>(head_of<T>(a.v, item.sample, item.head) + first_key * a.v.row, a.v.row, a.v_dim, shared.own_values,
                      taken);
  const Key key = key_at(a, item.sample, row);
  float* scores = shared.scores + place.warp_row * kScoreStride;
  const T* weights = shared.weights + place.warp_row * kWeightStride<T>;
  T* own_weights = shared.weights + place.row * kWeightStride<T> + place.col;
  Sums<T> found_k, found_v;
  const int hulls = (a.queries + kHullRows - 1) / kHullRows;
  for (int head = item.head * group; head < (item.head + 1) * group; ++head) {
    const T *q = head_of<T>(a.q, item.sample, head), *grad = head_of<T>(gradient.grad_out, item.sample, head);
    for (int hull = 0; hull < hulls; ++hull) {
      const int64_t at = int64_t(item.sample) * hulls + hull;
      if (a.rows.hull_first[at] >= first_key + kRows<T> || a.rows.hull_last[at] <= first_key) continue;
      const int start = hull * kHullRows;
      const auto there = [&](int r) { return start + r < a.queries; };
      __syncthreads();
      load_rows<kStep>(q + start * a.q.row, a.q.row, a.dim, shared.other, there);
      load_rows<kStep>(grad + start * gradient.grad_out.row, gradient.grad_out.row, a.v_dim, shared.other_values, there);
      if (threadIdx.x < kStep)
        shared.queries[threadIdx.x] = query_with_gradient(a, gradient, item.sample, head, start + int(threadIdx.x));
      __syncthreads();
      multiply(shared.own + place.warp_row * stride_of<T>(a.dim), shared.other, a.dim, scores);
      __syncwarp();
      float weight[kLaneCols];
      for_each_score(shared.scores, place, [&](int c, float product) {
        const Query& query = shared.queries[place.col + c];
        weight[c] = fast_exp2((score(a, product, query, row, key) - query.lse) * kLog2e);
        own_weights[c] = from_float<T>(weight[c]);
      });
      __syncwarp();
      found_v.add(weights, shared.other_values, a.v_dim);
      multiply(shared.own_values + place.warp_row * stride_of<T>(a.v_dim), shared.other_values, a.v_dim, scores);
      __syncwarp();
      for_each_score(shared.scores, place, [&](int c, float product) {
        own_weights[c] = from_float<T>(slope(weight[c], product, shared.queries[place.col + c]));
      });
      __syncwarp();
      found_k.add(weights, shared.other, a.dim);
    }
  }
  const int64_t warp_row = (int64_t(item.sample) * a.keys + first_key + place.warp_row) * a.kv_heads + item.head;
  const int count = a.keys - first_key - place.warp_row;
  found_k.write(a.scale, scores, dk + warp_row * a.dim, int64_t(a.kv_heads) * a.dim, count, a.dim);
  found_v.write(1.0f, scores, dv + warp_row * a.v_dim, int64_t(a.kv_heads) * a.v_dim, count, a.v_dim);
}

}  // namespace

void attention_delta(const Attention& a, const Heads& grad_out, const Heads& out, float* delta, cudaStream_t stream) {
  const int64_t rows = int64_t(a.batch) * a.heads * a.queries;
  with_float(a.type, [&](auto element) {
    launch(delta_kernel<decltype(element)>, unsigned(ceil_div(rows, kThreadsOfRows / kWarp)), kThreadsOfRows, 0, stream, a,
           grad_out, out, delta);
  });
}

void attention_query_grad(const Attention& a, const AttentionGradient& gradient, void* dq, cudaStream_t stream) {
  with_float(a.type, [&](auto element) {
    using T = decltype(element);
    launch(query_grad_kernel<T>, blocks_for<T>(a, a.queries, a.heads), kThreads<T>, Shared<T>(nullptr, a, false).bytes, stream,
           a, gradient, static_cast<T*>(dq));
  });
}

void attention_key_grad(const Attention& a, const AttentionGradient& gradient, void* dk, void* dv, cudaStream_t stream) {
  with_float(a.type, [&](auto element) {
    using T = decltype(element);
    launch(key_grad_kernel<T>, blocks_for<T>(a, a.keys, a.kv_heads), kThreads<T>, Shared<T>(nullptr, a, false).bytes, stream, a,
           gradient, static_cast<T*>(dk), static_cast<T*>(dv));
  });
}

}  // namespace vlmfast::cuda
