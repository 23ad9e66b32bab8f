// The schedule of patch_embed on a CPU: blocks of patches are read from the pixels into cache, normalised on the way, and
// multiplied there, in both directions. Equations: vlmfast/ops/patch_embed.py.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <numeric>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "held_buffers.h"
#include "ops.h"
#include "patch_rows.h"

namespace vlmfast {
namespace {

constexpr int64_t kWeightRows = 16;  // of the weight or of its gradient that are reordered at a time
static_assert(kCols % kWeightRows == 0);

// weight (O, C, p, q) as right-hand sides of products over the entries of a patch, made up to `even` with zeros: panels of kCols
// columns (O / kCols, even or even / 2, kCols), of which those after the last row hold anything.
template <class Product>
at::Tensor weight_panels(const PatchRows& patches, const at::Tensor& weight, int64_t even) {
  const auto dtype = c10::CppTypeToScalarType<Product>::value;
  const auto given = weight.to(dtype).contiguous();
  const auto* in = given.template const_data_ptr<Product>();
  const int64_t width = weight.size(0), k = even * int64_t(sizeof(Product)) / int64_t(sizeof(float));
  const auto out = at::empty({ceil_div(width, kCols), k, kCols}, at::kFloat);
  at::parallel_for(0, out.size(0) * kCols / kWeightRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<Product> rows(kWeightRows * even);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kWeightRows, count = std::clamp<int64_t>(width - first, 0, kWeightRows);
      for (int64_t r = 0; r < count; ++r)
        patches.from_weight(in + (first + r) * patches.entries, rows.data() + r * even);
      VLMFAST_KERNELS(tile).transpose(reinterpret_cast<const float*>(rows.data()), k, kWeightRows, k,
                                      out.mutable_data_ptr<float>() + first / kCols * kCols * k + first % kCols, kCols);
    }
  });
  return out;
}

// (O, C, p, q) of weight's dtype from sums (splits, O, even) over patches.
at::Tensor weight_from(const PatchRows& patches, const at::Tensor& sums, const at::Tensor& weight) {
  const int64_t splits = sums.size(0), width = sums.size(1), even = sums.size(2), entries = patches.entries;
  const auto out = at::empty(weight.sizes(), weight.scalar_type());
  const auto dtype = weight.scalar_type();
  const auto* in = sums.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr();
  at::parallel_for(0, width, kWeightRows, [&](int64_t begin, int64_t end) {
    std::vector<float> total(entries), ordered(entries);
    for (int64_t row = begin; row < end; ++row) {
      std::copy_n(in + row * even, entries, total.data());
      for (int64_t split = 1; split < splits; ++split)
        patch_embed_kernels().add(in + (split * width + row) * even, entries, total.data());
      if (dtype == at::kFloat) {
        patches.to_weight(total.data(), static_cast<float*>(to) + row * entries);
      } else {
        patches.to_weight(total.data(), ordered.data());
        VLMFAST_KERNELS(tile).narrow(ordered.data(), entries, dtype == at::kBFloat16, 1, entries,
                                     static_cast<uint16_t*>(to) + row * entries, entries);
      }
    }
  });
  return out;
}

// tile (m, kCols) <- rows a (m, k) times a panel of kCols columns.
void product(int64_t m, int64_t k, const float* a, const float* panel, float* tile) {
  tile_gemm(m, kCols, k, a, k, panel, kCols, tile, kCols, false);
}
void product(int64_t m, int64_t k, const at::BFloat16* a, const float* panel, float* tile) {
  tile_gemm(m, kCols, k, a, k, reinterpret_cast<const at::BFloat16*>(panel), kCols, tile, kCols, false);
}

void finish(const float* products, const float* bias, const float* position, int64_t count, float* out) {
  patch_embed_kernels().finish(products, bias, position, count, out);
}
void finish(const float* products, const float* bias, const float* position, int64_t count, at::BFloat16* out) {
  patch_embed_kernels().finish_bf16(products, bias, position, count, reinterpret_cast<uint16_t*>(out));
}

struct Added {
  const float *bias, *position;  // null where there is none
  int64_t position_image, prefix;  // elements from one image's positions to the next one's; prefix tokens
};

// tokens (B, prefix + taken, O), all but the prefix.
template <class Product, class Token>
void embed(const PatchRows& patches, const at::Tensor& weight, const Added& added, const at::Tensor& tokens) {
  const int64_t width = weight.size(0), even = ceil_div(patches.entries, 16) * 16;
  const auto dtype = c10::CppTypeToScalarType<Product>::value;
  const auto right = weight_panels<Product>(patches, weight, even);
  const int64_t panel = right.stride(0);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), ceil_div(patches.rows, 64)));
  const int64_t share = ceil_div(patches.rows, threads), step = equal_steps(share);
  const int64_t all = added.prefix + patches.taken;
  const auto* panels = right.template const_data_ptr<float>();
  auto* to = tokens.template mutable_data_ptr<Token>();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const auto block = at::empty({step, even}, dtype), tile = at::empty({step, kCols}, at::kFloat);
    auto* left = block.template mutable_data_ptr<Product>();
    float* products = tile.template mutable_data_ptr<float>();
    const int64_t last = std::min(patches.rows, end * share);
    for (int64_t first = begin * share; first < last; first += step) {
      const int64_t count = std::min(step, last - first);
      patches.read(first, count, left, even);
      for (int64_t col = 0; col < width; col += kCols) {
        product(count, even, left, panels + col / kCols * panel, products);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t image = (first + r) / patches.taken, token = (first + r) % patches.taken + added.prefix;
          const float* position =
              added.position ? added.position + image * added.position_image +
                                   (patches.patch(first + r) + added.prefix) * width + col
                             : nullptr;
          finish(products + r * kCols, added.bias ? added.bias + col : nullptr, position, std::min(kCols, width - col),
                 to + (image * all + token) * width + col);
        }
      }
    }
    release_thread();
  });
}

// A row of tokens' gradients as float32 or bfloat16; of the same dtype, where it is.
const float* as(const float* row, int64_t, float*) { return row; }
const float* as(const at::BFloat16* row, int64_t count, float* out) {
  VLMFAST_KERNELS(tile).widen(reinterpret_cast<const uint16_t*>(row), count, true, 1, count, out, count);
  return out;
}
const uint16_t* as(const at::BFloat16* row, int64_t, uint16_t*) { return reinterpret_cast<const uint16_t*>(row); }
const uint16_t* as(const float* row, int64_t count, uint16_t* out) {
  patch_embed_kernels().finish_bf16(row, nullptr, nullptr, count, out);
  return out;
}

constexpr int64_t kGradRows = 512;    // patches that are read at a time
constexpr int64_t kGradCols = kRows;  // columns of the tokens' gradients at a time, in whole blocks of cpu/product.cpp
constexpr int64_t kRowsAhead = 16;    // how far ahead rows of gradients are asked for
constexpr int64_t kPairedRows = 4;    // patches that are read before they are paired, which stay in the first-level cache
constexpr int64_t kMostSplits = 8;    // of the sum over patches, each with a gradient of its own in memory

// out (count / 2, stride, 2) <- `count` rows in pairs, row(r) being the first of `cols` entries of one; after an odd number of
// rows comes a 0.
template <class Row>
void pair_rows(const Row& row, int64_t count, int64_t cols, at::BFloat16* out, int64_t stride) {
  uint16_t even[kGradCols], odd[kGradCols];
  const uint16_t zeros[kGradCols] = {};
  for (int64_t r = 0; r < count; r += 2)
    VLMFAST_KERNELS(tile).interleave(as(row(r), cols, even), r + 1 < count ? as(row(r + 1), cols, odd) : zeros, cols,
                                     reinterpret_cast<uint16_t*>(out + r * stride));
}

// out (count / 2, even, 2) <- patches `first` to first + count in pairs; after an odd number of them comes a 0. few (kPairedRows,
// even) is scratch.
void read_pairs(const PatchRows& patches, int64_t first, int64_t count, at::BFloat16* few, at::BFloat16* out, int64_t even) {
  const auto* rows = reinterpret_cast<const uint16_t*>(few);
  for (int64_t r = 0; r < count; r += kPairedRows) {
    const int64_t some = std::min(kPairedRows, count - r);
    patches.read(first + r, some, few, even);
    if (some % 2) std::fill_n(few + some * even, even, at::BFloat16(0));
    for (int64_t i = 0; i < some; i += 2)
      VLMFAST_KERNELS(tile).interleave(rows + i * even, rows + (i + 1) * even, even,
                                       reinterpret_cast<uint16_t*>(out + (r + i) * even));
  }
}

// (O, C, p, q) = grad's rows transposed times the patches. Threads split the sum over patches; beyond kMostSplits of them
// also the rows of the result, whose shares read the same patches again.
template <class Product, class Token>
at::Tensor weight_gradient(const PatchRows& patches, const at::Tensor& weight, const at::Tensor& grad, int64_t prefix) {
  constexpr bool single = std::is_same_v<Product, float>;
  const int64_t width = grad.size(2), even = ceil_div(patches.entries, 16) * 16;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), ceil_div(patches.rows, 64)));
  const int64_t splits = std::min(threads, kMostSplits), groups = std::min(threads / splits, ceil_div(width, kGradCols));
  const int64_t share = ceil_div(patches.rows, splits);
  const int64_t step = 2 * ceil_div(ceil_div(share, ceil_div(share, kGradRows)), 2);
  const auto dtype = c10::CppTypeToScalarType<Product>::value;
  static HeldBuffers held(1);
  const auto sums = held.take({splits, width, even}, at::kFloat, false);
  const auto* rows = grad.const_data_ptr<Token>();
  at::parallel_for(0, splits * groups, 1, [&](int64_t begin, int64_t end) {
    const auto block = at::empty({single ? step : kPairedRows, even}, dtype);
    const auto paired = at::empty({single ? 0 : step, even}, dtype);
    const auto flipped = at::empty({kGradCols, step}, dtype);
    auto* left = flipped.template mutable_data_ptr<Product>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / groups, group = task % groups;
      const int64_t last = std::min(patches.rows, (split + 1) * share);
      const int64_t col_tiles = ceil_div(width, kGradCols);
      for (int64_t first = split * share; first < last; first += step) {
        const int64_t count = std::min(step, last - first);
        const bool accumulate = first > split * share;
        auto* right = block.template mutable_data_ptr<Product>();
        if constexpr (single)
          patches.read(first, count, right, even);
        else
          read_pairs(patches, first, count, right, paired.template mutable_data_ptr<Product>(), even);
        for (int64_t j = col_tiles * group / groups; j < col_tiles * (group + 1) / groups; ++j) {
          const int64_t cols = std::min(kGradCols, width - j * kGradCols);
          const auto row = [&](int64_t r) {
            const int64_t image = (first + r) / patches.taken, token = prefix + (first + r) % patches.taken;
            return rows + (image * grad.size(1) + token) * width + j * kGradCols;
          };
          const auto fetched = [&](int64_t r) {
            if (r + kRowsAhead < count) fetch(row(r + kRowsAhead), cols * sizeof(Token));
            return row(r);
          };
          float* out = sums.mutable_data_ptr<float>() + (split * width + j * kGradCols) * even;
          if constexpr (single) {
            for (int64_t r = 0; r < count; ++r) {
              const float* from = as(fetched(r), cols, left + r * kGradCols);
              if (from != left + r * kGradCols) std::copy_n(from, cols, left + r * kGradCols);
            }
            transposed_gemm(cols, even, count, left, kGradCols, right, even, out, even, accumulate);
          } else {
            pair_rows(fetched, count, cols, left, kGradCols);
            transposed_gemm(cols, even, count + count % 2, left, kGradCols, paired.template const_data_ptr<Product>(), even,
                            out, even, accumulate);
          }
        }
      }
    }
    release_thread();
  });
  return weight_from(patches, sums, weight);
}

void add(const float* in, int64_t count, double* out) { patch_embed_kernels().add_double(in, count, out); }
void add(const at::BFloat16* in, int64_t count, float* out) {
  patch_embed_kernels().add_bf16(reinterpret_cast<const uint16_t*>(in), count, out);
}

// (prefix + patches, O): grad (B, prefix + taken, O) summed over the batch at the patches that it came from, with more bits
// than its own.
template <class Token>
at::Tensor token_gradient(const PatchRows& patches, const at::Tensor& grad, int64_t prefix) {
  constexpr int64_t ahead = 4;
  const int64_t tokens = grad.size(1), count = grad.size(0) * tokens, width = grad.size(2);
  const int64_t rows = prefix + patches.patches;
  const auto row_of = [&](int64_t i) {
    const int64_t image = i / tokens, t = i % tokens;
    return t < prefix ? t : prefix + patches.patch(image * patches.taken + t - prefix);
  };
  // Tokens in the order of their rows: those of row r are the ones from start[r] to start[r + 1].
  std::vector<int64_t> start(rows + 1), order(count);
  for (int64_t i = 0; i < count; ++i) ++start[row_of(i)];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t i = count; i-- > 0;) order[--start[row_of(i)]] = i;
  const auto out = at::empty({rows, width}, at::kFloat);
  const auto* data = grad.const_data_ptr<Token>();
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    std::vector<std::conditional_t<std::is_same_v<Token, float>, double, float>> sums(width);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t i = start[row]; i < start[row + 1]; ++i) {
        if (i + ahead < start[end]) fetch(data + order[i + ahead] * width, width * sizeof(Token));
        add(data + order[i] * width, width, sums.data());
      }
      std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<float>() + row * width);
    }
  });
  return out;
}

}  // namespace

at::Tensor patch_embed_forward(const at::Tensor& pixels, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& position,
                               const std::optional<at::Tensor>& keep, const FloatList& mean, const FloatList& std, bool pad,
                               at::ScalarType product_dtype, at::ScalarType token_dtype) {
  const PatchRows patches(pixels, weight, keep, mean, std, pad);
  const int64_t count = prefix ? prefix->size(0) : 0;
  const bool narrow = token_dtype == at::kBFloat16;
  static HeldBuffers held(2);  // two views of an image, or two sizes in turn
  const auto tokens = held.take({pixels.size(0), count + patches.taken, weight.size(0)},
                                narrow ? at::kBFloat16 : at::kFloat, false);
  const auto biases = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const auto positions = position ? position->to(at::kFloat).contiguous() : at::Tensor();
  const bool shared = !position || positions.dim() == 2;
  const Added added = {bias ? biases.const_data_ptr<float>() : nullptr,
                       position ? positions.const_data_ptr<float>() : nullptr, shared ? 0 : positions.stride(0), count};
  if (prefix) {
    const auto first = prefix->to(at::kFloat);
    tokens.narrow(1, 0, count).copy_(position ? at::add(first, positions.narrow(shared ? 0 : 1, 0, count)) : first);
  }
  if (product_dtype == at::kBFloat16 && wants_bf16_schedule())
    narrow ? embed<at::BFloat16, at::BFloat16>(patches, weight, added, tokens)
           : embed<at::BFloat16, float>(patches, weight, added, tokens);
  else
    narrow ? embed<float, at::BFloat16>(patches, weight, added, tokens)
           : embed<float, float>(patches, weight, added, tokens);
  return tokens.to(token_dtype);
}

std::tuple<at::Tensor, at::Tensor> patch_embed_backward(const at::Tensor& grad_, const at::Tensor& pixels,
                                                        const at::Tensor& weight, const std::optional<at::Tensor>& keep,
                                                        int64_t prefix_tokens, bool weight_grad, bool token_grad,
                                                        const FloatList& mean, const FloatList& std, bool pad,
                                                        at::ScalarType product_dtype, at::ScalarType token_dtype) {
  const PatchRows patches(pixels, weight, keep, mean, std, pad);
  const auto grad = (token_dtype == at::kHalf ? grad_.to(at::kFloat) : grad_).contiguous();
  const bool narrow = grad.scalar_type() == at::kBFloat16;
  auto d_weight = at::empty({0}, at::kFloat), d_tokens = at::empty({0}, at::kFloat);
  if (weight_grad) {
    if (product_dtype == at::kBFloat16 && wants_bf16_schedule())
      d_weight = narrow ? weight_gradient<at::BFloat16, at::BFloat16>(patches, weight, grad, prefix_tokens)
                        : weight_gradient<at::BFloat16, float>(patches, weight, grad, prefix_tokens);
    else
      d_weight = narrow ? weight_gradient<float, at::BFloat16>(patches, weight, grad, prefix_tokens)
                        : weight_gradient<float, float>(patches, weight, grad, prefix_tokens);
  }
  if (token_grad)
    d_tokens = narrow ? token_gradient<at::BFloat16>(patches, grad, prefix_tokens)
                      : token_gradient<float>(patches, grad, prefix_tokens);
  return {d_weight, d_tokens};
}

}  // namespace vlmfast
