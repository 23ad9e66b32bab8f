// What patch_embed does to rows of pixels and of tokens: one set of functions per instruction set.
#pragma once

#include <cstdint>

namespace vlmfast::cpu {

// Images as patches. A patch is `lines` runs of `run` pixels that are neighbours in memory: of one channel, or of all
// channels where those are interleaved. Entry k of a patch is pixel * factor[k] + shift[k], and 0 outside the image.
struct Patches {
  const void* pixels;
  int64_t image_stride, patch_row_stride, patch_col_stride;  // in pixels' elements, as line_offset is
  int64_t grid_cols;                                         // patches in a row of the image
  int64_t lines, run;
  const int64_t* line_offset;
  const int64_t* line_row;  // the row of the patch that a line is in
  const float *factor, *shift;
  int64_t height, row_elements;  // of an image: rows, and elements of a run as long as the image is wide
  int64_t patch_height;
};

// The first element of a patch.
static inline int64_t corner(const Patches& patches, int64_t image, int64_t patch) {
  return image * patches.image_stride + patch / patches.grid_cols * patches.patch_row_stride +
         patch % patches.grid_cols * patches.patch_col_stride;
}

template <class Pixel>
struct PatchKernels {
  // out <- a patch of an image, as float32 or rounded to bfloat16.
  void (*read)(const Patches& patches, int64_t image, int64_t patch, float* out);
  void (*read_bf16)(const Patches& patches, int64_t image, int64_t patch, uint16_t* out);
};

struct PatchEmbedKernels {
  PatchKernels<uint8_t> uint8;
  PatchKernels<uint16_t> bfloat16;
  PatchKernels<float> float32;

  // out[k] <- products[k] + bias[k] + position[k], either null: as float32 or rounded to bfloat16.
  void (*finish)(const float* products, const float* bias, const float* position, int64_t count, float* out);
  void (*finish_bf16)(const float* products, const float* bias, const float* position, int64_t count, uint16_t* out);

  // out[x, c] <- in[c, x] for `count` x, of 32 or 16 bits, and back.
  void (*interleave)(const float* in, int64_t channels, int64_t count, float* out);
  void (*interleave_16)(const uint16_t* in, int64_t channels, int64_t count, uint16_t* out);
  void (*separate)(const float* in, int64_t channels, int64_t count, float* out);

  // out[k] += in[k].
  void (*add)(const float* in, int64_t count, float* out);
  void (*add_bf16)(const uint16_t* in, int64_t count, float* out);
  void (*add_double)(const float* in, int64_t count, double* out);
};

namespace baseline {
extern const PatchEmbedKernels patch_embed;
}
namespace avx2 {
extern const PatchEmbedKernels patch_embed;
}
namespace avx512 {
extern const PatchEmbedKernels patch_embed;
}
namespace avx512_bf16 {
extern const PatchEmbedKernels patch_embed;
}

}  // namespace vlmfast::cpu
