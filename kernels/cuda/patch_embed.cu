// Patches as rows of a matrix, what makes tokens of its product with the weight, and sums of their gradients. The library
// multiplies; these kernels move memory, each element once.
#include "patch_embed.h"

#include <algorithm>

#include "launch.cuh"

namespace vlmfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // that a thread loads or stores at most at a time

// N neighbours in memory that move together.
template <class T, int N>
struct alignas(std::min<size_t>(kVectorBytes, N * sizeof(T))) Pack {
  T of[N];
};

template <class T, int N>
__device__ const Pack<T, N>& pack_at(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

bool divides(int64_t bytes, const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Threads of which a power of two, no more than a warp, share a row of `units`.
dim3 block_for_rows_of(int64_t units) {
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < units) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

constexpr int kRowsOfThread = 4;  // loads in flight; what a thread knows of its entries serves them all

// Where a patch begins in memory, and how much of the image there is from its first pixel on.
struct Corner {
  int64_t first;
  int rows, cols;
};

__device__ Corner corner_of(const Patches& patches, int64_t row) {
  const int64_t image = row / patches.taken;
  const int patch = int(patches.keep ? patches.keep[row] : row % patches.taken);
  const int top = patch / patches.grid_cols * patches.patch_height, left = patch % patches.grid_cols * patches.patch_width;
  return {image * patches.image_stride + top * patches.row_stride + left * patches.col_stride, patches.height - top,
          patches.width - left};
}

// Of a patch, kUnit neighbouring entries from k on: their pixels' place, and what normalises them.
template <int kUnit>
struct Unit {
  int64_t offset;
  int row, col;  // of the first pixel, in the patch
  float factor[kUnit], shift[kUnit];

  __device__ Unit(const Patches& patches, int run, int k) {
    const int line = k / run, at = k % run;
    int channel;
    if (patches.interleaved) {
      channel = at % patches.channels;
      row = line;
      col = at / patches.channels;
      offset = row * patches.row_stride + at;
    } else {
      channel = line / patches.patch_height;
      row = line % patches.patch_height;
      col = at;
      offset = channel * patches.channel_stride + row * patches.row_stride + col * patches.col_stride;
    }
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      factor[e] = patches.affine ? patches.affine[channel] : 1.0f;
      shift[e] = patches.affine ? patches.affine[patches.channels + channel] : 0.0f;
      if (patches.interleaved && ++channel == patches.channels) channel = 0;
    }
  }
};

// A thread stores kUnit entries at a time: as many as fill a vector where their pixels lie in one row, all of them inside of
// the image or all outside, else one, so that neighbouring threads still load and store neighbours.
template <class Pixel, class Product, int kUnit>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Patches patches, int entries, int run, int64_t first, int64_t count, Product* out, int64_t stride) {
  VLMFAST_SHARED(Corner, corners);
  const auto* pixels = static_cast<const Pixel*>(patches.pixels);
  const int rows_of_block = blockDim.y * kRowsOfThread;
  const int64_t row0 = int64_t(blockIdx.x) * rows_of_block;
  for (int r = threadIdx.y * blockDim.x + threadIdx.x; r < rows_of_block; r += kThreads)
    if (row0 + r < count) corners[r] = corner_of(patches, first + row0 + r);
  __syncthreads();
  const int step = int(gridDim.y * blockDim.x) * kUnit;
  for (int k = int(blockIdx.y * blockDim.x + threadIdx.x) * kUnit; k < stride; k += step) {
    const Unit<kUnit> unit(patches, run, k < entries ? k : 0);
    Pack<Pixel, kUnit> in[kRowsOfThread];
    bool inside[kRowsOfThread];
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int row = r * blockDim.y + threadIdx.y;
      inside[r] = k < entries && row0 + row < count;
      if (!inside[r]) continue;
      const Corner corner = corners[row];
      inside[r] = unit.row < corner.rows && unit.col < corner.cols;
      if (inside[r]) in[r] = pack_at<Pixel, kUnit>(pixels + corner.first + unit.offset);
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int64_t row = row0 + r * blockDim.y + threadIdx.y;
      if (row >= count) break;
      Pack<Product, kUnit> x;
#pragma unroll
      for (int e = 0; e < kUnit; ++e)
        x.of[e] = from_float<Product>(inside[r] ? fmaf(to_float(in[r].of[e]), unit.factor[e], unit.shift[e]) : 0.0f);
      *reinterpret_cast<Pack<Product, kUnit>*>(out + row * stride + k) = x;
    }
  }
}

// Whether units of so many pixels are neighbours in memory, aligned, and in one row as rows_kernel wants them.
template <class Pixel>
bool come_in_units(const Patches& patches, int unit) {
  const int line = patches.width * (patches.interleaved ? patches.channels : 1);
  const int64_t elements = std::min<int64_t>(unit, kVectorBytes / sizeof(Pixel)), bytes = elements * sizeof(Pixel);
  return (patches.interleaved || (patches.col_stride == 1 && patches.channel_stride % elements == 0)) &&
         patches.run() % unit == 0 && line % unit == 0 && patches.image_stride % elements == 0 &&
         patches.row_stride % elements == 0 && divides(bytes, patches.pixels);
}

template <int kUnit, class Pixel, class Product>
void launch_rows(const Patches& patches, int64_t first, int64_t count, Product* out, int64_t stride, cudaStream_t stream) {
  const int64_t units = stride / kUnit;
  const dim3 block = block_for_rows_of(units);
  const int64_t rows_of_block = block.y * kRowsOfThread;
  const dim3 grid(unsigned(ceil_div(count, rows_of_block)), unsigned(std::min<int64_t>(ceil_div(units, block.x), 65535)));
  launch(rows_kernel<Pixel, Product, kUnit>, grid, block, rows_of_block * sizeof(Corner), stream, patches, patches.entries(),
         patches.run(), first, count, out, stride);
}

constexpr int kCols = 4;  // of tokens or their gradients, that a thread has

// `count` values and zeros; aligned, there are kCols of them, and they move together.
template <class T>
__device__ Pack<T, kCols> load(const T* in, int count, bool aligned) {
  if (aligned) return pack_at<T, kCols>(in);
  Pack<T, kCols> x;
#pragma unroll
  for (int c = 0; c < kCols; ++c) x.of[c] = c < count ? in[c] : from_float<T>(0.0f);
  return x;
}

template <class T>
__device__ void add(const Pack<T, kCols>& x, float (&sums)[kCols]) {
#pragma unroll
  for (int c = 0; c < kCols; ++c) sums[c] += to_float(x.of[c]);
}

__device__ void add(const Values& values, int64_t at, int count, bool aligned, float (&sums)[kCols]) {
  if (!values.data) return;
  switch (values.type) {
    case Type::float16: return add(load(static_cast<const __half*>(values.data) + at, count, aligned), sums);
    case Type::bfloat16: return add(load(static_cast<const __nv_bfloat16*>(values.data) + at, count, aligned), sums);
    default: return add(load(static_cast<const float*>(values.data) + at, count, aligned), sums);
  }
}

template <class T>
__device__ void store(const float (&sums)[kCols], int count, bool aligned, T* out) {
  Pack<T, kCols> x;
#pragma unroll
  for (int c = 0; c < kCols; ++c) x.of[c] = from_float<T>(sums[c]);
  if (aligned) {
    *reinterpret_cast<Pack<T, kCols>*>(out) = x;
  } else {
#pragma unroll
    for (int c = 0; c < kCols; ++c)
      if (c < count) out[c] = x.of[c];
  }
}

template <class Token>
__global__ void __launch_bounds__(kThreads)
    tokens_kernel(const float* products, Added added, int64_t first, int64_t images, bool aligned, Token* tokens) {
  const int64_t length = added.prefix_tokens + added.taken;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= images * length) return;
  const int64_t image = row / length, token = row % length, slot = token - added.prefix_tokens;
  int64_t position = token;
  if (slot >= 0 && added.keep) position = added.prefix_tokens + added.keep[(first + image) * added.taken + slot];
  position = (first + image) * added.position_image + position * added.width;
  for (int64_t col = threadIdx.x * kCols; col < added.width; col += blockDim.x * kCols) {
    const int count = int(added.width - col < kCols ? added.width - col : kCols);
    float sums[kCols] = {};
    if (slot < 0) {
      add(added.prefix, token * added.width + col, count, aligned, sums);
    } else {
      add(load(products + (image * added.taken + slot) * added.width + col, count, aligned), sums);
      add(added.bias, col, count, aligned, sums);
    }
    add(added.position, position + col, count, aligned, sums);
    store(sums, count, aligned, tokens + (first * length + row) * added.width + col);
  }
}

constexpr int kRowsInFlight = 4;  // loads of a thread at a time

// A block has one token of the result and the columns of a warp. Its warps share the rows out, so that few tokens are work for
// many threads too, and their sums are added in the order of warps.
template <class Token>
__global__ void __launch_bounds__(kThreads)
    token_grad_kernel(TokenGradient grad, const int64_t* order, const int64_t* starts, bool aligned, float* out) {
  constexpr int lanes = kWarp, warps = kThreads / lanes;
  VLMFAST_SHARED(float, of_warps);  // (warps, lanes * kCols)
  const int64_t token = blockIdx.x, patch = token - grad.prefix_tokens;
  const int64_t col = (int64_t(blockIdx.y) * lanes + threadIdx.x) * kCols;
  const int count = int(grad.width - col < kCols ? grad.width - col : kCols);
  const bool listed = order && patch >= 0;
  const unsigned taken = unsigned(grad.taken);
  const int64_t begin = listed ? starts[patch] : 0, end = listed ? starts[patch + 1] : grad.images;
  float sums[kCols] = {};
  if (count > 0) {
    const Token* in = static_cast<const Token*>(grad.data) + col;
    for (int64_t i = begin + threadIdx.y; i < end; i += warps * kRowsInFlight) {
      Pack<Token, kCols> x[kRowsInFlight];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int64_t at = i + r * warps;
        if (at >= end) break;
        int64_t image = at, of_image = token;
        if (listed) {
          const unsigned row = unsigned(order[at]);  // 2^32 of them would be 32 GiB of keep
          image = row / taken;
          of_image = grad.prefix_tokens + row % taken;
        }
        x[r] = load(in + image * grad.image_stride + of_image * grad.token_stride, count, aligned);
      }
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r)
        if (i + r * warps < end) add(x[r], sums);
    }
  }
  store(sums, kCols, true, of_warps + (threadIdx.y * lanes + threadIdx.x) * kCols);
  __syncthreads();
  if (threadIdx.y || count <= 0) return;
  for (int w = 1; w < warps; ++w) add(pack_at<float, kCols>(of_warps + (w * lanes + threadIdx.x) * kCols), sums);
  store(sums, count, aligned, out + token * grad.width + col);
}

// A block has some lines of pixels, of any image and channel. Sums are in the order of rows: repeatable without atomics.
template <class Row, class Pixel>
__global__ void __launch_bounds__(kThreads) scatter_kernel(PatchSums sums, Pixel* out) {
  const int64_t line = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, plane = line / sums.height;
  if (plane >= sums.images * sums.channels) return;
  const int y = int(line % sums.height), channel = int(plane % sums.channels);
  const int first = (channel * sums.patch_height + y % sums.patch_height) * sums.patch_width;
  const int entries = sums.channels * sums.patch_height * sums.patch_width;
  const int64_t patch = (plane / sums.channels * sums.grid_rows + y / sums.patch_height) * sums.grid_cols;
  const float factor = sums.factor ? sums.factor[channel] : 1.0f;
  const auto* rows = static_cast<const Row*>(sums.rows);
  for (int x = threadIdx.x; x < sums.width; x += blockDim.x) {
    const int64_t own = patch + x / sums.patch_width, entry = first + x % sums.patch_width;
    float sum = 0.0f;
    if (sums.order) {
      for (int64_t i = sums.starts[own]; i < sums.starts[own + 1]; ++i) sum += to_float(rows[sums.order[i] * entries + entry]);
    } else {
      sum = to_float(rows[own * entries + entry]);
    }
    out[line * sums.width + x] = from_float<Pixel>(sum * factor);
  }
}

constexpr int kUploaded = 256;  // values: arguments of a kernel have room for 4 KiB
struct Uploaded {
  float of[kUploaded];
};

__global__ void upload_kernel(Uploaded values, int count, float* out) {
  if (int(threadIdx.x) < count) out[threadIdx.x] = values.of[threadIdx.x];
}

}  // namespace

void patch_embed_rows(const Patches& patches, int64_t first, int64_t count, void* out, Type out_type, int64_t stride,
                      cudaStream_t stream) {
  with_float(out_type, [&](auto product) {
    using Product = decltype(product);
    constexpr int unit = kVectorBytes / sizeof(Product);
    const auto from = [&](auto pixel) {
      using Pixel = decltype(pixel);
      auto* rows = static_cast<Product*>(out);
      if (come_in_units<Pixel>(patches, unit))
        launch_rows<unit, Pixel>(patches, first, count, rows, stride, stream);
      else
        launch_rows<1, Pixel>(patches, first, count, rows, stride, stream);
    };
    patches.type == Type::uint8 ? from(uint8_t()) : with_float(patches.type, from);
  });
}

void patch_embed_tokens(const float* products, const Added& added, int64_t first, int64_t images, void* tokens,
                        Type token_type, cudaStream_t stream) {
  const dim3 block = block_for_rows_of(ceil_div(added.width, kCols));
  const int64_t rows = images * (added.prefix_tokens + added.taken);
  bool aligned = added.width % kCols == 0 && divides(kVectorBytes, products) && divides(kVectorBytes, tokens);
  for (const Values& values : {added.bias, added.prefix, added.position})
    aligned = aligned && divides(kVectorBytes, values.data);
  with_float(token_type, [&](auto token) {
    using Token = decltype(token);
    launch(tokens_kernel<Token>, unsigned(ceil_div(rows, block.y)), block, 0, stream, products, added, first, images, aligned,
           static_cast<Token*>(tokens));
  });
}

void patch_embed_token_grad(const TokenGradient& grad, const int64_t* order, const int64_t* starts, int64_t patches, float* out,
                            cudaStream_t stream) {
  const dim3 block(kWarp, kThreads / kWarp);
  const dim3 grid(unsigned(grad.prefix_tokens + patches), unsigned(ceil_div(grad.width, kWarp * kCols)));
  const bool aligned = grad.width % kCols == 0 && grad.image_stride % kCols == 0 && grad.token_stride % kCols == 0 &&
                       divides(kVectorBytes, grad.data) && divides(kVectorBytes, out);
  with_float(grad.type, [&](auto token) {
    launch(token_grad_kernel<decltype(token)>, grid, block, kThreads * kCols * sizeof(float), stream, grad, order, starts,
           aligned, out);
  });
}

void patch_embed_scatter(const PatchSums& sums, void* out, Type out_type, cudaStream_t stream) {
  const dim3 block = block_for_rows_of(sums.width);
  const int64_t lines = sums.images * sums.channels * sums.height;
  with_float(sums.type, [&](auto row) {
    with_float(out_type, [&](auto pixel) {
      launch(scatter_kernel<decltype(row), decltype(pixel)>, unsigned(ceil_div(lines, block.y)), block, 0, stream, sums,
             static_cast<decltype(pixel)*>(out));
    });
  });
}

void patch_embed_upload(const float* values, int64_t count, float* out, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kUploaded) {
    Uploaded part = {};
    const int64_t some = std::min<int64_t>(count - first, kUploaded);
    std::copy_n(values + first, some, part.of);
    launch(upload_kernel, 1, kUploaded, 0, stream, part, int(some), out + first);
  }
}

}  // namespace vlmfast::cuda
