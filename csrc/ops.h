// The C++ API. Each op has a forward that returns what its backward needs; vlmfast/ops/<op>.py registers them with torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

namespace vlmfast {

// loss (), row_stats (2, n), col_stats (2, M) or (2, 0), shift (), kept (n, M) or (0, 0); all float32.
// See vlmfast/ops/info_nce.py for what each of them holds.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, int64_t label_offset, bool bidirectional,
    bool keep);

// Gradients of image, text and scale; those of image and text are empty (0,) where not asked for.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(
    const at::Tensor& grad, const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale,
    const at::Tensor& row_stats, const at::Tensor& col_stats, const at::Tensor& shift, const at::Tensor& kept,
    int64_t label_offset, bool bidirectional, bool image_grad, bool text_grad);

// "avx512", "avx2" or "baseline": the instruction set that the CPU kernels run with, from at::get_cpu_capability().
std::string cpu_isa();

// Whether tile products run on oneDNN's batch-reduce GEMM (true) or on ATen's matrix product (false): the former where
// oneDNN has it for this processor and torch.backends.mkldnn.enabled is not switched off.
bool has_brgemm();

// Whether bfloat16 features are multiplied as such (AVX-512 BF16, AMX) rather than widened to float32.
bool has_bf16_products();

// Takes the bfloat16 schedule on any processor, its products on widened copies; for tests of the schedule.
void force_bf16_schedule(bool force);

}  // namespace vlmfast
