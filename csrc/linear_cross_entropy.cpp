// The schedule of linear_cross_entropy on a CPU. Tiles have words for rows and rows of hidden for columns, so that the weight,
// the larger of the two by far, is read where it lies. Equations: vlmfast/ops/linear_cross_entropy.py.
#include "cpu/linear_cross_entropy.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "held_buffers.h"
#include "ops.h"
#include "tiles.h"

namespace vlmfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

const cpu::LinearCrossEntropyKernels& kernels() { return VLMFAST_KERNELS(linear_cross_entropy); }

// f(row, col) for the labels within a tile, as indices within it.
template <class F>
void for_each_label(const Tile& tile, const int64_t* labels, const F& f) {
  for (int64_t c = 0; c < tile.cols; ++c) {
    const int64_t r = labels[tile.col + c] - tile.row;
    if (r >= 0 && r < tile.rows) f(r, c);
  }
}

// A tile's place in what is kept, panels of kMostCols columns (PANEL of vlmfast/ops/linear_cross_entropy.py) one after the other.
struct KeptTile {
  int64_t first, stride;
  KeptTile(const FeatureTiles& tiles, const Tile& tile) {
    const int64_t panel = tile.col / kMostCols * kMostCols;
    stride = std::min(kMostCols, tiles.m - panel);
    first = tiles.n * panel + tile.row * stride + tile.col - panel;
  }
};

const float* data_or_null(const std::optional<at::Tensor>& bias) { return bias ? bias->const_data_ptr<float>() : nullptr; }

const float* from_row(const float* bias, const Tile& tile) { return bias ? bias + tile.row : nullptr; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_forward(const at::Tensor& hidden, const at::Tensor& weight,
                                                                const std::optional<at::Tensor>& bias_,
                                                                const at::Tensor& labels_, int64_t kept_rows) {
  const FeatureTiles tiles(weight, hidden, true, false, false, TileOrder::kByRows);
  const auto labels = labels_.contiguous();
  const auto bias = bias_ ? std::optional(bias_->contiguous()) : std::nullopt;
  static HeldBuffers logits(1);
  auto kept = kept_rows ? logits.take({kept_rows * tiles.n}, at::kFloat, true) : at::empty({0}, at::kFloat);
  const auto stats = at::empty({3, tiles.m}, at::kFloat);
  float *shift = stats.mutable_data_ptr<float>(), *total = shift + tiles.m, *own = total + tiles.m;
  // Each band of words has its own sums, which are added in their order.
  std::vector<float> maxima(tiles.bands * tiles.m, -kInfinity);
  std::vector<double> sums(tiles.bands * tiles.m, 0.0);
  const auto buffers = at::empty({tiles.bands, tiles.tile_rows * tiles.tile_cols}, at::kFloat);
  const int64_t stride = tiles.tile_cols;
  for_each_tile(tiles, [&](const Tile& tile) {
    float* dots = buffers.mutable_data_ptr<float>() + tile.band * tiles.tile_rows * stride;
    const float* offsets = from_row(data_or_null(bias), tile);
    tiles.dot(tile, dots);
    for_each_label(tile, labels.const_data_ptr<int64_t>(), [&](int64_t r, int64_t c) {
      own[tile.col + c] = dots[r * stride + c] + (offsets ? offsets[r] : 0.0f);
      dots[r * stride + c] = -kInfinity;
    });
    const KeptTile place(tiles, tile);
    kernels().online_sums(dots, stride, tile.rows, tile.cols, offsets,
                          kept_rows ? kept.mutable_data_ptr<float>() + place.first : nullptr, place.stride,
                          maxima.data() + tile.band * tiles.m + tile.col, sums.data() + tile.band * tiles.m + tile.col);
  });
  for (int64_t j = 0; j < tiles.m; ++j) {
    float top = -kInfinity;
    for (int64_t band = 0; band < tiles.bands; ++band) top = std::max(top, maxima[band * tiles.m + j]);
    shift[j] = top == -kInfinity ? 0.0f : top;
    double sum = 0.0;
    for (int64_t band = 0; band < tiles.bands; ++band)
      if (const double part = sums[band * tiles.m + j]; part != 0.0)
        sum += part * std::exp2(double(maxima[band * tiles.m + j]) - shift[j]);
    total[j] = float(sum);
  }
  return {stats, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_backward(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias_, const at::Tensor& labels_,
    const at::Tensor& rows_, const at::Tensor& kept, bool hidden_grad, bool weight_grad, bool bias_grad) {
  const bool recompute = kept.numel() == 0;
  const FeatureTiles tiles(weight, hidden, recompute, weight_grad, hidden_grad, TileOrder::kByRows);
  const auto labels = labels_.contiguous(), rows = rows_.contiguous();
  const auto bias = bias_ ? std::optional(bias_->contiguous()) : std::nullopt;
  const float *shift = rows.const_data_ptr<float>(), *factor = shift + tiles.m, *target = factor + tiles.m,
              *offset = target + tiles.m;

  // With one block of columns each word's gradient is complete when its tiles are done, and is rounded while it is in cache.
  const bool wide = weight.scalar_type() == at::kFloat, at_once = !wide && tiles.blocks == 1;
  auto d_weight = at_once && weight_grad ? at::empty(weight.sizes(), weight.options())
                                         : gradient_sums(weight_grad ? tiles.n : 0, tiles.dim, wide);
  const auto words = at::empty({at_once && weight_grad ? tiles.bands : 0, tiles.tile_rows, tiles.dim}, at::kFloat);
  auto d_hidden = gradient_sums(hidden_grad ? tiles.copies * tiles.m : 0, tiles.dim, true);
  if (tiles.bands < tiles.copies * tiles.blocks) d_hidden.zero_();  // of the last copy no band begins at each block
  auto d_bias = at::zeros({bias_grad ? tiles.n : 0}, at::kFloat);
  const auto buffers = at::empty({tiles.bands, 2, tiles.tile_rows * tiles.tile_cols}, at::kFloat);
  const int64_t stride = tiles.tile_cols, size = tiles.tile_rows * stride;
  for_each_tile(tiles, [&](const Tile& tile) {
    float *values = buffers.mutable_data_ptr<float>() + tile.band * 2 * size, *scratch = values + size;
    const KeptTile place(tiles, tile);
    const float* source = recompute ? values : kept.const_data_ptr<float>() + place.first;
    if (recompute) tiles.dot(tile, values);
    kernels().gradient(source, recompute ? stride : place.stride, tile.rows, tile.cols,
                       recompute ? from_row(data_or_null(bias), tile) : nullptr, shift + tile.col, factor + tile.col,
                       offset + tile.col, values, stride);
    for_each_label(tile, labels.const_data_ptr<int64_t>(),
                   [&](int64_t r, int64_t c) { values[r * stride + c] = target[tile.col + c]; });
    if (bias_grad) kernels().row_sums(values, stride, tile.rows, tile.cols, d_bias.mutable_data_ptr<float>() + tile.row);
    if (!weight_grad && !hidden_grad) return;
    float* word_rows = !weight_grad ? nullptr
                       : at_once    ? words.mutable_data_ptr<float>() + tile.band * tiles.tile_rows * tiles.dim
                                    : d_weight.mutable_data_ptr<float>() + tile.row * tiles.dim;
    float* hidden_rows =
        hidden_grad ? d_hidden.mutable_data_ptr<float>() + (tile.band / tiles.blocks * tiles.m + tile.col) * tiles.dim : nullptr;
    tiles.add_to_rows(tile, values, scratch, word_rows, hidden_rows);
    if (at_once && weight_grad && tile.col + tile.cols == tiles.m)
      VLMFAST_KERNELS(tile).narrow(word_rows, tiles.dim, weight.scalar_type() == at::kBFloat16, tile.rows, tiles.dim,
                                   static_cast<uint16_t*>(d_weight.mutable_data_ptr()) + tile.row * tiles.dim, tiles.dim);
  });
  const auto none = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  return {hidden_grad ? d_hidden.view({tiles.copies, tiles.m, tiles.dim}).sum(0).to(hidden.scalar_type()) : none(hidden),
          weight_grad ? d_weight.to(weight.scalar_type()) : none(weight), d_bias};
}

}  // namespace vlmfast
