// The schedule of gated_residual on a CPU: row after row, 16-bit rows by way of float32 ones that stay in cache. Equations:
// vlmfast/ops/gated_residual.py.
#include "cpu/gated_residual.h"

#include <ATen/Functions.h>

#include <cmath>
#include <vector>

#include "ops.h"
#include "tiles.h"

namespace vlmfast {
namespace {

const cpu::GatedResidualKernels& kernels() { return VLMFAST_KERNELS(gated_residual); }

// A contiguous (N, D) tensor of any dtype, read and written in rows of float32.
struct Matrix {
  explicit Matrix(const at::Tensor& tensor) : tensor(tensor.contiguous()), wide(tensor.scalar_type() == at::kFloat) {}

  const float* row(int64_t i, float* scratch) const {
    const int64_t dim = tensor.size(1);
    if (wide) return tensor.const_data_ptr<float>() + i * dim;
    const auto* from = static_cast<const uint16_t*>(tensor.const_data_ptr()) + i * dim;
    VLMFAST_KERNELS(tile).widen(from, dim, tensor.scalar_type() == at::kBFloat16, 1, dim, scratch, dim);
    return scratch;
  }

  // Where row i is to be put: in place, or in scratch for `finish` to round.
  float* out_row(int64_t i, float* scratch) const {
    return wide ? tensor.mutable_data_ptr<float>() + i * tensor.size(1) : scratch;
  }

  void finish(int64_t i, const float* scratch) const {
    const int64_t dim = tensor.size(1);
    if (!wide)
      VLMFAST_KERNELS(tile).narrow(scratch, dim, tensor.scalar_type() == at::kBFloat16, 1, dim,
                                   static_cast<uint16_t*>(tensor.mutable_data_ptr()) + i * dim, dim);
  }

  at::Tensor tensor;
  bool wide;
};

// tanh(gate) or gate, for each channel.
std::vector<float> factors(const at::Tensor& gate, int64_t dim, bool tanh) {
  const auto values = gate.to(at::kFloat).contiguous();
  std::vector<float> factor(dim);
  for (int64_t j = 0; j < dim; ++j) {
    const float x = values.const_data_ptr<float>()[values.numel() == 1 ? 0 : j];
    factor[j] = tanh ? std::tanh(x) : x;
  }
  return factor;
}

const bool* rows_of(const std::optional<at::Tensor>& mask) { return mask ? mask->const_data_ptr<bool>() : nullptr; }

}  // namespace

at::Tensor gated_residual_forward(const at::Tensor& residual, const at::Tensor& hidden, const at::Tensor& gate,
                                  const std::optional<at::Tensor>& row_mask, bool tanh) {
  const int64_t count = residual.size(0), dim = residual.size(1);
  const Matrix x(residual), h(hidden), out(at::empty({count, dim}, residual.options()));
  const auto factor = factors(gate, dim, tanh);
  const std::vector<float> nothing(dim, 0.0f);
  const auto mask = row_mask ? std::optional(row_mask->contiguous()) : std::nullopt;
  const bool* active = rows_of(mask);
  at::parallel_for(0, count, std::max<int64_t>(1, 32768 / dim), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * dim);
    for (int64_t i = begin; i < end; ++i) {
      float* to = out.out_row(i, scratch.data());
      kernels().add(x.row(i, scratch.data() + dim), h.row(i, scratch.data() + 2 * dim),
                    active && !active[i] ? nothing.data() : factor.data(), dim, to);
      out.finish(i, to);
    }
  });
  return out.tensor;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& gate, const std::optional<at::Tensor>& row_mask,
    bool tanh, bool hidden_grad, bool gate_grad) {
  const int64_t count = grad.size(0), dim = grad.size(1);
  const Matrix dy(grad), h(hidden), dh(at::empty({hidden_grad ? count : 0, dim}, hidden.options()));
  const auto factor = factors(gate, dim, tanh);
  const auto mask = row_mask ? std::optional(row_mask->contiguous()) : std::nullopt;
  const bool* active = rows_of(mask);
  // The gate's gradient is summed over blocks of rows that don't depend on the number of threads.
  const int64_t step = std::max<int64_t>(16, ceil_div(count, 64)), blocks = ceil_div(count, step);
  auto products = at::zeros({gate_grad ? blocks : 0, dim}, grad.options().dtype(at::kFloat));
  at::parallel_for(0, blocks, std::max<int64_t>(1, 32768 / (dim * step)), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * dim);
    for (int64_t i = begin * step; i < std::min(count, end * step); ++i) {
      float* to = hidden_grad ? dh.out_row(i, scratch.data()) : nullptr;
      if (active && !active[i]) {
        if (to) std::fill_n(to, dim, 0.0f);
      } else {
        kernels().gradient(dy.row(i, scratch.data() + dim), h.row(i, scratch.data() + 2 * dim), factor.data(), dim, to,
                           gate_grad ? products.mutable_data_ptr<float>() + i / step * dim : nullptr);
      }
      if (to) dh.finish(i, to);
    }
  });
  auto d_gate = at::empty({0}, gate.options());
  if (gate_grad) {
    const auto slope = tanh ? gate.to(at::kDouble).tanh().square().neg().add(1) : at::ones({1}, at::kDouble);
    const auto channels = products.sum(0, false, at::kDouble);
    d_gate = (gate.numel() == 1 ? channels.sum().reshape({1}) : channels).mul(slope).to(gate.scalar_type());
  }
  return {hidden_grad ? dh.tensor : at::empty({0}, hidden.options()), d_gate};
}

}  // namespace vlmfast
