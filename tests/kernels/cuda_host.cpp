// The CUDA backend for CPU tensors: schedules and kernels compiled by g++, bound as vlmfast._C.cuda is.
#include "../../csrc/cuda/bindings.h"

#include "cuda_host.h"

#include <dlfcn.h>

// Of kernels launched since the last call, by their place in this library's file: dynamic shared memory at most, in bytes.
std::map<size_t, size_t> take_shared() {
  std::map<size_t, size_t> found;
  for (const auto& [kernel, bytes] : std::exchange(vlmfast_host::most_shared, {})) {
    Dl_info info;
    dladdr(kernel, &info);
    found[static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase)] = bytes;
  }
  return found;
}

PYBIND11_MODULE(_cuda_host, m) {
  vlmfast::cuda::bind(m);
  m.def("take_shared", &take_shared);
}
