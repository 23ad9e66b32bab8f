#include <ATen/Parallel.h>

#include <mutex>
#include <set>
#include <thread>

#include "ops.h"
#include "python_types.h"
#ifdef VLMFAST_CUDA_ARCHS
#include "cuda/bindings.h"
#endif

#define VLMFAST_STRING_(x) #x
#define VLMFAST_STRING(x) VLMFAST_STRING_(x)

namespace {

// How many threads a parallel region of the extension runs on; 1 where it was built without OpenMP.
int64_t count_threads() {
  std::set<std::thread::id> seen;
  std::mutex mutex;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return int64_t(seen.size());
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["cpu_isa"] = vlmfast::cpu_isa();
  info["bf16_products"] = vlmfast::has_bf16_products();
  info["int16_products"] = vlmfast::wants_int16_schedule();
  info["threads"] = count_threads();
  info["torch"] = VLMFAST_STRING(VLMFAST_TORCH_VERSION);
  info["compiler"] = __VERSION__;
#ifdef VLMFAST_CUDA_ARCHS
  info["cuda_archs"] = VLMFAST_CUDA_ARCHS;
  info["nvcc"] = VLMFAST_NVCC_VERSION;
#else
  info["without_cuda"] = VLMFAST_WITHOUT_CUDA;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Another number whenever a function's arguments or results change: vlmfast/ops/_dispatch.py takes its own alone.
  m.attr("INTERFACE") = 3;
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("build_info", &build_info, "Instruction set in use, and what the extension was built with.");
  m.def("tile_product_gflops", &vlmfast::tile_product_gflops, "For benchmarks: see csrc/ops.h.", release());
  m.def("release_memory", &vlmfast::release_memory, "Frees what is held from call to call; how many bytes.", release());
  m.def("force_schedule", &vlmfast::force_schedule, "For tests: see csrc/ops.h.");
  m.def("info_nce_forward", &vlmfast::info_nce_forward, release());
  m.def("info_nce_tile_forward", &vlmfast::info_nce_tile_forward, release());
  m.def("info_nce_normalise", &vlmfast::info_nce_normalise, release());
  m.def("info_nce_backward", &vlmfast::info_nce_backward, release());
  m.def("patch_embed_forward", &vlmfast::patch_embed_forward, release());
  m.def("patch_embed_backward", &vlmfast::patch_embed_backward, release());
  m.def("sigmoid_loss_forward", &vlmfast::sigmoid_loss_forward, release());
  m.def("media_attention_forward", &vlmfast::media_attention_forward, release());
  m.def("media_attention_backward", &vlmfast::media_attention_backward, release());
  m.def("linear_cross_entropy_forward", &vlmfast::linear_cross_entropy_forward, release());
  m.def("linear_cross_entropy_backward", &vlmfast::linear_cross_entropy_backward, release());
  m.def("gated_residual_forward", &vlmfast::gated_residual_forward, release());
  m.def("gated_residual_backward", &vlmfast::gated_residual_backward, release());
#ifdef VLMFAST_CUDA_ARCHS
  auto cuda = m.def_submodule("cuda", "The same functions for tensors on a GPU.");
  vlmfast::cuda::bind(cuda);
#endif
}
