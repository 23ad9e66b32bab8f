#include "patch_rows.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "gemm.h"

namespace vlmfast {

const cpu::PatchEmbedKernels& patch_embed_kernels() {
#if defined(__x86_64__)
  if (has_bf16_products()) return cpu::avx512_bf16::patch_embed;
#endif
  return VLMFAST_KERNELS(patch_embed);
}

void fetch(const void* first, int64_t bytes) {
  const auto* from = static_cast<const char*>(first);
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
  __builtin_prefetch(from + bytes - 1);
}

namespace {

// The pixels, copied where they are not lines of neighbours or of a dtype that is not read.
at::Tensor in_lines(const at::Tensor& given) {
  const auto pixels = given.scalar_type() == at::kHalf ? given.to(at::kFloat) : given;
  const bool lines = pixels.stride(3) == 1 || (pixels.stride(1) == 1 && pixels.stride(3) == pixels.size(1));
  return lines ? pixels : pixels.contiguous();
}

}  // namespace

PatchRows::PatchRows(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& keep,
                     const FloatList& mean, const FloatList& std, bool pad)
    : pixels_(in_lines(given)),
      keep_(keep ? keep->contiguous() : at::Tensor()),
      interleaved_(pixels_.stride(1) == 1 && pixels_.stride(3) == pixels_.size(1)),
      channels_(pixels_.size(1)) {
  const int64_t patch_height = weight.size(2), patch_width = weight.size(3);
  const int64_t height = pixels_.size(2), width = pixels_.size(3);
  const int64_t grid_rows = (height + (pad ? patch_height - 1 : 0)) / patch_height,
                grid_cols = (width + (pad ? patch_width - 1 : 0)) / patch_width;
  patches = grid_rows * grid_cols;
  taken = keep ? keep_.size(1) : patches;
  rows = pixels_.size(0) * taken;
  entries = channels_ * patch_height * patch_width;

  const int64_t row_channels = interleaved_ ? channels_ : 1;
  for (int64_t c = 0; c < (interleaved_ ? 1 : channels_); ++c)
    for (int64_t y = 0; y < patch_height; ++y) {
      line_offset_.push_back(c * pixels_.stride(1) + y * pixels_.stride(2));
      line_row_.push_back(y);
      for (int64_t x = 0; x < patch_width; ++x)
        for (int64_t k = c; k < c + row_channels; ++k) {
          const double range = pixels_.scalar_type() == at::kByte ? 255.0 : 1.0;
          const double spread = std ? (*std)[k] : 1.0, middle = mean ? (*mean)[k] : 0.0;
          factor_.push_back(float(1.0 / (range * spread)));
          shift_.push_back(float(-middle / spread));
        }
    }
  layout_ = {pixels_.const_data_ptr(),
             pixels_.stride(0),
             patch_height * pixels_.stride(2),
             patch_width * pixels_.stride(3),
             grid_cols,
             int64_t(line_offset_.size()),
             patch_width * row_channels,
             line_offset_.data(),
             line_row_.data(),
             factor_.data(),
             shift_.data(),
             height,
             width * row_channels,
             patch_height};
}

// f(reader, image, patch, number) for each row, whose lines were asked for while others were read.
template <class F>
void PatchRows::each(int64_t first, int64_t count, const F& f) const {
  constexpr int64_t ahead = 2;
  const auto with = [&](const auto& reader) {
    for (int64_t r = 0; r < count; ++r) {
      if (first + r + ahead < rows) fetch_lines(first + r + ahead);
      f(reader, (first + r) / taken, patch(first + r), r);
    }
  };
  if (pixels_.scalar_type() == at::kByte)
    with(patch_embed_kernels().uint8);
  else if (pixels_.scalar_type() == at::kBFloat16)
    with(patch_embed_kernels().bfloat16);
  else
    with(patch_embed_kernels().float32);
}

void PatchRows::fetch_lines(int64_t t) const {
  const int64_t element = pixels_.element_size();
  const auto* corner = static_cast<const char*>(layout_.pixels) + element * cpu::corner(layout_, t / taken, patch(t));
  for (const int64_t offset : line_offset_) fetch(corner + element * offset, element * layout_.run);
}

void PatchRows::read(int64_t first, int64_t count, float* out, int64_t stride) const {
  each(first, count, [&](const auto& reader, int64_t image, int64_t patch, int64_t r) {
    reader.read(layout_, image, patch, out + r * stride);
    std::fill_n(out + r * stride + entries, stride - entries, 0.0f);
  });
}

void PatchRows::read(int64_t first, int64_t count, at::BFloat16* out, int64_t stride) const {
  each(first, count, [&](const auto& reader, int64_t image, int64_t patch, int64_t r) {
    auto* row = reinterpret_cast<uint16_t*>(out + r * stride);
    reader.read_bf16(layout_, image, patch, row);
    std::fill(row + entries, row + stride, 0);
  });
}

template <class T>
void PatchRows::reorder(void (*kernel)(const T*, int64_t, int64_t, T*), const T* in, T* out) const {
  if (interleaved_)
    kernel(in, channels_, entries / channels_, out);
  else
    std::copy_n(in, entries, out);
}

void PatchRows::from_weight(const float* in, float* out) const { reorder(patch_embed_kernels().interleave, in, out); }
void PatchRows::from_weight(const at::BFloat16* in, at::BFloat16* out) const {
  reorder(patch_embed_kernels().interleave_16, reinterpret_cast<const uint16_t*>(in), reinterpret_cast<uint16_t*>(out));
}
void PatchRows::to_weight(const float* in, float* out) const { reorder(patch_embed_kernels().separate, in, out); }

}  // namespace vlmfast
