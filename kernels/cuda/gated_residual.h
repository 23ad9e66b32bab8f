// Launchers of gated_residual's kernels; the schedule is csrc/cuda/gated_residual.cpp, the equations:
// vlmfast/ops/gated_residual.py.
#pragma once

#include "types.h"

namespace vlmfast::cuda {

// A contiguous tensor.
struct Elements {
  const void* data;
  Type type;
};

// The branch of (rows, dim) elements that is added.
struct GatedBranch {
  Elements hidden;
  Elements gate;  // (1,) or (dim,)
  bool per_channel, tanh;
  const bool* row_mask;  // (rows,), or null
  int64_t rows, dim;
};

// out, of residual's shape and type.
void gated_residual_add(const Elements& residual, const GatedBranch& branch, void* out, cudaStream_t stream);

// How many sums of grad * hidden gated_residual_gradient makes for each channel, or for all of them together.
int64_t gated_residual_sums(const GatedBranch& branch);

// d_hidden of hidden's shape and type, and sums (gated_residual_sums(branch), dim or 1); null where not wanted.
void gated_residual_gradient(const Elements& grad, const GatedBranch& branch, void* d_hidden, float* sums,
                             cudaStream_t stream);

// d_gate, of the gate's shape and type, from the sums.
void gated_residual_gate_gradient(const GatedBranch& branch, const float* sums, void* d_gate, cudaStream_t stream);

}  // namespace vlmfast::cuda
