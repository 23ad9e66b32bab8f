// The C++ API; vlmfast/ops/<op>.py registers it with torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace vlmfast {

// What each function takes and returns is told in vlmfast/ops/<op>.py.

// loss (), rows (3, n), cols (3, m), shift (), kept (n, m) or (0, 0), unit (); float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const std::optional<at::Tensor>& row_mask,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool bidirectional, bool exclude_positive, bool keep);

// Its halves, between which processes add up what they have found. Of the tiles: row_stats (3, n), col_stats (3, m) or (3, 0),
// shift () and kept; float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> info_nce_tile_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const std::optional<at::Tensor>& row_codes,
    const std::optional<at::Tensor>& col_codes, int64_t label_offset, bool columns, bool keep);

// Of one side: the sum of its losses, float64, and shift, factor and target (3, n), float32.
std::tuple<at::Tensor, at::Tensor> info_nce_normalise(const at::Tensor& stats, const at::Tensor& weight,
                                                      const std::optional<at::Tensor>& count, const at::Tensor& scale,
                                                      bool exclude_positive);

// Gradients of image, text and scale; those of image and text are empty (0,) where not asked for.
std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_backward(
    const at::Tensor& unit, const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale,
    const at::Tensor& rows, const at::Tensor& cols, const at::Tensor& shift, const at::Tensor& kept,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool image_grad, bool text_grad);

// Sums over all pairs: loss, gradients of image and text or (0, D), of scale and bias; float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_forward(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& scale, const at::Tensor& bias,
    const std::optional<at::Tensor>& row_codes, const std::optional<at::Tensor>& col_codes, int64_t label_offset,
    bool image_grad, bool text_grad);

// stats (3, n) and kept (kept_rows * V,); float32.
std::tuple<at::Tensor, at::Tensor> linear_cross_entropy_forward(const at::Tensor& hidden, const at::Tensor& weight,
                                                                const std::optional<at::Tensor>& bias,
                                                                const at::Tensor& labels, int64_t kept_rows);

// Gradients of hidden, weight and bias; (0,) where not asked for.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_backward(
    const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& labels,
    const at::Tensor& rows, const at::Tensor& kept, bool hidden_grad, bool weight_grad, bool bias_grad);

// out (N, D).
at::Tensor gated_residual_forward(const at::Tensor& residual, const at::Tensor& hidden, const at::Tensor& gate,
                                  const std::optional<at::Tensor>& row_mask, bool tanh);

// Gradients of hidden and gate; (0,) where not asked for.
std::tuple<at::Tensor, at::Tensor> gated_residual_backward(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& gate, const std::optional<at::Tensor>& row_mask,
    bool tanh, bool hidden_grad, bool gate_grad);

// What the rows see, as vlmfast.ops.media_attention.Media: lo and hi (B, Lq), len (B, T), key_bias (B, Lk).
struct Media {
  std::optional<at::Tensor> lo, hi, len, key_bias;
  int64_t tokens_per_media;
  double scale;
  bool empty_all;
};

// out (B, H, Lq, dv) and lse (B, H, Lq).
std::tuple<at::Tensor, at::Tensor> media_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                           const Media& media);

// Gradients of q, k and v; (0,) where not asked for.
std::tuple<at::Tensor, at::Tensor, at::Tensor> media_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const Media& media, bool q_grad, bool kv_grad);

using FloatList = std::optional<std::vector<double>>;

// tokens (B, k + K, O).
at::Tensor patch_embed_forward(const at::Tensor& pixels, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& position,
                               const std::optional<at::Tensor>& keep, const FloatList& mean, const FloatList& std, bool pad,
                               at::ScalarType product_dtype, at::ScalarType token_dtype);

// weight_grad (O, C, p, q), of weight's dtype, and token_grad (k + n, O), float32; (0,) where not asked for.
std::tuple<at::Tensor, at::Tensor> patch_embed_backward(const at::Tensor& grad, const at::Tensor& pixels,
                                                        const at::Tensor& weight, const std::optional<at::Tensor>& keep,
                                                        int64_t prefix_tokens, bool weight_grad, bool token_grad,
                                                        const FloatList& mean, const FloatList& std, bool pad,
                                                        at::ScalarType product_dtype, at::ScalarType token_dtype);

// "avx512", "avx2" or "baseline": the instruction set that the CPU kernels run with, from at::get_cpu_capability().
std::string cpu_isa();

// Whether bfloat16 features are multiplied as such (AVX-512 BF16, AMX) rather than widened to float32.
bool has_bf16_products();

// Whether features of 16 bits are else multiplied as int16: with AVX-512 VNNI or AVX2 that is faster than float32.
bool wants_int16_schedule();

// GFLOP/s of tile products on operands that stay in cache, on all threads: what the loops of the losses could reach at most.
double tile_product_gflops(bool bf16);

// Frees the memory that is held from call to call, and returns how many bytes.
int64_t release_memory();

// For tests, on any processor: "bfloat16" multiplies bfloat16 features as such, "brgemm" with oneDNN's products, as where there
// is AMX; "int16" both 16-bit dtypes as int16; "" goes back to what this processor does.
void force_schedule(const std::string& name);

}  // namespace vlmfast
