#include <torch/csrc/utils/pybind.h>

#include "ops.h"

#define VLMFAST_STRING_(x) #x
#define VLMFAST_STRING(x) VLMFAST_STRING_(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["cpu_isa"] = vlmfast::cpu_isa();
  info["brgemm"] = vlmfast::has_brgemm();
  info["bf16_products"] = vlmfast::has_bf16_products();
  info["torch"] = VLMFAST_STRING(VLMFAST_TORCH_VERSION);
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("build_info", &build_info, "Instruction set in use, and what the extension was built with.");
  m.def("force_bf16_schedule", &vlmfast::force_bf16_schedule, "For tests: see csrc/ops.h.");
  m.def("info_nce_forward", &vlmfast::info_nce_forward, release());
  m.def("info_nce_backward", &vlmfast::info_nce_backward, release());
  m.def("sigmoid_loss_forward", &vlmfast::sigmoid_loss_forward, release());
}
