// The CUDA schedules: the functions of csrc/ops.h for tensors on a GPU, of the same types. No function waits for the device or
// allocates other than through torch, so that each can be captured in a CUDA graph.
#pragma once

#include "../ops.h"

namespace vlmfast::cuda {

decltype(vlmfast::info_nce_tile_forward) info_nce_tile_forward;
decltype(vlmfast::info_nce_backward) info_nce_backward;
decltype(vlmfast::sigmoid_loss_forward) sigmoid_loss_forward;
decltype(vlmfast::patch_embed_forward) patch_embed_forward;
decltype(vlmfast::patch_embed_backward) patch_embed_backward;
decltype(vlmfast::media_attention_forward) media_attention_forward;
decltype(vlmfast::media_attention_backward) media_attention_backward;
decltype(vlmfast::gated_residual_forward) gated_residual_forward;
decltype(vlmfast::gated_residual_backward) gated_residual_backward;

// (B, C, H, W) of `dtype`: rows (B, K, C * p * q) of patches, the kept ones or all in order, summed at their pixels and
// divided by the channels' std. patch is (C, p, q), size (H, W).
at::Tensor patch_embed_scatter(const at::Tensor& rows, const std::optional<at::Tensor>& keep, at::IntArrayRef patch,
                               at::IntArrayRef size, const FloatList& std, at::ScalarType dtype);

// The side of the squares of logits that are in memory at a time; 0 for the usual. For tests.
void set_chunk(int64_t side);
int64_t chunk();

}  // namespace vlmfast::cuda
