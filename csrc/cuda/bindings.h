// Python's names of the CUDA schedules, in vlmfast._C.cuda and in the module of the tests.
#pragma once

#include "../python_types.h"
#include "ops.h"

namespace vlmfast::cuda {

inline void bind(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
#ifdef VLMFAST_ON_HOST
  m.attr("DEVICE") = "cpu";
#else
  m.attr("DEVICE") = "cuda";
#endif
  m.def("set_chunk", &set_chunk, "For tests: see csrc/cuda/ops.h.");
  m.def("info_nce_tile_forward", &info_nce_tile_forward, release());
  m.def("info_nce_backward", &info_nce_backward, release());
  m.def("sigmoid_loss_forward", &sigmoid_loss_forward, release());
  m.def("patch_embed_forward", &patch_embed_forward, release());
  m.def("patch_embed_backward", &patch_embed_backward, release());
  m.def("patch_embed_scatter", &patch_embed_scatter, release());
  m.def("media_attention_forward", &media_attention_forward, release());
  m.def("media_attention_backward", &media_attention_backward, release());
  m.def("gated_residual_forward", &gated_residual_forward, release());
  m.def("gated_residual_backward", &gated_residual_backward, release());
}

}  // namespace vlmfast::cuda
