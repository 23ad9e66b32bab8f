#include "tiles.h"

#include <ATen/Functions.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "held_buffers.h"

namespace vlmfast {

namespace {

// A tensor for features in another layout. A call makes at most five: panels and, for int16, the features of both sides, and
// for their gradients the rows of both sides in pairs. They are of about one size, and all are held for the next call.
at::Tensor layout(at::IntArrayRef sizes, at::ScalarType dtype) {
  static HeldBuffers held(5);
  return held.take(sizes, dtype, false);
}

// (rows, D) with a 0 after each row where D is odd.
at::Tensor in_pairs(const at::Tensor& features) {
  return features.size(1) % 2 ? at::constant_pad_nd(features, {0, 1}) : features.contiguous();
}

// What a tensor of pairs of 16 bits, or a panel of them, holds.
template <class T>
const T* halves(const float* pairs) {
  return reinterpret_cast<const T*>(pairs);
}

const cpu::TileKernels& kernels() { return VLMFAST_KERNELS(tile); }

int64_t even(int64_t count) { return count + count % 2; }

// rows (n, k), float32 or 16 bits in an even k, as right-hand sides of products over k: panels of `cols` columns, (n / cols, k or
// k / 2, cols), those after the last row being 0.
at::Tensor column_panels(const at::Tensor& rows_, int64_t cols) {
  const auto rows = rows_.contiguous();
  const int64_t n = rows.size(0), k = rows.size(1) * rows.element_size() / int64_t(sizeof(float)), count = ceil_div(n, cols);
  const auto out = layout({count, k, cols}, at::kFloat);
  const auto* in = static_cast<const float*>(rows.const_data_ptr());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float* panel = out.mutable_data_ptr<float>() + j * cols * k;
      const int64_t columns = std::min(cols, n - j * cols);
      if (columns < cols) std::fill_n(panel, k * cols, 0.0f);
      kernels().transpose(in + j * cols * k, k, columns, k, panel, cols);
    }
  });
  return out;
}

// rows (n, k) of 16 bits as a right-hand side of products over n: (n / 2, k) pairs, a 0 after an odd number of rows.
at::Tensor row_pairs(const at::Tensor& rows_) {
  const auto rows = rows_.contiguous(), zeros = at::zeros({rows.size(1)}, rows.options());
  const int64_t n = rows.size(0), k = rows.size(1), pairs = ceil_div(n, 2);
  const auto out = layout({pairs, k}, at::kFloat);
  const auto *in = static_cast<const uint16_t*>(rows.const_data_ptr()),
             *none = static_cast<const uint16_t*>(zeros.const_data_ptr());
  auto* first = reinterpret_cast<uint16_t*>(out.mutable_data_ptr<float>());
  at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().interleave(in + 2 * i * k, 2 * i + 1 < n ? in + (2 * i + 1) * k : none, k, first + 2 * i * k);
  });
  return out;
}

// Features of 16 bits as int16, and the step of each row.
std::pair<at::Tensor, at::Tensor> fixed_point(const at::Tensor& features) {
  const auto rows = features.contiguous();
  const int64_t count = rows.size(0), dim = rows.size(1);
  auto values = layout({count, dim}, at::kShort), steps = at::empty({count}, at::kFloat);
  at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    kernels().fixed_point(static_cast<const uint16_t*>(rows.const_data_ptr()) + begin * dim, dim,
                          rows.scalar_type() == at::kBFloat16, end - begin, dim,
                          values.mutable_data_ptr<int16_t>() + begin * dim, dim, steps.mutable_data_ptr<float>() + begin);
  });
  return {values, steps};
}

// How long, in steps, something may be whose product with columns of any kMaxTile rows of `values` is still an int32.
float limit_beside(const at::Tensor& values) {
  const int64_t rows = values.size(0), dim = values.size(1), blocks = ceil_div(rows, cpu::kMaxTile);
  auto squares = at::zeros({blocks + 1, dim}, at::kFloat);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * cpu::kMaxTile; i < std::min(rows, end * cpu::kMaxTile); ++i) {
      const int16_t* row = values.const_data_ptr<int16_t>() + i * dim;
      float* sums = squares.mutable_data_ptr<float>() + i / cpu::kMaxTile * dim;
      for (int64_t k = 0; k < dim; ++k) sums[k] += float(row[k]) * float(row[k]);
    }
  });
  // Any kMaxTile rows lie in two blocks.
  const float most = at::add(squares.narrow(0, 0, blocks), squares.narrow(0, 1, blocks)).max().item<float>();
  return std::min(cpu::kMostSteps, 2.1e9f / std::sqrt(std::max(most, 1.0f)));
}

}  // namespace

FeatureTiles::FeatureTiles(const at::Tensor& image, const at::Tensor& text, bool with_dot, bool image_grad, bool text_grad,
                           TileOrder order)
    : n(image.size(0)),
      m(text.size(0)),
      dim(image.size(1)),
      order(order),
      operands_(image.scalar_type() == at::kFloat                                ? kFloat32
                : image.scalar_type() == at::kBFloat16 && wants_bf16_schedule() ? kBFloat16
                : wants_int16_schedule()                                        ? kInt16
                                                                                : kFloat32) {
  int64_t most_bands = std::min(int64_t(at::get_num_threads()), ceil_div(n, 64));
  copies = 1;
  if (order == TileOrder::kByRows) {
    constexpr int64_t budget = 64 << 20;  // bytes of all copies, where fewer do as well
    const int64_t fewest = ceil_div(most_bands, ceil_div(m, kCols)), in_budget = budget / (4 * m * dim);
    blocks = ceil_div(most_bands, std::clamp(in_budget, fewest, most_bands));
    copies = most_bands / blocks;
    most_bands = copies * blocks;
  }
  most_bands = std::min(most_bands, copies * ceil_div(m, kCols));
  band_rows = even(ceil_div(n, most_bands));
  bands = ceil_div(n, band_rows);
  if (order == TileOrder::kSquare) blocks = bands;
  tile_rows = equal_steps(band_rows);
  // The columns of the widest band, which the others wait for.
  const auto widest = [&](int64_t cols) { return std::min(m, ceil_div(ceil_div(m, cols), blocks) * cols); };
  tile_cols = widest(kMostCols) > widest(kCols) ? kCols : kMostCols;
  if (operands_ == kFloat32) {
    image_ = image.to(at::kFloat).contiguous();
    text_ = text.to(at::kFloat).contiguous();
    if (with_dot) panels_ = column_panels(text_, tile_cols);
    return;
  }
  auto rows = image, cols = text;
  if (operands_ == kInt16) {
    if (with_dot || text_grad) std::tie(rows, image_steps_) = fixed_point(image);
    if (with_dot || image_grad) std::tie(cols, text_steps_) = fixed_point(text);
    if (image_grad) text_limit_ = limit_beside(cols);
    if (text_grad) image_limit_ = limit_beside(rows);
  }
  if (with_dot) {
    image_ = in_pairs(rows);
    panels_ = column_panels(in_pairs(cols), tile_cols);
  }
  if (image_grad) text_row_pairs_ = row_pairs(cols);
  if (!text_grad) return;
  // A band that goes over all columns at once needs pairs of few rows at a time: not a copy of all.
  pairs_by_band_ = operands_ == kBFloat16 && order == TileOrder::kByRows && blocks == 1;
  if (pairs_by_band_) image_ = image_.defined() ? image_ : in_pairs(rows);
  image_row_pairs_ = pairs_by_band_ ? at::empty({bands, tile_rows / 2, dim}, at::kFloat) : row_pairs(rows);
}

at::Tensor gradient_sums(int64_t rows, int64_t dim, bool returned) {
  static HeldBuffers held(2);
  return rows ? held.take({rows, dim}, at::kFloat, !returned) : at::empty({0, dim}, at::kFloat);
}

void FeatureTiles::dot(const Tile& tile, float* out) const {
  const int64_t depth = operands_ == kFloat32 ? dim : even(dim), row = tile.row * depth;
  const float* panel = panels_.const_data_ptr<float>() + tile.col * panels_.size(1);
  switch (operands_) {
    case kFloat32:
      return tile_gemm(tile.rows, tile.cols, depth, image_.const_data_ptr<float>() + row, depth, panel, tile_cols, out,
                       tile_cols, false);
    case kBFloat16:
      return tile_gemm(tile.rows, tile.cols, depth, image_.const_data_ptr<at::BFloat16>() + row, depth,
                       halves<at::BFloat16>(panel), tile_cols, out, tile_cols, false);
    case kInt16:
      return tile_gemm(tile.rows, tile.cols, depth, image_.const_data_ptr<int16_t>() + row, depth,
                       halves<int16_t>(panel), tile_cols, out, tile_cols, false,
                       image_steps_.const_data_ptr<float>() + tile.row, text_steps_.const_data_ptr<float>() + tile.col);
  }
}

void FeatureTiles::add_gradients(const Tile& tile, const float* values, float* scratch, float* d_image, float* d_text) const {
  add_to_rows(tile, values, scratch, d_image ? d_image + tile.row * dim : nullptr,
              d_text ? d_text + tile.col * dim : nullptr);
}

void FeatureTiles::add_to_rows(const Tile& tile, const float* values, float* scratch, float* image_rows,
                               float* text_rows) const {
  // Products of 16 bits go over pairs; the second of the last pair may be none, and what stands there must be finite: 0, or what
  // another product has left.
  if (operands_ != kFloat32 && tile.cols % 2) std::fill_n(scratch, tile_rows * tile_cols, 0.0f);
  switch (operands_) {
    case kFloat32:
      return add_float32(tile, values, image_rows, text_rows);
    case kBFloat16:
      return add_bfloat16(tile, values, scratch, image_rows, text_rows);
    case kInt16:
      return add_int16(tile, values, scratch, image_rows, text_rows);
  }
}

const float* FeatureTiles::image_pairs(const Tile& tile) const {
  if (!pairs_by_band_) return image_row_pairs_.const_data_ptr<float>() + tile.row / 2 * dim;
  float* pairs = image_row_pairs_.mutable_data_ptr<float>() + tile.band * (tile_rows / 2) * dim;
  if (!tile.first_of_rows) return pairs;
  const int64_t stride = image_.size(1);
  const auto* rows = static_cast<const uint16_t*>(image_.const_data_ptr()) + tile.row * stride;
  const std::vector<uint16_t> zeros(tile.rows % 2 ? dim : 0);
  for (int64_t i = 0; i < tile.rows; i += 2)
    kernels().interleave(rows + i * stride, i + 1 < tile.rows ? rows + (i + 1) * stride : zeros.data(), dim,
                         reinterpret_cast<uint16_t*>(pairs + i / 2 * dim));
  return pairs;
}

void FeatureTiles::add_float32(const Tile& tile, const float* values, float* image_rows, float* text_rows) const {
  if (text_rows)
    transposed_gemm(tile.cols, dim, tile.rows, values, tile_cols, image_.const_data_ptr<float>() + tile.row * dim, dim,
                    text_rows, dim, !tile.first_of_cols);
  if (image_rows)
    tile_gemm(tile.rows, dim, tile.cols, values, tile_cols, text_.const_data_ptr<float>() + tile.col * dim, dim,
              image_rows, dim, !tile.first_of_rows);
}

void FeatureTiles::add_bfloat16(const Tile& tile, const float* values, float* scratch, float* image_rows,
                                float* text_rows) const {
  auto* rounded = reinterpret_cast<at::BFloat16*>(scratch);
  if (text_rows) {
    const auto* right = halves<at::BFloat16>(image_pairs(tile));
    kernels().pair_rows(values, tile_cols, tile.rows, tile.cols, scratch, tile_cols);
    transposed_gemm(tile.cols, dim, even(tile.rows), rounded, tile_cols, right, dim, text_rows, dim, !tile.first_of_cols);
  }
  if (image_rows) {
    const auto* right = halves<at::BFloat16>(text_row_pairs_.const_data_ptr<float>()) + tile.col * dim;
    kernels().narrow(values, tile_cols, true, tile.rows, tile.cols, reinterpret_cast<uint16_t*>(rounded), tile_cols);
    tile_gemm(tile.rows, dim, even(tile.cols), rounded, tile_cols, right, dim, image_rows, dim, !tile.first_of_rows);
  }
}

void FeatureTiles::add_int16(const Tile& tile, const float* values, float* scratch, float* image_rows,
                             float* text_rows) const {
  auto* counts = reinterpret_cast<int16_t*>(scratch);
  float steps[cpu::kMaxTile];
  if (text_rows) {
    const auto* right = halves<int16_t>(image_pairs(tile));
    kernels().quantise_columns(values, tile_cols, tile.rows, tile.cols, image_steps_.const_data_ptr<float>() + tile.row,
                               image_limit_, scratch, tile_cols, steps);
    transposed_gemm(tile.cols, dim, even(tile.rows), counts, tile_cols, right, dim, text_rows, dim, !tile.first_of_cols, steps,
                    nullptr);
  }
  if (image_rows) {
    const auto* right = halves<int16_t>(text_row_pairs_.const_data_ptr<float>()) + tile.col * dim;
    kernels().quantise_rows(values, tile_cols, tile.rows, tile.cols, text_steps_.const_data_ptr<float>() + tile.col,
                            text_limit_, counts, tile_cols, steps);
    tile_gemm(tile.rows, dim, even(tile.cols), counts, tile_cols, right, dim, image_rows, dim, !tile.first_of_rows, steps,
              nullptr);
  }
}

}  // namespace vlmfast
