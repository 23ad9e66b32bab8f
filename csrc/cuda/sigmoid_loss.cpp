// The schedule of sigmoid_loss on a GPU: one pass over squares of logits gives the loss and all gradients. Equations:
// vlmfast/ops/sigmoid_loss.py.
#include "../../kernels/cuda/sigmoid_loss.h"

#include "chunks.h"

namespace vlmfast::cuda {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const at::Tensor& bias,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool image_grad, bool text_grad) {
  const DeviceScope scope(image);
  const Chunks chunks(image, text, row_codes, col_codes, label_offset);
  const auto options = image.options().dtype(at::kFloat);
  const auto s = scale.to(at::kFloat), b = bias.to(at::kFloat);
  const auto d_image = image_grad ? at::zeros({chunks.n, chunks.dim}, options) : at::Tensor();
  const auto d_text = text_grad ? at::zeros({chunks.m, chunks.dim}, options) : at::Tensor();
  const bool gradients = image_grad || text_grad;
  auto total = at::zeros({3}, options.dtype(at::kDouble));
  chunks.for_each({}, Chunks::Kept::none, [&](const Logits& logits) {
    const auto sums = at::empty({3, sigmoid_loss_blocks(logits)}, total.options());
    const auto gradient =
        at::empty({gradients ? logits.rows : 0, logits.cols}, options.dtype(chunks.product));
    sigmoid_loss_chunk(logits, s.const_data_ptr<float>(), b.const_data_ptr<float>(), sums.mutable_data_ptr<double>(),
                       gradients ? gradient.mutable_data_ptr() : nullptr, type_of(chunks.product), scope.stream);
    total.add_(sums.sum(1));
    if (gradients) chunks.add_gradients(logits, gradient, d_image, d_text);
  });
  const auto sums = total.to(at::kFloat), factor = s.div(chunks.gradient_scale());
  const auto finish = [&](const at::Tensor& gradient) {
    return gradient.defined() ? gradient.mul(factor) : at::empty({0, chunks.dim}, options);
  };
  return {sums[0].clone(), finish(d_image), finish(d_text), sums[1].clone(), sums[2].clone()};
}

}  // namespace vlmfast::cuda
