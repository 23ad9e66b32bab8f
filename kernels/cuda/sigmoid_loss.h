// The launcher of sigmoid_loss's kernel; the schedule is csrc/cuda/sigmoid_loss.cpp, the equations are in
// vlmfast/ops/sigmoid_loss.py.
#pragma once

#include "logits.h"

namespace vlmfast::cuda {

// How many partial sums of each kind a chunk has.
int64_t sigmoid_loss_blocks(const Logits& logits);

// Of a chunk: partial sums of the loss, of G * dot and of G into sums (3, blocks), and G into out (rows, cols), unless it is
// null, of float32, or of float16 times kGradientScale.
void sigmoid_loss_chunk(const Logits& logits, const float* scale, const float* bias, double* sums, void* out, Type out_type,
                        cudaStream_t stream);

}  // namespace vlmfast::cuda
