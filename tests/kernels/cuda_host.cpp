// The CUDA backend for CPU tensors: schedules and kernels compiled by g++, bound as vlmfast._C.cuda is.
#include "../../csrc/cuda/bindings.h"

PYBIND11_MODULE(_cuda_host, m) { vlmfast::cuda::bind(m); }
