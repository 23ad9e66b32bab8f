// The schedule of media_attention on a GPU: intervals of keys for all rows, then one kernel each for out, the gradient of the
// queries, and those of keys and values. Equations: vlmfast/ops/media_attention.py.
#include "../../kernels/cuda/media_attention.h"

#include "device.h"
#include "ops.h"

namespace vlmfast::cuda {
namespace {

// Kernels want the dims of a head contiguous, and whatever strides else.
at::Tensor with_contiguous_dims(const at::Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : tensor.contiguous(); }

Heads heads_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// (B, H, L, dim) with the heads side by side in memory.
at::Tensor side_by_side(const at::Tensor& like, int64_t dim) {
  return at::empty({like.size(0), like.size(2), like.size(1), dim}, like.options()).transpose(1, 2);
}

template <class T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// The inputs as kernels take them, and what keeps them in memory.
struct Inputs {
  Inputs(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const Media& media, cudaStream_t stream)
      : q(with_contiguous_dims(q_)), k(with_contiguous_dims(k_)), v(with_contiguous_dims(v_)) {
    const int64_t batch = q.size(0), queries = q.size(2), hulls = ceil_div(queries, kHullRows);
    intervals = at::empty({2 * batch * (queries + hulls)}, q.options().dtype(at::kInt));
    int32_t* first = intervals.mutable_data_ptr<int32_t>();
    int32_t *last = first + batch * queries, *hull_first = last + batch * queries, *hull_last = hull_first + batch * hulls;
    attention = {type_of(q.scalar_type()),
                 int(batch),
                 int(q.size(1)),
                 int(k.size(1)),
                 int(queries),
                 int(k.size(2)),
                 int(q.size(3)),
                 int(v.size(3)),
                 int(media.tokens_per_media),
                 float(media.scale),
                 media.empty_all,
                 heads_of(q),
                 heads_of(k),
                 heads_of(v),
                 data_or_null<int32_t>(media.len),
                 data_or_null<float>(media.key_bias),
                 {first, last, hull_first, hull_last}};
    attention_rows(attention, data_or_null<int32_t>(media.lo), data_or_null<int32_t>(media.hi), stream);
  }

  at::Tensor q, k, v, intervals;
  Attention attention;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> media_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                           const Media& media) {
  const DeviceScope scope(q);
  const Inputs inputs(q, k, v, media, scope.stream);
  const auto out = side_by_side(q, v.size(3));
  const auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  attention_forward(inputs.attention, out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), scope.stream);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> media_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const Media& media, bool q_grad, bool kv_grad) {
  const DeviceScope scope(q);
  const Inputs inputs(q, k, v, media, scope.stream);
  const auto grad = with_contiguous_dims(grad_out), outputs = with_contiguous_dims(out);
  const auto delta = at::empty_like(lse);
  attention_delta(inputs.attention, heads_of(grad), heads_of(outputs), delta.mutable_data_ptr<float>(), scope.stream);
  const AttentionGradient gradient = {heads_of(grad), lse.const_data_ptr<float>(), delta.const_data_ptr<float>()};
  auto dq = at::empty({0}, q.options()), dk = at::empty({0}, k.options()), dv = at::empty({0}, v.options());
  if (q_grad) {
    dq = side_by_side(q, q.size(3));
    attention_query_grad(inputs.attention, gradient, dq.mutable_data_ptr(), scope.stream);
  }
  if (kv_grad) {
    dk = side_by_side(k, k.size(3));
    dv = side_by_side(v, v.size(3));
    attention_key_grad(inputs.attention, gradient, dk.mutable_data_ptr(), dv.mutable_data_ptr(), scope.stream);
  }
  return {dq, dk, dv};
}

}  // namespace vlmfast::cuda
