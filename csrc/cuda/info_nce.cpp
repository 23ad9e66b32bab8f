// The schedule of info_nce on a GPU: squares of logits by the library, one sweep over each, and for the gradients two more
// products of the library with the swept square. Equations: vlmfast/ops/info_nce.py. What a CPU does tile by tile in cache
// (csrc/info_nce.cpp) the library does here on squares that an L2 cache holds, so the two share no loop.
#include "../../kernels/cuda/info_nce.h"

#include <limits>

#include "chunks.h"

namespace vlmfast::cuda {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kChunk = 4096;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
int64_t chunk_for_tests = 0;

at::Tensor base2_scale(const at::Tensor& scale) { return scale.to(at::kFloat).mul(kLog2e); }

at::Tensor no_stats(int64_t count, const at::TensorOptions& options) {
  auto stats = at::zeros({3, count}, options);
  stats.select(0, 0).fill_(-kInfinity);
  return stats;
}

}  // namespace

void set_chunk(int64_t side) { chunk_for_tests = side; }
int64_t chunk() { return chunk_for_tests ? chunk_for_tests : kChunk; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_tile_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const std::optional<at::Tensor>& row_codes,
    const std::optional<at::Tensor>& col_codes, int64_t label_offset, bool columns, bool keep) {
  const DeviceScope scope(image);
  const Chunks chunks(image, text, row_codes, col_codes, label_offset);
  const auto options = image.options().dtype(at::kFloat);
  const auto scale2 = base2_scale(scale), kept = at::empty({keep ? chunks.n : 0, keep ? chunks.m : 0}, options);
  const auto rows = no_stats(chunks.n, options), cols = no_stats(columns ? chunks.m : 0, options);
  chunks.for_each(kept, keep ? Chunks::Kept::write : Chunks::Kept::none, [&](const Logits& logits) {
    const int64_t row_tiles = ceil_div(logits.rows, kSumRows), col_tiles = ceil_div(logits.cols, kSumCols);
    const auto row_partials = at::empty({3, col_tiles, logits.rows}, options);
    const auto col_partials = at::empty({3, columns ? row_tiles : 0, logits.cols}, options);
    info_nce_tile_sums(logits, scale2.const_data_ptr<float>(), row_partials.mutable_data_ptr<float>(),
                       columns ? col_partials.mutable_data_ptr<float>() : nullptr, scope.stream);
    info_nce_merge(row_partials.const_data_ptr<float>(), col_tiles, logits.rows, rows.mutable_data_ptr<float>(), chunks.n,
                   logits.first_row, scope.stream);
    if (columns)
      info_nce_merge(col_partials.const_data_ptr<float>(), row_tiles, logits.cols, cols.mutable_data_ptr<float>(), chunks.m,
                     logits.first_col, scope.stream);
  });
  for (const auto& stats : {rows, cols}) {  // where there are no negatives, any finite shift
    const auto shift = stats.select(0, 0);
    shift.masked_fill_(shift.isinf(), 0.0);
  }
  return {rows, cols, at::full({}, kInfinity, options), kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(
    const at::Tensor& unit, const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale,
    const at::Tensor& rows_, const at::Tensor& cols_, const at::Tensor& shift, const at::Tensor& kept,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool image_grad, bool text_grad) {
  const DeviceScope scope(image);
  const Chunks chunks(image, text, row_codes, col_codes, label_offset);
  const auto options = image.options().dtype(at::kFloat);
  const auto scale2 = base2_scale(scale), rows = rows_.contiguous(), cols = cols_.contiguous();
  const bool is_kept = kept.numel() > 0;
  // The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
  const bool image_sum = image_grad || !text_grad;
  const auto d_image = image_sum ? at::zeros({chunks.n, chunks.dim}, options) : at::Tensor();
  const auto d_text = text_grad ? at::zeros({chunks.m, chunks.dim}, options) : at::Tensor();
  const Sides sides = {rows.const_data_ptr<float>(), cols.const_data_ptr<float>(), chunks.n, chunks.m};
  chunks.for_each(kept, is_kept ? Chunks::Kept::read : Chunks::Kept::none, [&](const Logits& logits) {
    const auto gradient = at::empty({logits.rows, logits.cols}, options.dtype(chunks.product));
    info_nce_gradient(logits, scale2.const_data_ptr<float>(), sides, is_kept ? shift.const_data_ptr<float>() : nullptr,
                      gradient.mutable_data_ptr(), type_of(chunks.product), scope.stream);
    chunks.add_gradients(logits, gradient, d_image, d_text);
  });
  const auto unscaled = unit.to(at::kFloat).div(chunks.gradient_scale()), factor = unscaled.mul(scale.to(at::kFloat));
  const at::Tensor &d = image_sum ? d_image : d_text, &features = image_sum ? image : text;
  const auto d_scale = d.mul(features.to(at::kFloat)).sum().mul(unscaled).to(scale.scalar_type());
  const auto finish = [&](const at::Tensor& gradient, bool wanted, const at::Tensor& like) {
    return wanted ? gradient.mul(factor).to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {finish(d_image, image_grad, image), finish(d_text, text_grad, text), d_scale};
}

}  // namespace vlmfast::cuda
