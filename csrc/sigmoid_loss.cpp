// The schedule of sigmoid_loss on a CPU: one pass over tiles gives the loss and all gradients. Equations:
// vlmfast/ops/sigmoid_loss.py.
#include "cpu/sigmoid_loss.h"

#include <ATen/Functions.h>

#include <numeric>
#include <vector>

#include "ops.h"
#include "tiles.h"

namespace vlmfast {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const at::Tensor& bias,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool image_grad, bool text_grad) {
  const FeatureTiles tiles(image, text, true, image_grad, text_grad);
  const auto s = float(scale.item<double>()), b = float(bias.item<double>());
  const auto& kernels = VLMFAST_KERNELS(sigmoid_loss);
  // One rule for both kinds of positives: equal ids.
  std::vector<int32_t> row_ids(tiles.n), col_ids(tiles.m);
  if (row_codes) {
    std::copy_n(row_codes->contiguous().const_data_ptr<int32_t>(), tiles.n, row_ids.begin());
    std::copy_n(col_codes->contiguous().const_data_ptr<int32_t>(), tiles.m, col_ids.begin());
  } else {
    for (int64_t i = 0; i < tiles.n; ++i) {
      const int64_t column = i + label_offset;
      row_ids[i] = column >= 0 && column < tiles.m ? int32_t(column) : -1;
    }
    std::iota(col_ids.begin(), col_ids.end(), 0);
  }

  auto d_image = gradient_sums(image_grad ? tiles.n : 0, tiles.dim, true);
  auto d_text = gradient_sums(text_grad ? tiles.m : 0, tiles.dim, true);
  float* d_image_data = image_grad ? d_image.mutable_data_ptr<float>() : nullptr;
  float* d_text_data = text_grad ? d_text.mutable_data_ptr<float>() : nullptr;
  const auto buffers = at::empty({tiles.bands, 2, tiles.tile_rows * tiles.tile_cols}, at::kFloat);
  const int64_t stride = tiles.tile_cols, size = tiles.tile_rows * stride;
  std::vector<cpu::SigmoidSums> sums(tiles.bands);
  for_each_tile(tiles, [&](const Tile& tile) {
    float* values = buffers.mutable_data_ptr<float>() + tile.band * 2 * size;
    tiles.dot(tile, values);
    kernels.sweep(values, stride, tile.rows, tile.cols, s, b, row_ids.data() + tile.row, col_ids.data() + tile.col,
                  sums[tile.band]);
    tiles.add_gradients(tile, values, values + size, d_image_data, d_text_data);
  });

  cpu::SigmoidSums total;
  for (const auto& part : sums) {
    total.loss += part.loss;
    total.scale += part.scale;
    total.bias += part.bias;
  }
  const auto scalar = [](double value) {  // at::scalar_tensor raises for what is beyond float32
    return at::scalar_tensor(value, at::kDouble).to(at::kFloat);
  };
  return {scalar(total.loss), d_image.mul_(s), d_text.mul_(s), scalar(total.scale), scalar(total.bias)};
}

}  // namespace vlmfast
