// What the schedules of CUDA kernels share. With VLMFAST_ON_HOST (tests) the same schedules run kernels compiled by g++ on
// CPU tensors.
#pragma once

#include <ATen/Context.h>
#include <ATen/Functions.h>

#include <type_traits>

#include "../../kernels/cuda/types.h"

#ifndef VLMFAST_ON_HOST
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace vlmfast::cuda {

// Makes a tensor's device the current one for as long as it lives; `stream` is the one that torch computes on there.
#ifdef VLMFAST_ON_HOST
struct DeviceScope {
  explicit DeviceScope(const at::Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
struct DeviceScope {
  explicit DeviceScope(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.device().index())) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};
#endif

inline Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kHalf: return Type::float16;
    case at::kBFloat16: return Type::bfloat16;
    case at::kByte: return Type::uint8;
    default: return Type::float32;
  }
}

// a @ b in float32, of operands of 16 bits or of float32 (which obey torch's choice about TF32).
inline at::Tensor mm_float32(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == at::kFloat) return at::mm(a, b);
#ifdef VLMFAST_ON_HOST
  return at::mm(a.to(at::kFloat), b.to(at::kFloat));
#else
  return at::mm(a, b, at::kFloat);
#endif
}

// Whether float32Precision of CUDA's products is TF32; it is asked in enumerators, in torch 2.9 in strings.
template <class Precision, class Backend, class Op>
bool is_tf32(Precision (at::Context::*float32_precision)(Backend, Op) const) {
  const auto& context = at::globalContext();
  if constexpr (std::is_enum_v<Backend>)
    return (context.*float32_precision)(Backend::CUDA, Op::MATMUL) == Precision::TF32;
  else
    return (context.*float32_precision)("cuda", "matmul") == "tf32";
}

// Whether float32 operands must be multiplied as such: torch.backends.cuda.matmul.fp32_precision is not "tf32".
inline bool wants_float32_products(const at::Tensor& operand) {
  return operand.scalar_type() == at::kFloat && !is_tf32(&at::Context::float32Precision);
}

}  // namespace vlmfast::cuda
