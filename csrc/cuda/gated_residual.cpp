// The schedule of gated_residual on a GPU: one pass each way, and one over the sums for the gate's gradient. Equations:
// vlmfast/ops/gated_residual.py.
#include "../../kernels/cuda/gated_residual.h"

#include "device.h"
#include "ops.h"

namespace vlmfast::cuda {
namespace {

Elements elements_of(const at::Tensor& tensor) { return {tensor.const_data_ptr(), type_of(tensor.scalar_type())}; }

// The branch as kernels take it, and what keeps it in memory.
struct Branch {
  Branch(const at::Tensor& hidden_, const at::Tensor& gate_, const std::optional<at::Tensor>& row_mask_, bool tanh)
      : hidden(hidden_.contiguous()),
        gate(gate_.contiguous()),
        row_mask(row_mask_ ? row_mask_->contiguous() : at::Tensor()),
        of{elements_of(hidden),
           elements_of(gate),
           gate.numel() > 1,
           tanh,
           row_mask.defined() ? row_mask.const_data_ptr<bool>() : nullptr,
           hidden.size(0),
           hidden.size(1)} {}

  at::Tensor hidden, gate, row_mask;
  GatedBranch of;
};

}  // namespace

at::Tensor gated_residual_forward(const at::Tensor& residual, const at::Tensor& hidden, const at::Tensor& gate,
                                  const std::optional<at::Tensor>& row_mask, bool tanh) {
  const DeviceScope scope(residual);
  const Branch branch(hidden, gate, row_mask, tanh);
  const auto from = residual.contiguous();
  const auto out = at::empty(residual.sizes(), residual.options());
  gated_residual_add(elements_of(from), branch.of, out.mutable_data_ptr(), scope.stream);
  return out;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& gate, const std::optional<at::Tensor>& row_mask,
    bool tanh, bool hidden_grad, bool gate_grad) {
  const DeviceScope scope(grad);
  const Branch branch(hidden, gate, row_mask, tanh);
  const auto from = grad.contiguous();
  const auto d_hidden = hidden_grad ? at::empty(hidden.sizes(), hidden.options()) : at::empty({0}, hidden.options());
  const auto d_gate = at::empty({gate_grad ? gate.numel() : 0}, gate.options());
  const int64_t width = branch.of.per_channel ? branch.of.dim : 1;
  const auto sums = at::empty({gate_grad ? gated_residual_sums(branch.of) : 0, width}, grad.options().dtype(at::kFloat));
  gated_residual_gradient(elements_of(from), branch.of, hidden_grad ? d_hidden.mutable_data_ptr() : nullptr,
                          gate_grad ? sums.mutable_data_ptr<float>() : nullptr, scope.stream);
  if (gate_grad)
    gated_residual_gate_gradient(branch.of, sums.const_data_ptr<float>(), d_gate.mutable_data_ptr(), scope.stream);
  return {d_hidden, d_gate};
}

}  // namespace vlmfast::cuda
