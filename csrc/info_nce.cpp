// The schedule of info_nce on a CPU: tiles of dot products from a matrix product, one sweep over each while it is in cache,
// and for the gradients two more products with the swept tile. Equations: vlmfast/ops/info_nce.py.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/info_nce.h"
#include "ops.h"
#include "tiles.h"

namespace vlmfast {
namespace {

constexpr int64_t kRows = 128, kCols = 128;
static_assert(kCols <= cpu::kMaxTileCols);
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const cpu::InfoNceKernels& kernels() {
#if defined(__x86_64__)
  static const cpu::InfoNceKernels& chosen = cpu_isa() == "avx512" ? cpu::avx512::info_nce
                                             : cpu_isa() == "avx2" ? cpu::avx2::info_nce
                                                                   : cpu::baseline::info_nce;
  return chosen;
#else
  return cpu::baseline::info_nce;
#endif
}

bool bf16_schedule_forced = false;

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

// The inputs as the tile loop reads them. In float32: image and text, and the text once more in panels (col_tiles, D, kCols),
// the right-hand side of image @ text.T. In bfloat16, where the processor multiplies it, also the forms above.
struct Operands {
  at::Tensor image, text, panels;
  at::Tensor image_bf16, text_pairs, image_rows, text_rows;  // bfloat16
  bool bf16;
  int64_t n, m, dim, row_tiles, col_tiles, bands;
  float scale2;  // s * log2(e)

  Operands(const at::Tensor& image_, const at::Tensor& text_, const at::Tensor& scale, bool with_dot, bool with_gradient)
      : image(image_.to(at::kFloat).contiguous()),
        text(text_.to(at::kFloat).contiguous()),
        bf16(image_.scalar_type() == at::kBFloat16 && (has_bf16_products() || bf16_schedule_forced)),
        n(image.size(0)),
        m(text.size(0)),
        dim(image.size(1)),
        row_tiles(ceil_div(n, kRows)),
        col_tiles(ceil_div(m, kCols)),
        bands(count_bands(row_tiles, col_tiles)),
        scale2(float(scale.item<double>() * kLog2e)) {
    if (bf16) {
      const auto image_tiles = padded_tiles(image_, kRows), text_tiles = padded_tiles(text_, kCols);
      if (with_dot) {
        image_bf16 = image_tiles.contiguous();
        text_pairs = paired_along_dim(text_tiles);
      }
      if (with_gradient) {
        image_rows = paired_along_rows(image_tiles);
        text_rows = paired_along_rows(text_tiles);
      }
      return;
    }
    if (!with_dot) return;
    panels = at::empty({col_tiles, dim, kCols}, image.options());
    at::parallel_for(0, col_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        kernels().transpose(text.const_data_ptr<float>() + j * kCols * dim, dim, cols(j), dim,
                            panels.mutable_data_ptr<float>() + j * kCols * dim, kCols);
    });
  }

  int64_t rows(int64_t i) const { return std::min(kRows, n - i * kRows); }
  int64_t cols(int64_t j) const { return std::min(kCols, m - j * kCols); }
  const float* image_tile(int64_t i) const { return image.const_data_ptr<float>() + i * kRows * dim; }
  const float* text_tile(int64_t j) const { return text.const_data_ptr<float>() + j * kCols * dim; }

  void dot(int64_t i, int64_t j, float* tile) const {
    if (bf16) {
      const int64_t even = dim + dim % 2;
      tile_gemm(rows(i), kCols, even, image_bf16.const_data_ptr<at::BFloat16>() + i * kRows * even, even,
                text_pairs.const_data_ptr<at::BFloat16>() + j * kCols * even, tile, kCols, false);
      return;
    }
    tile_gemm(rows(i), cols(j), dim, image_tile(i), dim, panels.const_data_ptr<float>() + j * kCols * dim, kCols, tile,
              kCols, false);
  }

  // out (out_rows, D) += tile (out_rows, inner) times `inner` rows of features: in float32 those at `features`, in bfloat16
  // the pairs of tile k, with the tile rounded and zeros up to its whole width.
  void accumulate(int64_t out_rows, int64_t inner, float* tile, int64_t width, const float* features,
                  const at::Tensor& pairs, int64_t k, float* out) const {
    if (!bf16) {
      tile_gemm(out_rows, dim, inner, tile, width, features, dim, out, dim, true);
      return;
    }
    // Rounded in place: row i's bfloat16 end before row i + 1's floats begin.
    auto* rounded = reinterpret_cast<at::BFloat16*>(tile);
    kernels().round_to_bf16(tile, width, out_rows, inner, reinterpret_cast<uint16_t*>(rounded), width);
    const int64_t even = dim + dim % 2;
    if (even == dim) {
      tile_gemm(out_rows, dim, width, rounded, width, pairs.const_data_ptr<at::BFloat16>() + k * width * dim, out, dim, true);
      return;
    }
    const auto product = at::empty({out_rows, even}, image.options());
    tile_gemm(out_rows, even, width, rounded, width, pairs.const_data_ptr<at::BFloat16>() + k * width * even,
              product.mutable_data_ptr<float>(), even, false);
    at::from_blob(out, {out_rows, dim}, at::kFloat).add_(product.narrow(1, 0, dim));
  }
};

void copy_rows(int64_t rows, int64_t cols, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, cols, to + i * to_stride);
}

// f(row, col) for the entries of a tile that are somebody's positive, as indices within the tile.
template <class F>
void for_each_positive(int64_t i, int64_t rows, int64_t j, int64_t cols, int64_t label_offset, const F& f) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t c = i * kRows + r + label_offset - j * kCols;
    if (c >= 0 && c < cols) f(r, c);
  }
}

// One exponential 2^(x - shift) serves the row and the column of a logit x when no sum underflows or overflows.
bool in_range(const std::vector<double>& sums) {
  return std::all_of(sums.begin(), sums.end(), [](double z) { return z >= 0x1p-86 && z <= 0x1p126; });
}

// The state of the two softmaxes: sums of 2^(logit - shift), with one shift for all or one per row and column.
struct Sums {
  std::vector<double> row, col;
  std::vector<float> row_shift, col_shift;
};

// row and column sums, the dot product of every positive, and the tiles themselves where kept is not empty.
void sweep(const Operands& ops, int64_t label_offset, bool bidirectional, float shift, bool online, Sums& sums,
           std::vector<float>& positive, at::Tensor& kept) {
  const float start = online ? -kInfinity : shift;
  sums.row.assign(ops.n, 0.0);
  sums.row_shift.assign(ops.n, start);
  sums.col.assign(bidirectional ? ops.m : 0, 0.0);
  sums.col_shift.assign(bidirectional ? ops.m : 0, start);
  const auto tiles = at::empty({ops.bands, kRows, kCols}, ops.image.options());
  for_each_tile(ops.bands, ops.row_tiles, ops.col_tiles, [&](int64_t band, int64_t i, int64_t j) {
    const int64_t rows = ops.rows(i), cols = ops.cols(j);
    float* tile = tiles.mutable_data_ptr<float>() + band * kRows * kCols;
    ops.dot(i, j, tile);
    for_each_positive(i, rows, j, cols, label_offset,
                      [&](int64_t r, int64_t c) { positive[i * kRows + r] = tile[r * kCols + c]; });
    double* row_sum = sums.row.data() + i * kRows;
    double* col_sum = bidirectional ? sums.col.data() + j * kCols : nullptr;
    if (online)
      kernels().online_sums(tile, kCols, rows, cols, ops.scale2, sums.row_shift.data() + i * kRows, row_sum,
                            bidirectional ? sums.col_shift.data() + j * kCols : nullptr, col_sum);
    else
      kernels().exp_sums(tile, kCols, rows, cols, ops.scale2, shift, row_sum, col_sum);
    if (kept.numel())
      copy_rows(rows, cols, tile, kCols, kept.mutable_data_ptr<float>() + i * kRows * ops.m + j * kCols, ops.m);
  });
}

at::Tensor stack_stats(const std::vector<float>& shift, const std::vector<double>& sum) {
  const int64_t count = int64_t(sum.size());
  auto stats = at::empty({2, count}, at::kFloat);
  float* out = stats.mutable_data_ptr<float>();
  std::copy(shift.begin(), shift.end(), out);
  std::copy(sum.begin(), sum.end(), out + count);
  return stats;
}

// weight / sum per entry: the factor that turns 2^(logit - shift) into a weighted probability.
std::vector<float> factors(const at::Tensor& stats, float weight) {
  const float* sum = stats.const_data_ptr<float>() + stats.size(1);
  std::vector<float> out(stats.size(1));
  for (size_t k = 0; k < out.size(); ++k) out[k] = weight / sum[k];
  return out;
}

}  // namespace

std::string cpu_isa() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) return "avx512";
  if (capability == "AVX2") return "avx2";
#endif
  return "baseline";
}

void force_bf16_schedule(bool force) { bf16_schedule_forced = force; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, int64_t label_offset, bool bidirectional,
    bool keep) {
  const Operands ops(image, text, scale, true, false);
  auto kept = keep ? at::empty({ops.n, ops.m}, ops.image.options()) : at::empty({0, 0}, ops.image.options());
  std::vector<float> positive(ops.n);
  Sums sums;
  // Unit-norm features have logits in [-s, s]: a shift 70 below the top leaves room for the sums above it.
  float shift = std::rint(std::abs(ops.scale2) - float(70 * kLog2e));
  bool online = !(std::abs(shift) < 0x1p20f);
  if (!online) {
    sweep(ops, label_offset, bidirectional, shift, false, sums, positive, kept);
    online = !in_range(sums.row) || !in_range(sums.col);
  }
  if (online) {
    shift = kInfinity;
    sweep(ops, label_offset, bidirectional, shift, true, sums, positive, kept);
  }

  double total = 0.0;
  for (int64_t i = 0; i < ops.n; ++i) {
    const double logit = double(positive[i]) * ops.scale2;
    double log2_ratio = std::log2(sums.row[i]) + sums.row_shift[i] - logit;
    if (bidirectional) {
      const int64_t j = i + label_offset;
      log2_ratio = (log2_ratio + std::log2(sums.col[j]) + sums.col_shift[j] - logit) / 2;
    }
    total += log2_ratio;
  }
  return {at::scalar_tensor(total * kLn2 / ops.n, at::kFloat), stack_stats(sums.row_shift, sums.row),
          stack_stats(sums.col_shift, sums.col), at::scalar_tensor(shift, at::kFloat), kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(
    const at::Tensor& grad, const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale,
    const at::Tensor& row_stats, const at::Tensor& col_stats, const at::Tensor& shift, const at::Tensor& kept,
    int64_t label_offset, bool bidirectional, bool image_grad, bool text_grad) {
  const bool recompute = kept.numel() == 0;
  const Operands ops(image, text, scale, recompute, true);
  const float one_shift = shift.item<float>();
  const bool online = std::isinf(one_shift);
  // The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
  const bool image_sum = image_grad || !text_grad;

  const auto row_factor = factors(row_stats, bidirectional ? 0.5f : 1.0f);
  std::vector<float> col_factor(ops.m, 0.0f), col_shift(ops.m, kInfinity);
  if (bidirectional) {  // columns that are nobody's positive are in no column-wise softmax
    const auto factor = factors(col_stats, 0.5f);
    for (int64_t j = label_offset; j < label_offset + ops.n; ++j) {
      col_factor[j] = factor[j];
      col_shift[j] = col_stats.const_data_ptr<float>()[j];
    }
  }

  auto d_image = at::zeros({image_sum ? ops.n : 0, ops.dim}, ops.image.options());
  auto d_text = at::zeros({text_grad ? ops.m : 0, ops.dim}, ops.image.options());
  const auto tiles = at::empty({ops.bands, 2, kRows, kCols}, ops.image.options());
  for_each_tile(ops.bands, ops.row_tiles, ops.col_tiles, [&](int64_t band, int64_t i, int64_t j) {
    const int64_t rows = ops.rows(i), cols = ops.cols(j);
    float* tile = tiles.mutable_data_ptr<float>() + band * 2 * kRows * kCols;
    float* transposed = tile + kRows * kCols;
    if (recompute)
      ops.dot(i, j, tile);
    else
      copy_rows(rows, cols, kept.const_data_ptr<float>() + i * kRows * ops.m + j * kCols, ops.m, tile, kCols);
    const float* row = row_factor.data() + i * kRows;
    const float* col = col_factor.data() + j * kCols;
    if (online)
      kernels().gradient_two_shifts(tile, kCols, rows, cols, ops.scale2, row_stats.const_data_ptr<float>() + i * kRows,
                                    row, col_shift.data() + j * kCols, col);
    else if (recompute)
      kernels().gradient_from_dot(tile, kCols, rows, cols, ops.scale2, one_shift, row, col);
    else
      kernels().gradient_from_exp(tile, kCols, rows, cols, row, col);
    // Before any rounding: on a saturated batch p - 1 is the whole gradient.
    for_each_positive(i, rows, j, cols, label_offset, [&](int64_t r, int64_t c) { tile[r * kCols + c] -= 1.0f; });
    if (text_grad) {
      kernels().transpose(tile, kCols, rows, cols, transposed, kRows);
      ops.accumulate(cols, rows, transposed, kRows, ops.image_tile(i), ops.image_rows, i,
                     d_text.mutable_data_ptr<float>() + j * kCols * ops.dim);
    }
    if (image_sum)
      ops.accumulate(rows, cols, tile, kCols, ops.text_tile(j), ops.text_rows, j,
                     d_image.mutable_data_ptr<float>() + i * kRows * ops.dim);
  });

  const auto unit = grad.to(at::kFloat).div(ops.n);
  const at::Tensor &d = image_sum ? d_image : d_text, &features = image_sum ? ops.image : ops.text;
  const auto d_scale = unit.mul(kernels().dot(d.const_data_ptr<float>(), features.const_data_ptr<float>(), d.numel()));
  const auto factor = unit.mul(scale.to(at::kFloat));
  const auto finish = [&](at::Tensor& gradient, bool wanted, const at::Tensor& like) {
    return wanted ? gradient.mul_(factor).to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {finish(d_image, image_grad, image), finish(d_text, text_grad, text), d_scale.to(scale.scalar_type())};
}

}  // namespace vlmfast
