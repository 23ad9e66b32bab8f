#include "tiles.h"

#include <ATen/Functions.h>

namespace vlmfast {

namespace {

// (rows, D) with zeros after them: rows up to a multiple of `multiple`, D up to an even number where `pairs`.
at::Tensor padded(const at::Tensor& features, int64_t multiple, bool pairs) {
  const int64_t rows = features.size(0), more = pairs ? features.size(1) % 2 : 0;
  return at::constant_pad_nd(features, {0, more, 0, ceil_div(rows, multiple) * multiple - rows});
}

// As right-hand sides of products over D: whole tiles of `tile` rows, (tiles, D / 2, tile, 2).
at::Tensor paired_along_dim(const at::Tensor& features, int64_t tile) {
  const auto rows = padded(features, tile, true);
  return rows.reshape({-1, tile, rows.size(1) / 2, 2}).permute({0, 2, 1, 3}).contiguous();
}

// As right-hand sides of products over rows: (rows / 2, D, 2).
at::Tensor paired_along_rows(const at::Tensor& features) {
  const auto rows = padded(features, 2, false);
  return rows.reshape({-1, 2, rows.size(1)}).permute({0, 2, 1}).contiguous();
}

const cpu::TileKernels& kernels() { return VLMFAST_KERNELS(tile); }

int64_t even(int64_t count) { return count + count % 2; }

}  // namespace

FeatureTiles::FeatureTiles(const at::Tensor& image_, const at::Tensor& text_, bool with_dot, bool image_grad, bool text_grad)
    : n(image_.size(0)),
      m(text_.size(0)),
      dim(image_.size(1)),
      image(image_.to(at::kFloat).contiguous()),
      text(text_.to(at::kFloat).contiguous()),
      bf16_(image_.scalar_type() == at::kBFloat16 && wants_bf16_schedule()) {
  const int64_t most_bands = std::min({int64_t(at::get_num_threads()), ceil_div(n, 64), ceil_div(m, kCols)});
  band_rows = even(ceil_div(n, std::max<int64_t>(1, most_bands)));
  bands = ceil_div(n, band_rows);
  tile_rows = equal_steps(band_rows);
  // The columns of the widest band, which the others wait for.
  const auto widest = [&](int64_t cols) { return std::min(m, ceil_div(ceil_div(m, cols), bands) * cols); };
  tile_cols = widest(kMostCols) > widest(kCols) ? kCols : kMostCols;
  if (bf16_) {
    if (with_dot) {
      image_bf16_ = padded(image_, 1, true).contiguous();
      text_bf16_ = paired_along_dim(text_, tile_cols);
    }
    if (image_grad) text_row_pairs_ = paired_along_rows(text_);
    if (text_grad) image_row_pairs_ = paired_along_rows(image_);
  } else if (with_dot) {
    const int64_t count = ceil_div(m, tile_cols);
    panels_ = at::empty({count, dim, tile_cols}, image.options());
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = j * tile_cols;
        kernels().transpose(text.const_data_ptr<float>() + first * dim, dim, std::min(tile_cols, m - first), dim,
                            panels_.mutable_data_ptr<float>() + first * dim, tile_cols);
      }
    });
  }
}

void FeatureTiles::dot(const Tile& tile, float* out) const {
  if (bf16_)
    tile_gemm(tile.rows, tile.cols, even(dim), image_bf16_.const_data_ptr<at::BFloat16>() + tile.row * even(dim), even(dim),
              text_bf16_.const_data_ptr<at::BFloat16>() + tile.col * even(dim), tile_cols, out, tile_cols, false);
  else
    tile_gemm(tile.rows, tile.cols, dim, image.const_data_ptr<float>() + tile.row * dim, dim,
              panels_.const_data_ptr<float>() + tile.col * dim, tile_cols, out, tile_cols, false);
}

void FeatureTiles::add_gradients(const Tile& tile, const float* values, float* scratch, float* d_image, float* d_text) const {
  float *image_rows = d_image + tile.row * dim, *text_rows = d_text + tile.col * dim;
  if (!bf16_) {
    if (d_text)
      transposed_gemm(tile.cols, dim, tile.rows, values, tile_cols, image.const_data_ptr<float>() + tile.row * dim, dim,
                      text_rows, dim, !tile.first_of_cols);
    if (d_image)
      tile_gemm(tile.rows, dim, tile.cols, values, tile_cols, text.const_data_ptr<float>() + tile.col * dim, dim, image_rows,
                dim, !tile.first_of_rows);
    return;
  }
  auto* rounded = reinterpret_cast<at::BFloat16*>(scratch);
  if (d_text) {
    kernels().pair_rows(values, tile_cols, tile.rows, tile.cols, scratch, tile_cols);
    transposed_gemm(tile.cols, dim, even(tile.rows), rounded, tile_cols,
                    image_row_pairs_.const_data_ptr<at::BFloat16>() + tile.row * dim, dim, text_rows, dim,
                    !tile.first_of_cols);
  }
  if (d_image) {
    // Products go over pairs; the second of the last pair may be none, and what stands there must be finite.
    if (tile.cols % 2) std::fill_n(scratch, tile_rows * tile_cols / 2, 0.0f);
    kernels().narrow(values, tile_cols, true, tile.rows, tile.cols, reinterpret_cast<uint16_t*>(rounded), tile_cols);
    tile_gemm(tile.rows, dim, even(tile.cols), rounded, tile_cols,
              text_row_pairs_.const_data_ptr<at::BFloat16>() + tile.col * dim, dim, image_rows, dim, !tile.first_of_rows);
  }
}

}  // namespace vlmfast
