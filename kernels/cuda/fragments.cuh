// Products of 16 x 16 tiles in shared memory by one warp, with float32 sums: on tensor cores where the operands are of 16 bits,
// else by float32 multiply-adds behind the same functions.
#pragma once

#include "launch.cuh"

namespace vlmfast::cuda {

constexpr int kTile = 16;

// For float32 an operand is read when it is multiplied, not before: `stride` elements from row to row.
struct FloatLeft {
  const float* data;
  unsigned stride;
};
template <bool transposed>
struct FloatRight {
  const float* data;
  unsigned stride;
};

// A lane holds rows row() and row() + 8 at columns col(), col() + 4, ...: neighbouring lanes read other banks.
struct FloatSum {
  static constexpr int num_elements = 8;
  float x[num_elements];

  static __device__ int row(int element) { return int(threadIdx.x) % kWarp / 4 + element / 4 * 8; }
  static __device__ int col(int element) { return int(threadIdx.x) % 4 + element % 4 * 4; }
};

// The operands of left @ right, or left @ right.T with `Turned`, rows one after the other in memory. Of a Sum it is unspecified
// which elements a lane holds; two Sums agree in it.
template <class T>
struct Fragments {
  template <class Use, class... Layout>
  using Fragment = nvcuda::wmma::fragment<Use, kTile, kTile, kTile, Layout...>;
  using Left = Fragment<nvcuda::wmma::matrix_a, T, nvcuda::wmma::row_major>;
  using Right = Fragment<nvcuda::wmma::matrix_b, T, nvcuda::wmma::row_major>;
  using Turned = Fragment<nvcuda::wmma::matrix_b, T, nvcuda::wmma::col_major>;
  using Sum = Fragment<nvcuda::wmma::accumulator, float>;
};
template <>
struct Fragments<float> {
  using Left = FloatLeft;
  using Right = FloatRight<false>;
  using Turned = FloatRight<true>;
  using Sum = FloatSum;
};

// wmma's functions for float32; all are called unqualified.
__device__ inline void load_matrix_sync(FloatLeft& operand, const float* data, unsigned stride) { operand = {data, stride}; }

template <bool transposed>
__device__ void load_matrix_sync(FloatRight<transposed>& operand, const float* data, unsigned stride) {
  operand = {data, stride};
}

__device__ inline void fill_fragment(FloatSum& sum, float value) {
#pragma unroll
  for (float& x : sum.x) x = value;
}

__device__ inline void load_matrix_sync(FloatSum& sum, const float* data, unsigned stride, nvcuda::wmma::layout_t) {
#pragma unroll
  for (int e = 0; e < sum.num_elements; ++e) sum.x[e] = data[sum.row(e) * stride + sum.col(e)];
}

__device__ inline void store_matrix_sync(float* data, const FloatSum& sum, unsigned stride, nvcuda::wmma::layout_t) {
#pragma unroll
  for (int e = 0; e < sum.num_elements; ++e) data[sum.row(e) * stride + sum.col(e)] = sum.x[e];
}

template <bool transposed>
__device__ void mma_sync(FloatSum& d, const FloatLeft& a, const FloatRight<transposed>& b, const FloatSum& c) {
  d = c;
#pragma unroll 1  // else operands of many steps are loaded at once, more than there are registers for
  for (int k = 0; k < kTile; k += 4) {
    float4 left[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) left[i] = *reinterpret_cast<const float4*>(a.data + d.row(4 * i) * a.stride + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float4 right;
      if constexpr (transposed) {
        right = *reinterpret_cast<const float4*>(b.data + d.col(j) * b.stride + k);
      } else {
        const float* column = b.data + k * b.stride + d.col(j);
        right = make_float4(column[0], column[b.stride], column[2 * b.stride], column[3 * b.stride]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = d.x[4 * i + j];
        x = fmaf(left[i].x, right.x, x);
        x = fmaf(left[i].y, right.y, x);
        x = fmaf(left[i].z, right.z, x);
        x = fmaf(left[i].w, right.w, x);
      }
    }
  }
}

}  // namespace vlmfast::cuda
