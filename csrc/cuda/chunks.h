// What the CUDA schedules of both losses share: features as operands of products, and squares of logits in memory.
#pragma once

#include <algorithm>

#include "../../kernels/cuda/logits.h"
#include "device.h"
#include "ops.h"

namespace vlmfast::cuda {

// Features (n, D) and (m, D) as products read them: float16 with float32 sums (unit-norm entries fit, and the rounding is an
// eighth of bfloat16's), or float32 where that is wanted.
class Chunks {
 public:
  Chunks(const at::Tensor& image, const at::Tensor& text, const std::optional<at::Tensor>& row_codes,
         const std::optional<at::Tensor>& col_codes, int64_t label_offset)
      : n(image.size(0)),
        m(text.size(0)),
        dim(image.size(1)),
        product(wants_float32_products(image) ? at::kFloat : at::kHalf),
        image(image.to(product).contiguous()),
        text(text.to(product).contiguous()),
        row_codes_(row_codes ? row_codes->contiguous() : at::Tensor()),
        col_codes_(col_codes ? col_codes->contiguous() : at::Tensor()),
        label_offset_(label_offset) {}

  int64_t n, m, dim;
  at::ScalarType product;
  at::Tensor image, text;

  // Of what a gradient of the logits is multiplied by.
  double gradient_scale() const { return product == at::kHalf ? kGradientScale : 1.0; }

  // f(logits) for each square of dot products, in an order that is always the same.
  // `kept` (n, m), unless it is empty, holds them already, or is to receive them.
  enum class Kept { none, read, write };
  template <class F>
  void for_each(const at::Tensor& kept, Kept use, const F& f) const {
    for (int64_t i = 0; i < n; i += chunk())
      for (int64_t j = 0; j < m; j += chunk()) {
        const int64_t rows = std::min(chunk(), n - i), cols = std::min(chunk(), m - j);
        at::Tensor dots;
        if (use == Kept::read) {
          dots = kept.narrow(0, i, rows).narrow(1, j, cols);
        } else {
          dots = mm_float32(image.narrow(0, i, rows), text.narrow(0, j, cols).t());
          if (use == Kept::write) kept.narrow(0, i, rows).narrow(1, j, cols).copy_(dots);
        }
        const Logits logits = {dots.const_data_ptr<float>(), dots.stride(0), i, j, rows, cols, codes(row_codes_),
                               codes(col_codes_), label_offset_};
        f(logits);
      }
  }

  // d_image rows += gradient times text, d_text rows += gradient transposed times image; where they are defined.
  void add_gradients(const Logits& logits, const at::Tensor& gradient, const at::Tensor& d_image,
                     const at::Tensor& d_text) const {
    if (d_image.defined())
      d_image.narrow(0, logits.first_row, logits.rows)
          .add_(mm_float32(gradient, text.narrow(0, logits.first_col, logits.cols)));
    if (d_text.defined())
      d_text.narrow(0, logits.first_col, logits.cols)
          .add_(mm_float32(gradient.t(), image.narrow(0, logits.first_row, logits.rows)));
  }

 private:
  static const int32_t* codes(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<int32_t>() : nullptr; }

  at::Tensor row_codes_, col_codes_;
  int64_t label_offset_;
};

}  // namespace vlmfast::cuda
