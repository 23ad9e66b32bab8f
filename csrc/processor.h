// What the processor can do, which kernels of csrc/cpu that chooses, and how tests choose others.
#pragma once

#include <cstdint>
#include <string>

#include "ops.h"

namespace vlmfast {

// cpu::<isa>::name for the processor that this runs on.
#if defined(__x86_64__)
#define VLMFAST_KERNELS(name) choose_isa(cpu::baseline::name, cpu::avx2::name, cpu::avx512::name)
#else
#define VLMFAST_KERNELS(name) cpu::baseline::name
#endif

template <class Kernels>
const Kernels& choose_isa(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  static const Kernels& chosen = [&]() -> const Kernels& {  // there is one set of each type
    const std::string isa = cpu_isa();
    return isa == "avx512" ? avx512 : isa == "avx2" ? avx2 : baseline;
  }();
  return chosen;
}

// Whether there are products of int16 with sums of int32 (AVX-512 VNNI).
bool has_vnni();

// Whether bfloat16 operands are to be multiplied as such.
bool wants_bf16_schedule();

// Whether tests ask for oneDNN's products, which are else taken where there is AMX.
bool wants_brgemm();

}  // namespace vlmfast
