// Sums of exponentials over chunks of logits, and the gradient of the logits. The library multiplies; these kernels read each
// dot product once.
#include "info_nce.h"

#include "logits.cuh"

namespace vlmfast::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsOfThread = kSumRows / kWarps, kColsOfThread = kSumCols / kWarp;

__device__ float minus_infinity() { return -INFINITY; }

// What sums are taken relative to, given the largest logit: any finite number where there is none.
__device__ float base(float top) { return top == minus_infinity() ? 0.0f : top; }

// A warp has kRowsOfThread rows of the tile, a lane every 32nd column of them. A maximum per row and per column of the tile,
// not one for all, keeps every sum away from 0 and infinity whatever the features' norms and the scale.
__global__ void __launch_bounds__(kWarps* kWarp)
    info_nce_sums_kernel(Logits logits, const float* scale2, float* row_partials, float* col_partials) {
  VLMFAST_SHARED(float, across);  // (kWarps, kSumCols): of one warp's rows, what all warps' are to be reduced
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row0 = int64_t(blockIdx.y) * kSumRows + warp * kRowsOfThread, col0 = int64_t(blockIdx.x) * kSumCols + lane;
  const float scale = *scale2;
  float x[kRowsOfThread][kColsOfThread], col_top[kColsOfThread], col_dot[kColsOfThread];
  for (int c = 0; c < kColsOfThread; ++c) {
    col_top[c] = minus_infinity();
    col_dot[c] = 0.0f;
  }
  const int64_t row_tiles = gridDim.y, col_tiles = gridDim.x;
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int64_t row = row0 + r;
    float top = minus_infinity(), dot = 0.0f;
#pragma unroll
    for (int c = 0; c < kColsOfThread; ++c) {
      const int64_t col = col0 + c * kWarp;
      x[r][c] = minus_infinity();
      if (row < logits.rows && col < logits.cols) {
        const float value = logits.dots[row * logits.stride + col];
        const bool positive = is_positive(logits, row, col);
        if (positive) {
          dot += value;
          col_dot[c] += value;
        }
        if (!positive || logits.row_codes) x[r][c] = value * scale;
      }
      top = fmaxf(top, x[r][c]);
      col_top[c] = fmaxf(col_top[c], x[r][c]);
    }
    top = rintf(warp_max(top));
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kColsOfThread; ++c) sum += fast_exp2(x[r][c] - base(top));
    sum = warp_sum(sum);
    dot = warp_sum(dot);
    if (lane == 0 && row < logits.rows) {
      float* out = row_partials + int64_t(blockIdx.x) * logits.rows + row;
      out[0] = top;
      out[col_tiles * logits.rows] = sum;
      out[2 * col_tiles * logits.rows] = dot;
    }
  }
  if (!col_partials) return;

  // Reduces one number per column and warp over the warps; every thread gets those of its columns.
  const auto reduce = [&](float(&values)[kColsOfThread], auto combine) {
    __syncthreads();
    for (int c = 0; c < kColsOfThread; ++c) across[warp * kSumCols + c * kWarp + lane] = values[c];
    __syncthreads();
    for (int c = 0; c < kColsOfThread; ++c) {
      values[c] = across[c * kWarp + lane];
      for (int w = 1; w < kWarps; ++w) values[c] = combine(values[c], across[w * kSumCols + c * kWarp + lane]);
    }
  };
  const auto add = [](float a, float b) { return a + b; };
  reduce(col_top, [](float a, float b) { return fmaxf(a, b); });
  float col_sum[kColsOfThread];
#pragma unroll
  for (int c = 0; c < kColsOfThread; ++c) {
    col_top[c] = rintf(col_top[c]);
    col_sum[c] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) col_sum[c] += fast_exp2(x[r][c] - base(col_top[c]));
  }
  reduce(col_sum, add);
  reduce(col_dot, add);
  if (warp == 0)
    for (int c = 0; c < kColsOfThread; ++c) {
      const int64_t col = col0 + c * kWarp;
      if (col >= logits.cols) continue;
      float* out = col_partials + int64_t(blockIdx.y) * logits.cols + col;
      out[0] = col_top[c];
      out[row_tiles * logits.cols] = col_sum[c];
      out[2 * row_tiles * logits.cols] = col_dot[c];
    }
}

// Tops are integers: a change of top costs the sum no more than the error of fast_exp2.
__global__ void info_nce_merge_kernel(const float* partials, int64_t tiles, int64_t count, float* stats, int64_t total,
                                      int64_t first) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float* own = stats + first + i;
  float top = own[0];
  double sum = own[total], dot = own[2 * total];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const float* part = partials + tile * count + i;
    const float higher = fmaxf(top, part[0]);
    if (part[0] != minus_infinity())
      sum = (top == minus_infinity() ? 0.0 : sum * fast_exp2(top - higher)) +
            double(part[tiles * count]) * fast_exp2(part[0] - higher);
    top = higher;
    dot += part[2 * tiles * count];
  }
  own[0] = top;
  own[total] = float(sum);
  own[2 * total] = float(dot);
}

template <class Out>
__global__ void __launch_bounds__(kSweepThreads)
    info_nce_gradient_kernel(Logits logits, const float* scale2, Sides sides, const float* kept_shift, Out* out) {
  const int64_t col = int64_t(blockIdx.x) * kSweepThreads + threadIdx.x;
  if (col >= logits.cols) return;
  const float scale = *scale2;
  const bool exponentials = kept_shift && !isinf(*kept_shift);
  const float* col_side = sides.cols + logits.first_col + col;
  const float col_shift = col_side[0], col_factor = col_side[sides.m], col_target = col_side[2 * sides.m];
  for (int64_t row = blockIdx.y; row < logits.rows; row += gridDim.y) {
    const float* row_side = sides.rows + logits.first_row + row;
    const float row_factor = row_side[sides.n], value = logits.dots[row * logits.stride + col];
    float g;
    if (exponentials) {
      g = value * (row_factor + col_factor);
    } else {
      // A factor of 0 leaves its term out: the power of two may be infinite there.
      const float x = value * scale;
      g = row_factor == 0.0f ? 0.0f : fast_exp2(x - row_side[0]) * row_factor;
      g += col_factor == 0.0f ? 0.0f : fast_exp2(x - col_shift) * col_factor;
    }
    if (is_positive(logits, row, col)) {
      const float target = row_side[2 * sides.n] + col_target;
      g = logits.row_codes ? g - target : -target;
    }
    out[row * logits.cols + col] = stored_gradient<Out>(g);
  }
}

}  // namespace

void info_nce_tile_sums(const Logits& logits, const float* scale2, float* row_partials, float* col_partials,
                        cudaStream_t stream) {
  const dim3 tiles(unsigned(ceil_div(logits.cols, kSumCols)), unsigned(ceil_div(logits.rows, kSumRows)));
  launch(info_nce_sums_kernel, tiles, kWarps * kWarp, kWarps * kSumCols * sizeof(float), stream, logits, scale2, row_partials,
         col_partials);
}

void info_nce_merge(const float* partials, int64_t tiles, int64_t count, float* stats, int64_t total, int64_t first,
                    cudaStream_t stream) {
  launch(info_nce_merge_kernel, unsigned(ceil_div(count, 128)), 128, 0, stream, partials, tiles, count, stats, total, first);
}

void info_nce_gradient(const Logits& logits, const float* scale2, const Sides& sides, const float* kept_shift, void* out,
                       Type out_type, cudaStream_t stream) {
  if (out_type == Type::float16)
    launch(info_nce_gradient_kernel<__half>, sweep_grid(logits), kSweepThreads, 0, stream, logits, scale2, sides,
           kept_shift, static_cast<__half*>(out));
  else
    launch(info_nce_gradient_kernel<float>, sweep_grid(logits), kSweepThreads, 0, stream, logits, scale2, sides, kept_shift,
           static_cast<float*>(out));
}

}  // namespace vlmfast::cuda
