// Launchers of patch_embed's kernels; the schedule is csrc/cuda/patch_embed.cpp, the equations: vlmfast/ops/patch_embed.py.
// Rows of patches are counted through the batch: row r is taken patch r % taken of image r / taken.
#pragma once

#include "types.h"

namespace vlmfast::cuda {

// Pixels (B, C, H, W) and the patches taken of them. Entries of a patch are in the order that the pixels have in memory: row,
// column, channel where channels are interleaved, else channel, row, column.
struct Patches {
  const void* pixels;
  Type type;
  bool interleaved;
  int64_t image_stride, channel_stride, row_stride, col_stride;  // in elements
  int channels, height, width, patch_height, patch_width, grid_cols;
  const int64_t* keep;  // (B, taken), or null: all patches in order
  int64_t taken;
  const float* affine;  // (2, C): factor and shift of a pixel, or null

  int entries() const { return channels * patch_height * patch_width; }
  int run() const { return patch_width * (interleaved ? channels : 1); }  // entries of a row of pixels of a patch
};

// out (count, stride) <- rows first to first + count, normalised: pixel * factor + shift, rounded once. Zeros outside of the
// image and after a patch's entries. out is aligned to 16 bytes, stride a multiple of 8.
void patch_embed_rows(const Patches& patches, int64_t first, int64_t count, void* out, Type out_type, int64_t stride,
                      cudaStream_t stream);

// Floating-point values of any type; null where there are none.
struct Values {
  const void* data;
  Type type;
};

// What tokens (B, prefix_tokens + taken, width) are made of, besides products.
struct Added {
  Values bias;      // (width,)
  Values prefix;    // (prefix_tokens, width)
  Values position;  // (prefix_tokens + patches, width), or such per image
  int64_t position_image;  // elements from one image's positions to the next one's; 0 where all share them
  const int64_t* keep;     // as of Patches
  int64_t taken, prefix_tokens, width;
};

// Writes all tokens of `images` images from the first on. products (images * taken, width) are those of these images; all
// else is of the whole batch.
void patch_embed_tokens(const float* products, const Added& added, int64_t first, int64_t images, void* tokens,
                        Type token_type, cudaStream_t stream);

// The gradient (B, prefix_tokens + taken, width) of tokens; columns are neighbours.
struct TokenGradient {
  const void* data;
  Type type;
  int64_t image_stride, token_stride;  // in elements
  int64_t images, taken, prefix_tokens, width;
};

// out (prefix_tokens + patches, width) <- sums over the batch. With keep, patch i came from the rows
// order[starts[i]], ..., order[starts[i + 1] - 1]; else both are null.
void patch_embed_token_grad(const TokenGradient& grad, const int64_t* order, const int64_t* starts, int64_t patches, float* out,
                            cudaStream_t stream);

// Rows of patches of images (B, C, H, W), entries in the order channel, row, column.
struct PatchSums {
  const void* rows;  // (B * taken, C * patch_height * patch_width)
  Type type;
  int64_t images;
  int channels, height, width, patch_height, patch_width, grid_rows, grid_cols;
  const int64_t *order, *starts;  // patch i of the batch is the sum of rows order[starts[i]] to order[starts[i + 1] - 1], or
                                  // both are null, and it is row i
  const float* factor;            // (C,) that sums are multiplied by, or null
};

// out (B, C, H, W) <- at each pixel the sum of the rows of its patch: the gradient of pixels.
void patch_embed_scatter(const PatchSums& sums, void* out, Type out_type, cudaStream_t stream);

// out <- `count` values in the host's memory, which can go when this returns. They travel as arguments of kernels: a copy from
// pageable memory would wait for the device, and could not be captured in a graph.
void patch_embed_upload(const float* values, int64_t count, float* out, cudaStream_t stream);

}  // namespace vlmfast::cuda
