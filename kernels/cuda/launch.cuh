// What every kernel file includes first: launching, shared memory, conversions. Kernels are written in what both nvcc and,
// with VLMFAST_ON_HOST and tests/kernels/cuda_host.h, g++ can compile: neither `<<<>>>` nor `extern __shared__` appears
// outside of this file.
#pragma once

#include "types.h"

#ifdef VLMFAST_ON_HOST
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#endif

#include <stdexcept>
#include <string>
#include <type_traits>

namespace vlmfast::cuda {

// A function's parameter of this type takes no part in the deduction of T.
template <class T>
struct Given {
  using type = T;
};

#ifdef VLMFAST_ON_HOST

// In a kernel: `name` points to its dynamic shared memory, aligned to 128 bytes.
#define VLMFAST_SHARED(type, name) type* const name = reinterpret_cast<type*>(::vlmfast_host::shared_memory())

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            typename Given<Parameters>::type... arguments) {
  ::vlmfast_host::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { kernel(arguments...); });
}

inline int multiprocessor_count() { return 4; }

inline float fast_exp2(float x) { return exp2f(x); }

#else

#define VLMFAST_SHARED(type, name)                           \
  extern __shared__ __align__(128) unsigned char vlmfast_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(vlmfast_dynamic_shared)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("vlmfast: CUDA ") + what + " failed: " + cudaGetErrorString(error));
}

// Launches on the current device and throws where that fails. Arguments are converted to the kernel's parameters.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            typename Given<Parameters>::type... arguments) {
  constexpr size_t without_asking = 48 << 10;
  if (shared_bytes > without_asking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "request for shared memory");
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "kernel launch");
}

// Of the current device.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "query of the device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "query of the device");
  return count;
}

// 2^x in one instruction, off by at most 2 units in the last place; subnormal results are 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// f(T()) with T the type of elements that are floats.
template <class F>
void with_float(Type type, const F& f) {
  switch (type) {
    case Type::float16: return f(__half());
    case Type::bfloat16: return f(__nv_bfloat16());
    default: return f(float());
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(uint8_t x) { return float(x); }

// Rounded to nearest even.
template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

}  // namespace vlmfast::cuda
