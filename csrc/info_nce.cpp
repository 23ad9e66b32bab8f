// The schedule of info_nce on a CPU: tiles of dot products, one sweep over each while it is in cache, and for the gradients
// two more products with the swept tile. Equations: vlmfast/ops/info_nce.py.
#include "cpu/info_nce.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "held_buffers.h"
#include "ops.h"
#include "tiles.h"

namespace vlmfast {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const cpu::InfoNceKernels& kernels() { return VLMFAST_KERNELS(info_nce); }

// scale * log2(e), kept from zero: 1e-30 gives the same logits, and one can divide by it.
float base2_scale(const at::Tensor& scale) {
  const float scale2 = float(scale.item<double>() * kLog2e);
  return std::abs(scale2) < 1e-30f ? std::copysign(1e-30f, scale2) : scale2;
}

// Which entries are positives: column i + label_offset of row i, or wherever codes are equal.
struct Positives {
  int64_t label_offset;
  at::Tensor row_codes, col_codes;  // int32, or undefined

  Positives(int64_t label_offset, const std::optional<at::Tensor>& rows, const std::optional<at::Tensor>& cols)
      : label_offset(label_offset),
        row_codes(rows ? rows->contiguous() : at::Tensor()),
        col_codes(cols ? cols->contiguous() : at::Tensor()) {}

  bool grouped() const { return row_codes.defined(); }
  const int32_t* rows(int64_t first) const { return row_codes.const_data_ptr<int32_t>() + first; }
  const int32_t* cols(int64_t first) const { return col_codes.const_data_ptr<int32_t>() + first; }

  // f(row, col) for the labels within a tile, as indices within it.
  template <class F>
  void for_each_label(const Tile& tile, const F& f) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t c = tile.row + r + label_offset - tile.col;
      if (c >= 0 && c < tile.cols) f(r, c);
    }
  }
};

// Per row or column: a shift, the sum of 2^(logit - shift), the sum of the positives' dot products.
struct Sums {
  std::vector<float> shift, positive;
  std::vector<double> sum;

  void reset(int64_t count, float start) {
    shift.assign(count, start);
    positive.assign(count, 0.0f);
    sum.assign(count, 0.0);
  }

  // Whether one shift for all has served: no sum underflows or overflows. Without negatives there is no sum.
  bool in_range(bool without_negatives) const {
    return std::all_of(sum.begin(), sum.end(),
                       [&](double z) { return (z >= 0x1p-86 && z <= 0x1p126) || (without_negatives && z == 0.0); });
  }

  at::Tensor stacked() const {
    auto stats = at::empty({3, int64_t(sum.size())}, at::kFloat);
    float* out = stats.mutable_data_ptr<float>();
    std::copy(positive.begin(), positive.end(), std::copy(sum.begin(), sum.end(), std::copy(shift.begin(), shift.end(), out)));
    return stats;
  }
};

// Where a tile begins in what is kept, and its row stride: panels of kMostCols columns one after the other (PANEL of
// vlmfast/ops/info_nce.py), so that a tile of as many lies in one piece.
struct KeptTile {
  int64_t first, stride;
  KeptTile(const FeatureTiles& tiles, const Tile& tile) {
    const int64_t panel = tile.col / kMostCols * kMostCols;
    stride = std::min(kMostCols, tiles.m - panel);
    first = tiles.n * panel + tile.row * stride + tile.col - panel;
  }
};

void copy_tile(int64_t rows, int64_t cols, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, cols, to + i * to_stride);
}

// Sums of all rows, and of all columns where `columns`; what backward reads, into kept where that is not empty.
void sweep(const FeatureTiles& tiles, const Positives& positives, float scale, float shift, bool online, bool columns,
           Sums& row, Sums& col, at::Tensor& kept) {
  row.reset(tiles.n, online ? -kInfinity : shift);
  col.reset(columns ? tiles.m : 0, online ? -kInfinity : shift);
  const float excluded = online ? std::copysign(kInfinity, -scale) : (shift - 200) / scale;  // its power of two is 0
  const auto buffers = at::empty({tiles.bands, tiles.tile_rows * tiles.tile_cols}, at::kFloat);
  const int64_t stride = tiles.tile_cols;
  for_each_tile(tiles, [&](const Tile& tile) {
    float* dots = buffers.mutable_data_ptr<float>() + tile.band * tiles.tile_rows * stride;
    const KeptTile place(tiles, tile);
    float* out = kept.numel() ? kept.mutable_data_ptr<float>() + place.first : dots;
    const int64_t out_stride = kept.numel() ? place.stride : stride;
    tiles.dot(tile, dots);
    if (positives.grouped())
      VLMFAST_KERNELS(tile).sum_matches(dots, stride, tile.rows, tile.cols, positives.rows(tile.row),
                                        positives.cols(tile.col), row.positive.data() + tile.row,
                                        columns ? col.positive.data() + tile.col : nullptr);
    else
      positives.for_each_label(tile, [&](int64_t r, int64_t c) {
        row.positive[tile.row + r] = dots[r * stride + c];
        if (columns) col.positive[tile.col + c] = dots[r * stride + c];
        dots[r * stride + c] = excluded;
      });
    double *row_sum = row.sum.data() + tile.row, *col_sum = columns ? col.sum.data() + tile.col : nullptr;
    if (online) {
      kernels().online_sums(dots, stride, tile.rows, tile.cols, scale, row.shift.data() + tile.row, row_sum,
                            columns ? col.shift.data() + tile.col : nullptr, col_sum);
      if (kept.numel()) copy_tile(tile.rows, tile.cols, dots, stride, out, out_stride);
    } else {
      kernels().exp_sums(dots, stride, tile.rows, tile.cols, scale, shift, row_sum, col_sum, out, out_stride);
    }
  });
  if (online)  // where there are no negatives, any finite shift
    for (Sums* side : {&row, &col})
      for (float& u : side->shift) u = u == -kInfinity ? 0.0f : u;
}

// One side's shift, factor and target from a (3, count) tensor, at its first entry.
struct Side {
  at::Tensor values;
  explicit Side(const at::Tensor& side) : values(side.contiguous()) {}
  cpu::SoftmaxSide at(int64_t first) const {
    const float* data = values.const_data_ptr<float>();
    return {data + first, data + values.size(1) + first, data + 2 * values.size(1) + first};
  }
};

// One side's gradient (rows, D) in the dtype of its features, `factor` times its sums, or (0,) where it is not wanted; float32
// sums become it in place. And the sum of sums * features, where that is.
struct Gradient {
  at::Tensor value;
  double product = 0.0;

  Gradient(const at::Tensor& sums, const at::Tensor& features_, float factor, bool wanted, bool with_product) {
    constexpr int64_t block = 8;  // rows at a time, which stay in the first-level cache
    const auto features = features_.contiguous();
    const int64_t rows = sums.size(0), dim = sums.size(1);
    const bool wide = features.scalar_type() == at::kFloat, bf16 = features.scalar_type() == at::kBFloat16;
    value = !wanted ? at::empty({0}, features.options()) : wide ? sums : at::empty_like(features);
    auto* out = wanted ? value.mutable_data_ptr() : nullptr;
    const auto* in = features.const_data_ptr();
    float* from = sums.mutable_data_ptr<float>();
    const auto& kernels = VLMFAST_KERNELS(tile);
    std::vector<double> parts(ceil_div(rows, block));
    at::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> widened(wide ? 0 : block * dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * block * dim, count = std::min(block * dim, rows * dim - first);
        if (with_product) {
          if (!wide) kernels.widen(static_cast<const uint16_t*>(in) + first, count, bf16, 1, count, widened.data(), count);
          parts[i] = kernels.dot(from + first, wide ? static_cast<const float*>(in) + first : widened.data(), count);
        }
        if (!wanted) continue;
        float* scaled = wide ? from + first : widened.data();
        kernels.scale(from + first, count, factor, scaled);
        if (!wide) kernels.narrow(scaled, count, bf16, 1, count, static_cast<uint16_t*>(out) + first, count);
      }
    });
    product = std::accumulate(parts.begin(), parts.end(), 0.0);
  }
};

// Of the losses of one side: their weights, and with groups the number of positives of each, else none.
struct SideWeights {
  std::vector<double> weight, positives;
};

// Weights relative to unit.
struct Weights {
  SideWeights rows, cols;
  double unit;
};

Weights weights_of_labels(int64_t n, int64_t m, const std::optional<at::Tensor>& row_mask, int64_t label_offset,
                          bool bidirectional) {
  const auto mask = row_mask ? row_mask->contiguous() : at::Tensor();
  const double share = bidirectional ? 0.5 : 1.0;
  std::vector<double> rows(n, share), cols(bidirectional ? m : 0, 0.0);
  for (int64_t i = 0; row_mask && i < n; ++i) rows[i] *= mask.const_data_ptr<bool>()[i];
  if (bidirectional) std::copy(rows.begin(), rows.end(), cols.begin() + label_offset);
  const auto having = std::count_if(rows.begin(), rows.end(), [](double weight) { return weight > 0.0; });
  return {{rows, {}}, {cols, {}}, 1.0 / double(std::max<int64_t>(having, 1))};
}

// How many of `among` equal each code; none of a row's that is -1. Codes are less than their number of columns.
std::vector<double> count_matches(const at::Tensor& codes_, const at::Tensor& among_, int64_t columns) {
  const auto codes = codes_.contiguous(), among = among_.contiguous();
  std::vector<double> counts(columns, 0.0), found(codes.numel(), 0.0);
  for (int64_t j = 0; j < among.numel(); ++j)
    if (const int32_t code = among.const_data_ptr<int32_t>()[j]; code >= 0) counts[code] += 1.0;
  for (int64_t i = 0; i < codes.numel(); ++i)
    if (const int32_t code = codes.const_data_ptr<int32_t>()[i]; code >= 0) found[i] = counts[code];
  return found;
}

Weights grouped_weights(const at::Tensor& row_codes, const at::Tensor& col_codes, bool bidirectional) {
  const int64_t columns = col_codes.numel();
  Weights weights = {{{}, count_matches(row_codes, col_codes, columns)}, {{}, count_matches(col_codes, row_codes, columns)}, 0.0};
  const auto having = [](const SideWeights& side) {
    const auto count = std::count_if(side.positives.begin(), side.positives.end(), [](double count) { return count > 0.0; });
    return double(std::max<int64_t>(count, 1));
  };
  const double rows = having(weights.rows), cols = having(weights.cols), share = bidirectional ? 0.5 : 1.0;
  // Of the side with fewer losses, so that no weight is above 1, as on other backends.
  const double fewer = bidirectional ? std::min(rows, cols) : rows;
  for (const double count : weights.rows.positives) weights.rows.weight.push_back(count > 0.0 ? share * (fewer / rows) : 0.0);
  for (const double count : weights.cols.positives) weights.cols.weight.push_back(count > 0.0 ? share * (fewer / cols) : 0.0);
  weights.unit = 1.0 / fewer;
  return weights;
}

// What is beyond float32 is infinity, where at::scalar_tensor would raise.
at::Tensor float_scalar(double value) {
  const auto out = at::empty({}, at::kFloat);
  *out.mutable_data_ptr<float>() = float(value);
  return out;
}

// Of one side's stats (3, n): the sum of its losses and its shift, factor and target (3, n).
std::pair<double, at::Tensor> normalised(const at::Tensor& stats_, const SideWeights& side_weights, const at::Tensor& scale,
                                         bool exclude_positive) {
  const auto& [weights, positives] = side_weights;
  constexpr int64_t block = 256;  // entries whose losses are added at a time, by any number of threads the same
  const auto stats = stats_.contiguous();
  const int64_t n = stats.size(1);
  const auto side = at::empty({3, n}, at::kFloat);
  const float *shift = stats.const_data_ptr<float>(), *total = shift + n, *dot = total + n;
  const double scale2 = scale.item<double>() * kLog2e;
  float *out = side.mutable_data_ptr<float>(), *factor = out + n, *target = factor + n;
  std::vector<double> losses(ceil_div(n, block));
  at::parallel_for(0, losses.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * block; i < std::min(n, end * block); ++i) {
      const double share = weights[i], z = total[i], log_total = std::log2(z) + shift[i], positive = dot[i] * scale2;
      double value, kept = share;  // kept: what the positive leaves to the others
      if (!positives.empty()) {
        const double each = std::max(positives[i], 1.0);
        value = (log_total - positive / each) / kLog2e;
        factor[i] = float(share / z);
        kept /= each;
      } else {
        const double ratio = (log_total - positive) / kLog2e;  // of all negatives to the positive, natural logarithm
        const double e = std::exp(-std::abs(ratio));
        value = exclude_positive ? ratio : std::max(ratio, 0.0) + std::log1p(e);
        if (!exclude_positive) kept *= (ratio < 0.0 ? e : 1.0) / (1.0 + e);
        factor[i] = z == 0.0 ? 0.0f : float(kept / z);
      }
      out[i] = shift[i];
      target[i] = float(kept);
      if (share != 0.0) losses[i / block] += share * value;
    }
  });
  return {std::accumulate(losses.begin(), losses.end(), 0.0), side};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_tile_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const std::optional<at::Tensor>& row_codes,
    const std::optional<at::Tensor>& col_codes, int64_t label_offset, bool columns, bool keep) {
  const FeatureTiles tiles(image, text, true, false, false);
  const Positives positives(label_offset, row_codes, col_codes);
  const float scale2 = base2_scale(scale);
  static HeldBuffers exponentials(1);
  auto kept = keep ? exponentials.take({tiles.n, tiles.m}, at::kFloat, true) : at::empty({0, 0}, at::kFloat);
  Sums row, col;
  // Unit-norm features have logits in [-s, s]: a shift 70 below the top leaves room for the sums above it.
  float shift = std::rint(std::abs(scale2) - float(70 * kLog2e));
  bool online = !(std::abs(shift) < 0x1p20f);
  if (!online) {
    sweep(tiles, positives, scale2, shift, false, columns, row, col, kept);
    online = !row.in_range(!positives.grouped() && tiles.m == 1) || !col.in_range(!positives.grouped() && tiles.n == 1);
  }
  if (online) {
    shift = kInfinity;
    sweep(tiles, positives, scale2, shift, true, columns, row, col, kept);
  }
  return {row.stacked(), col.stacked(), float_scalar(shift), kept};
}

std::tuple<at::Tensor, at::Tensor> info_nce_normalise(const at::Tensor& stats, const at::Tensor& weight,
                                                      const std::optional<at::Tensor>& count, const at::Tensor& scale,
                                                      bool exclude_positive) {
  const auto values = [](const at::Tensor& t) {
    const auto numbers = t.to(at::kDouble).contiguous();
    return std::vector<double>(numbers.const_data_ptr<double>(), numbers.const_data_ptr<double>() + numbers.numel());
  };
  const auto [loss, side] =
      normalised(stats, {values(weight), count ? values(*count) : std::vector<double>()}, scale, exclude_positive);
  return {at::scalar_tensor(loss, at::kDouble), side};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const std::optional<at::Tensor>& row_mask,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool bidirectional, bool exclude_positive, bool keep) {
  const auto [row_stats, col_stats, shift, kept] =
      info_nce_tile_forward(image, text, scale, row_codes, col_codes, label_offset, bidirectional, keep);
  const int64_t n = image.size(0), m = text.size(0);
  const Weights weights = row_codes ? grouped_weights(*row_codes, *col_codes, bidirectional)
                                    : weights_of_labels(n, m, row_mask, label_offset, bidirectional);
  const auto [row_loss, rows] = normalised(row_stats, weights.rows, scale, exclude_positive);
  if (!bidirectional)
    return {float_scalar(row_loss * weights.unit), rows, at::zeros({3, m}, at::kFloat), shift, kept, float_scalar(weights.unit)};
  const auto [col_loss, cols] = normalised(col_stats, weights.cols, scale, exclude_positive);
  return {float_scalar((row_loss + col_loss) * weights.unit), rows, cols, shift, kept, float_scalar(weights.unit)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(
    const at::Tensor& unit, const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale,
    const at::Tensor& rows, const at::Tensor& cols, const at::Tensor& shift, const at::Tensor& kept,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool image_grad, bool text_grad) {
  const bool recompute = kept.numel() == 0;
  // The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
  const bool image_sum = image_grad || !text_grad;
  const FeatureTiles tiles(image, text, recompute, image_sum, text_grad);
  const Positives positives(label_offset, row_codes, col_codes);
  const Side row_side(rows), col_side(cols);
  const float scale2 = base2_scale(scale), one_shift = shift.item<float>();
  const bool online = std::isinf(one_shift);

  const bool returned = image.scalar_type() == at::kFloat;  // else a rounded copy is
  auto d_image = gradient_sums(image_sum ? tiles.n : 0, tiles.dim, returned);
  auto d_text = gradient_sums(text_grad ? tiles.m : 0, tiles.dim, returned);
  float* d_image_data = image_sum ? d_image.mutable_data_ptr<float>() : nullptr;
  float* d_text_data = text_grad ? d_text.mutable_data_ptr<float>() : nullptr;
  const auto buffers = at::empty({tiles.bands, 2, tiles.tile_rows * tiles.tile_cols}, at::kFloat);
  const int64_t stride = tiles.tile_cols, size = tiles.tile_rows * stride;
  for_each_tile(tiles, [&](const Tile& tile) {
    float *values = buffers.mutable_data_ptr<float>() + tile.band * 2 * size, *scratch = values + size;
    const KeptTile place(tiles, tile);
    const float* source = recompute ? values : kept.const_data_ptr<float>() + place.first;
    const int64_t source_stride = recompute ? stride : place.stride;
    const auto row = row_side.at(tile.row), col = col_side.at(tile.col);
    if (recompute) tiles.dot(tile, values);
    if (online)
      kernels().gradient_two_shifts(source, source_stride, tile.rows, tile.cols, scale2, row, col, values, stride);
    else if (recompute)
      kernels().gradient_from_dot(values, stride, tile.rows, tile.cols, scale2, one_shift, row, col);
    else
      kernels().gradient_from_exp(source, source_stride, tile.rows, tile.cols, row, col, values, stride);
    if (positives.grouped())
      kernels().subtract_matches(values, stride, tile.rows, tile.cols, positives.rows(tile.row), positives.cols(tile.col),
                                 row, col);
    else
      positives.for_each_label(
          tile, [&](int64_t r, int64_t c) { values[r * stride + c] = -(row.target[r] + col.target[c]); });
    tiles.add_gradients(tile, values, scratch, d_image_data, d_text_data);
  });

  const float one = unit.item<float>(), factor = one * float(scale.item<double>());
  const Gradient of_image(d_image, image, factor, image_grad, image_sum), of_text(d_text, text, factor, text_grad, !image_sum);
  return {of_image.value, of_text.value,
          float_scalar(one * float(of_image.product + of_text.product)).to(scale.scalar_type())};
}

}  // namespace vlmfast
