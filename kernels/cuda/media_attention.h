// Launchers of media_attention's kernels; the schedule is csrc/cuda/media_attention.cpp, the equations:
// vlmfast/ops/media_attention.py.
#pragma once

#include "types.h"

namespace vlmfast::cuda {

constexpr int kMaxHeadDim = 128;  // the sums over steps of wider heads would not fit into the registers

// A tensor (B, H, L, dim), dim being contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t sample, head, row;
};

// What a query row sees is an interval of keys, of which those beyond media_len are left out. A hull is that of the intervals
// of kHullRows rows, counted from a sample's first.
constexpr int kHullRows = 32;
struct RowIntervals {
  int32_t *first, *last;            // (B, Lq): the keys first to last - 1; first is -1 where an empty row sees all
  int32_t *hull_first, *hull_last;  // (B, ceil(Lq / kHullRows))
};

struct Attention {
  Type type;  // of q, k, v, grad_out and of what is computed from them
  int batch, heads, kv_heads, queries, keys, dim, v_dim, tokens_per_media;
  float scale;
  bool empty_all;
  Heads q, k, v;
  const int32_t* media_len;  // (B, keys / tokens_per_media), or null
  const float* key_bias;     // (B, keys), or null
  RowIntervals rows;
};

// Fills attention.rows; lo and hi (B, Lq) are both null where every row sees all media.
void attention_rows(const Attention& attention, const int32_t* lo, const int32_t* hi, cudaStream_t stream);

// out (B, Lq, H, v_dim), lse (B, H, Lq).
void attention_forward(const Attention& attention, void* out, float* lse, cudaStream_t stream);

// delta (B, H, Lq) <- <grad_out, out> of each row.
void attention_delta(const Attention& attention, const Heads& grad_out, const Heads& out, float* delta, cudaStream_t stream);

// What the gradients read besides the inputs.
struct AttentionGradient {
  Heads grad_out;
  const float *lse, *delta;
};

// dq (B, Lq, H, dim).
void attention_query_grad(const Attention& attention, const AttentionGradient& gradient, void* dq, cudaStream_t stream);

// dk (B, Lk, Hkv, dim), dv (B, Lk, Hkv, v_dim).
void attention_key_grad(const Attention& attention, const AttentionGradient& gradient, void* dk, void* dv, cudaStream_t stream);

}  // namespace vlmfast::cuda
