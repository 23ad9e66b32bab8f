#include "tiles.h"

#include <ATen/Functions.h>

namespace vlmfast {

namespace {

// (rows, D) as the right-hand sides of tile products in bfloat16: whole tiles of `tile` rows, zeros after the last row, D
// even. Paired along D it is (tiles, D / 2, tile, 2), for products over D; along rows (tiles, tile / 2, D, 2).
at::Tensor padded_tiles(const at::Tensor& features, int64_t tile) {
  const int64_t rows = features.size(0), dim = features.size(1), tiles = ceil_div(rows, tile);
  return at::constant_pad_nd(features, {0, dim % 2, 0, tiles * tile - rows}).reshape({tiles, tile, dim + dim % 2});
}

at::Tensor paired_along_dim(const at::Tensor& tiles) {
  return tiles.view({tiles.size(0), tiles.size(1), -1, 2}).permute({0, 2, 1, 3}).contiguous();
}

at::Tensor paired_along_rows(const at::Tensor& tiles) {
  return tiles.view({tiles.size(0), -1, 2, tiles.size(2)}).permute({0, 1, 3, 2}).contiguous();
}

const cpu::TileKernels& kernels() { return VLMFAST_KERNELS(tile); }

}  // namespace

FeatureTiles::FeatureTiles(const at::Tensor& image_, const at::Tensor& text_, bool with_dot, bool image_grad, bool text_grad)
    : n(image_.size(0)),
      m(text_.size(0)),
      dim(image_.size(1)),
      col_tiles(ceil_div(m, kCols)),
      bands(std::max<int64_t>(1, std::min({int64_t(at::get_num_threads()), ceil_div(n, 64), col_tiles}))),
      step(equal_steps(ceil_div(n, bands))),
      row_tiles(ceil_div(n, step)),
      image(image_.to(at::kFloat).contiguous()),
      text(text_.to(at::kFloat).contiguous()),
      bf16_(image_.scalar_type() == at::kBFloat16 && wants_bf16_schedule()) {
  if (bf16_) {
    const auto image_tiles = padded_tiles(image_, step), text_tiles = padded_tiles(text_, kCols);
    if (with_dot) {
      image_bf16_ = image_tiles.contiguous();
      text_pairs_ = paired_along_dim(text_tiles);
    }
    if (image_grad) text_rows_ = paired_along_rows(text_tiles);
    if (text_grad) image_rows_ = paired_along_rows(image_tiles);
  } else if (with_dot) {
    panels_ = at::empty({col_tiles, dim, kCols}, image.options());
    at::parallel_for(0, col_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        kernels().transpose(text.const_data_ptr<float>() + j * kCols * dim, dim, cols(j), dim,
                            panels_.mutable_data_ptr<float>() + j * kCols * dim, kCols);
    });
  }
}

void FeatureTiles::dot(int64_t i, int64_t j, float* tile) const {
  if (bf16_) {
    const int64_t even = dim + dim % 2;
    tile_gemm(rows(i), kCols, even, image_bf16_.const_data_ptr<at::BFloat16>() + first_row(i) * even, even,
              text_pairs_.const_data_ptr<at::BFloat16>() + j * kCols * even, kCols, tile, kCols, false);
  } else {
    tile_gemm(rows(i), cols(j), dim, image.const_data_ptr<float>() + first_row(i) * dim, dim,
              panels_.const_data_ptr<float>() + j * kCols * dim, kCols, tile, kCols, false);
  }
}

void FeatureTiles::add_gradients(int64_t i, int64_t j, float* tile, float* scratch, float* d_image, float* d_text) const {
  const int64_t height = rows(i), width = cols(j);
  float *image_rows = d_image + first_row(i) * dim, *text_rows = d_text + j * kCols * dim;
  if (!bf16_) {
    if (d_text) {
      kernels().transpose(tile, kCols, height, width, scratch, step);
      tile_gemm(width, dim, height, scratch, step, image.const_data_ptr<float>() + first_row(i) * dim, dim, text_rows, dim,
                true);
    }
    if (d_image)
      tile_gemm(height, dim, width, tile, kCols, text.const_data_ptr<float>() + j * kCols * dim, dim, image_rows, dim,
                true);
    return;
  }
  // Products go over whole tiles, whose features end in zeros; what the tile holds there must be finite.
  auto* rounded = reinterpret_cast<at::BFloat16*>(scratch);
  if (height < step || width < kCols) std::fill_n(scratch, kRows * kCols / 2, 0.0f);
  if (d_text) {
    kernels().transpose_to_bf16(tile, kCols, height, width, reinterpret_cast<uint16_t*>(rounded), step);
    add_product(width, step, rounded, image_rows_, i, text_rows);
  }
  if (height < step || width < kCols) std::fill_n(scratch, kRows * kCols / 2, 0.0f);
  if (d_image) {
    kernels().narrow(tile, kCols, true, height, width, reinterpret_cast<uint16_t*>(rounded), kCols);
    add_product(height, kCols, rounded, text_rows_, j, image_rows);
  }
}

// out (out_rows, D) += tile (out_rows, inner) times tile k of the features that `pairs` holds.
void FeatureTiles::add_product(int64_t out_rows, int64_t inner, const at::BFloat16* tile, const at::Tensor& pairs, int64_t k,
                               float* out) const {
  const int64_t even = dim + dim % 2;
  const auto* features = pairs.const_data_ptr<at::BFloat16>() + k * inner * even;
  if (even == dim) {
    tile_gemm(out_rows, dim, inner, tile, inner, features, dim, out, dim, true);
    return;
  }
  const auto product = at::empty({out_rows, even}, image.options());
  tile_gemm(out_rows, even, inner, tile, inner, features, even, product.mutable_data_ptr<float>(), even, false);
  at::from_blob(out, {out_rows, dim}, at::kFloat).add_(product.narrow(1, 0, dim));
}

}  // namespace vlmfast
