// The schedule of patch_embed on a GPU: for some images at a time, patches are read from the pixels into rows of a matrix,
// normalised on the way, which the library multiplies in both directions. Equations: vlmfast/ops/patch_embed.py. Its order of
// entries is that of csrc/patch_embed.cpp; that one keeps rows in a core's cache and multiplies panels, so the two share no
// loop.
#include "../../kernels/cuda/patch_embed.h"

#include <algorithm>
#include <vector>

#include "device.h"
#include "ops.h"

namespace vlmfast::cuda {
namespace {

// Of rows and their products (forward) or gradients (backward) in memory at a time; at least those of an image.
constexpr int64_t kWorkBytes = int64_t(64) << 20;

at::Tensor upload(const std::vector<float>& values, const at::Tensor& device, cudaStream_t stream) {
  const auto count = int64_t(values.size());
  const auto out = at::empty({count}, device.options().dtype(at::kFloat));
  patch_embed_upload(values.data(), count, out.mutable_data_ptr<float>(), stream);
  return out;
}

// Rows by the patch that they belong to, for repeatable sums without atomics: those of patch i are order[starts[i]] to
// order[starts[i + 1] - 1], of `patches` in all.
struct ByPatch {
  ByPatch(const at::Tensor& patch_of_row, int64_t patches) {
    const auto keys = patch_of_row.to(at::kInt).flatten();  // half of the passes that int64 would take to sort
    const auto sorted = at::sort(keys, /*stable=*/true, 0, false);
    order = std::get<1>(sorted);
    starts = at::searchsorted(std::get<0>(sorted), at::arange(patches + 1, keys.options()));
  }
  at::Tensor order, starts;
};

// The taken patches of a batch as rows of a matrix of the products' dtype, with zeros up to a multiple of 8 columns: operands
// of 16 bits need that to be multiplied at full speed.
class PatchRows {
 public:
  PatchRows(const at::Tensor& pixels, const at::Tensor& weight, const std::optional<at::Tensor>& keep,
            const FloatList& mean, const FloatList& std, bool pad, at::ScalarType product, cudaStream_t stream)
      : pixels_(pixels),
        keep_(keep ? keep->contiguous() : at::Tensor()),
        product_(product),
        stream_(stream),
        affine_(affine(pixels, mean, std, stream)) {
    const int64_t patch_height = weight.size(2), patch_width = weight.size(3);
    const int64_t grid_rows = (pixels.size(2) + (pad ? patch_height - 1 : 0)) / patch_height,
                  grid_cols = (pixels.size(3) + (pad ? patch_width - 1 : 0)) / patch_width;
    patches = grid_rows * grid_cols;
    taken = keep ? keep->size(1) : patches;
    layout_ = {pixels.const_data_ptr(),
               type_of(pixels.scalar_type()),
               pixels.stride(1) == 1 && pixels.stride(3) == pixels.size(1),
               pixels.stride(0),
               pixels.stride(1),
               pixels.stride(2),
               pixels.stride(3),
               int(pixels.size(1)),
               int(pixels.size(2)),
               int(pixels.size(3)),
               int(patch_height),
               int(patch_width),
               int(grid_cols),
               this->keep(),
               taken,
               affine_.defined() ? affine_.const_data_ptr<float>() : nullptr};
    cols_ = ceil_div(layout_.entries(), 8) * 8;
    image_bytes_ = taken * (cols_ * int64_t(at::elementSize(product)) + weight.size(0) * int64_t(sizeof(float)));
  }

  int64_t patches, taken;  // of an image

  const int64_t* keep() const { return keep_.defined() ? keep_.const_data_ptr<int64_t>() : nullptr; }

  // f(first, images, rows) for a few images at a time, rows (images * taken, columns) being their patches.
  template <class F>
  void for_each(const F& f) const {
    const int64_t batch = pixels_.size(0), most = std::max<int64_t>(1, kWorkBytes / image_bytes_);
    const int64_t step = ceil_div(batch, ceil_div(batch, most));
    for (int64_t first = 0; first < batch; first += step) {
      const int64_t images = std::min(step, batch - first);
      const auto rows = at::empty({images * taken, cols_}, pixels_.options().dtype(product_));
      patch_embed_rows(layout_, first * taken, images * taken, rows.mutable_data_ptr(), type_of(product_), cols_, stream_);
      f(first, images, rows);
    }
  }

  // weight (O, C, p, q) as rows in the order and of the length of patches, and back.
  at::Tensor weight_rows(const at::Tensor& weight) const {
    const auto ordered = layout_.interleaved ? weight.permute({0, 2, 3, 1}) : weight;
    const auto rows = ordered.to(product_).reshape({weight.size(0), layout_.entries()});
    return cols_ == layout_.entries() ? rows : at::constant_pad_nd(rows, {0, cols_ - layout_.entries()});
  }
  at::Tensor from_rows(const at::Tensor& rows) const {
    const auto entries = rows.narrow(1, 0, layout_.entries());
    const int64_t width = rows.size(0), channels = layout_.channels, height = layout_.patch_height,
                  across = layout_.patch_width;
    return layout_.interleaved ? entries.reshape({width, height, across, channels}).permute({0, 3, 1, 2}).contiguous()
                               : entries.reshape({width, channels, height, across});
  }

 private:
  // (2, C) factor and shift of a pixel; undefined where pixels are taken as they are.
  static at::Tensor affine(const at::Tensor& pixels, const FloatList& mean, const FloatList& std, cudaStream_t stream) {
    const bool bytes = pixels.scalar_type() == at::kByte;
    if (!bytes && !std) return {};
    const int64_t channels = pixels.size(1);
    std::vector<float> values(2 * channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double spread = std ? (*std)[c] : 1.0, middle = mean ? (*mean)[c] : 0.0;
      values[c] = float(1.0 / ((bytes ? 255.0 : 1.0) * spread));
      values[channels + c] = float(-middle / spread);
    }
    return upload(values, pixels, stream);
  }

  at::Tensor pixels_, keep_;
  at::ScalarType product_;
  cudaStream_t stream_;
  at::Tensor affine_;
  Patches layout_;
  int64_t cols_, image_bytes_;
};

Values values_of(const at::Tensor& t) {
  return t.defined() ? Values{t.const_data_ptr(), type_of(t.scalar_type())} : Values{nullptr, Type::float32};
}

// (O, C, p, q)
at::Tensor weight_gradient(const PatchRows& patches, const at::Tensor& grad, int64_t prefix, at::ScalarType product) {
  at::Tensor sum;
  patches.for_each([&](int64_t first, int64_t images, const at::Tensor& rows) {
    const auto own = grad.narrow(0, first, images).narrow(1, prefix, patches.taken);
    const auto part = mm_float32(own.to(product).reshape({-1, grad.size(2)}).t(), rows);
    sum = sum.defined() ? sum.add_(part) : part;
  });
  return patches.from_rows(sum);
}

// (prefix + patches, O)
at::Tensor token_gradient(const PatchRows& patches, const at::Tensor& grad_, const std::optional<at::Tensor>& keep,
                          int64_t prefix, cudaStream_t stream) {
  const auto grad = grad_.stride(2) == 1 ? grad_ : grad_.contiguous();
  const auto out = at::empty({prefix + patches.patches, grad.size(2)}, grad.options().dtype(at::kFloat));
  std::optional<ByPatch> rows;
  if (keep) rows.emplace(*keep, patches.patches);
  patch_embed_token_grad({grad.const_data_ptr(), type_of(grad.scalar_type()), grad.stride(0), grad.stride(1), grad.size(0),
                          patches.taken, prefix, grad.size(2)},
                         rows ? rows->order.const_data_ptr<int64_t>() : nullptr,
                         rows ? rows->starts.const_data_ptr<int64_t>() : nullptr, patches.patches,
                         out.mutable_data_ptr<float>(), stream);
  return out;
}

}  // namespace

at::Tensor patch_embed_forward(const at::Tensor& pixels, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& position,
                               const std::optional<at::Tensor>& keep, const FloatList& mean, const FloatList& std, bool pad,
                               at::ScalarType product_dtype, at::ScalarType token_dtype) {
  const DeviceScope scope(pixels);
  const PatchRows patches(pixels, weight, keep, mean, std, pad, product_dtype, scope.stream);
  const int64_t count = prefix ? prefix->size(0) : 0, width = weight.size(0);
  const auto tokens = at::empty({pixels.size(0), count + patches.taken, width}, pixels.options().dtype(token_dtype));
  const auto contiguous = [](const std::optional<at::Tensor>& t) { return t ? t->contiguous() : at::Tensor(); };
  const auto biases = contiguous(bias), prefixes = contiguous(prefix), positions = contiguous(position);
  const bool per_image = position && positions.dim() == 3;
  const Added added = {values_of(biases), values_of(prefixes), values_of(positions), per_image ? positions.stride(0) : 0,
                       patches.keep(), patches.taken, count, width};
  const auto right = patches.weight_rows(weight).t();
  patches.for_each([&](int64_t first, int64_t images, const at::Tensor& rows) {
    const auto products = mm_float32(rows, right);
    patch_embed_tokens(products.const_data_ptr<float>(), added, first, images, tokens.mutable_data_ptr(),
                       type_of(token_dtype), scope.stream);
  });
  return tokens;
}

std::tuple<at::Tensor, at::Tensor> patch_embed_backward(const at::Tensor& grad, const at::Tensor& pixels,
                                                        const at::Tensor& weight, const std::optional<at::Tensor>& keep,
                                                        int64_t prefix_tokens, bool weight_grad, bool token_grad,
                                                        const FloatList& mean, const FloatList& std, bool pad,
                                                        at::ScalarType product_dtype, at::ScalarType) {
  const DeviceScope scope(pixels);
  const PatchRows patches(pixels, weight, keep, mean, std, pad, product_dtype, scope.stream);
  const auto none = [&] { return at::empty({0}, pixels.options().dtype(at::kFloat)); };
  return {weight_grad ? weight_gradient(patches, grad, prefix_tokens, product_dtype) : none(),
          token_grad ? token_gradient(patches, grad, keep, prefix_tokens, scope.stream) : none()};
}

at::Tensor patch_embed_scatter(const at::Tensor& rows_, const std::optional<at::Tensor>& keep, at::IntArrayRef patch,
                               at::IntArrayRef size, const FloatList& std, at::ScalarType dtype) {
  const DeviceScope scope(rows_);
  const auto rows = rows_.contiguous();
  const int64_t images = rows.size(0), grid_rows = ceil_div(size[0], patch[1]), grid_cols = ceil_div(size[1], patch[2]);
  const int64_t patches = grid_rows * grid_cols;
  std::optional<ByPatch> listed;
  if (keep) listed.emplace(at::add(*keep, at::arange(images, keep->options()).unsqueeze(1), patches), images * patches);
  at::Tensor factor;
  if (std) {
    std::vector<float> values;
    for (double spread : *std) values.push_back(float(1.0 / spread));
    factor = upload(values, rows, scope.stream);
  }
  const auto out = at::empty({images, patch[0], size[0], size[1]}, rows.options().dtype(dtype));
  patch_embed_scatter({rows.const_data_ptr(), type_of(rows.scalar_type()), images, int(patch[0]), int(size[0]), int(size[1]),
                       int(patch[1]), int(patch[2]), int(grid_rows), int(grid_cols),
                       listed ? listed->order.const_data_ptr<int64_t>() : nullptr,
                       listed ? listed->starts.const_data_ptr<int64_t>() : nullptr,
                       factor.defined() ? factor.const_data_ptr<float>() : nullptr},
                      out.mutable_data_ptr(), type_of(dtype), scope.stream);
  return out;
}

}  // namespace vlmfast::cuda
