// What launchers of CUDA kernels take besides pointers and sizes.
#pragma once

#include <cstdint>

#ifdef VLMFAST_ON_HOST
using cudaStream_t = void*;
#else
#include <cuda_runtime_api.h>
#endif

namespace vlmfast::cuda {

// What a tensor's elements are, where a launcher takes several.
enum class Type { float32, float16, bfloat16, uint8 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace vlmfast::cuda
