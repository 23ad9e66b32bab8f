// How the CPU schedule of patch_embed reads pixels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/patch_embed.h"
#include "ops.h"

namespace vlmfast {

const cpu::PatchEmbedKernels& patch_embed_kernels();

// Asks for memory that no processor foresees: pieces of rows far apart.
void fetch(const void* first, int64_t bytes);

// The taken patches of a batch as rows of a matrix. Entries of a patch are in the order that the pixels have in memory:
// row, column, channel where channels are interleaved, else channel, row, column.
class PatchRows {
 public:
  PatchRows(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& keep, const FloatList& mean,
            const FloatList& std, bool pad);
  PatchRows(const PatchRows&) = delete;  // layout_ points at this one's lines

  int64_t patches, taken, rows, entries;  // patches of an image, those taken, rows of the matrix and its columns

  // Which patch of its image row t is.
  int64_t patch(int64_t t) const { return keep_.defined() ? keep_.const_data_ptr<int64_t>()[t] : t % taken; }

  // out (count, stride) <- rows first to first + count, 0 after the entries.
  void read(int64_t first, int64_t count, float* out, int64_t stride) const;
  void read(int64_t first, int64_t count, at::BFloat16* out, int64_t stride) const;

  // A row of weight (O, C, p, q) or of its gradient from the order that those have to a patch's, and back.
  void from_weight(const float* in, float* out) const;
  void from_weight(const at::BFloat16* in, at::BFloat16* out) const;
  void to_weight(const float* in, float* out) const;

 private:
  template <class F>
  void each(int64_t first, int64_t count, const F& f) const;
  template <class T>
  void reorder(void (*kernel)(const T*, int64_t, int64_t, T*), const T* in, T* out) const;
  void fetch_lines(int64_t t) const;

  at::Tensor pixels_, keep_;
  bool interleaved_;
  int64_t channels_;
  std::vector<int64_t> line_offset_, line_row_;
  std::vector<float> factor_, shift_;
  cpu::Patches layout_;
};

}  // namespace vlmfast
