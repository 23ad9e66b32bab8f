// Runs CUDA kernels under g++: the threads of a block are fibers, the blocks of a grid come in turn. Between barriers the
// threads run one after another, in an order that VLMFAST_HOST_ORDER seeds: a kernel without races gives the same bits in
// every order. Dynamic shared memory is as large as asked for (an address sanitizer sees what goes beyond), and holds NaNs
// before each block. Only what the kernels use is here.
#pragma once

#include <math.h>  // CUDA has its functions outside of std
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;

using std::isinf;
using std::isnan;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

namespace vlmfast_host {

constexpr int kWarp = 32;

// What a lane brings to an operation of its warp, which runs once all lanes are there.
using WarpOperation = void (*)(void* const* lanes);

enum class State { ready, at_barrier, in_warp_operation, done };

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// A place to go on from, of a thread of the block or of the scheduler. Once a fiber runs, switches are jumps: unlike
// swapcontext they make no system call. The address sanitizer is told of each.
struct Place {
  jmp_buf jump;
  void* sanitizer_stack = nullptr;
};

struct Fiber {
  Place place;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started = false;
  dim3 index;
  State state;
  WarpOperation operation;
  void* argument;
};

// Aligned as a GPU's shared memory is, and not a byte longer than asked for.
struct AlignedDelete {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(128)); }
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;  // they serve one block after the other
  Place scheduler;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_bytes = 0;
  Fiber* running = nullptr;
  std::unique_ptr<unsigned char[], AlignedDelete> shared;
  size_t shared_bytes = 0;
  void (*body)(void*) = nullptr;
  void* body_argument = nullptr;
  std::exception_ptr error;
  unsigned seed = 0;
  std::mt19937 order;
};

inline Block block;
inline std::mutex launches;

inline unsigned char* shared_memory() { return block.shared.get(); }

inline void before_switch([[maybe_unused]] Place& from, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer_stack, bottom, bytes);
#endif
}

inline void after_switch([[maybe_unused]] Place& to, [[maybe_unused]] bool from_scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(to.sanitizer_stack, from_scheduler ? &block.scheduler_bottom : nullptr,
                                  from_scheduler ? &block.scheduler_bytes : nullptr);
#endif
}

// Back to the scheduler, and here again once this thread is ready.
inline void pause(State state) {
  Fiber& self = *block.running;
  self.state = state;
  before_switch(self.place, block.scheduler_bottom, block.scheduler_bytes);
  if (_setjmp(self.place.jump) == 0) _longjmp(block.scheduler.jump, 1);
  after_switch(block.running->place, true);
}

inline void enter() {
  after_switch(block.running->place, true);
  for (;;) {
    try {
      block.body(block.body_argument);
    } catch (...) {
      block.error = std::current_exception();
    }
    pause(State::done);
  }
}

inline void resume(Fiber& fiber) {
  block.running = &fiber;
  threadIdx = fiber.index;
  before_switch(block.scheduler, fiber.stack.get(), kStackBytes);
  if (_setjmp(block.scheduler.jump) == 0) {
    if (block.running->started) _longjmp(block.running->place.jump, 1);
    block.running->started = true;
    setcontext(&block.running->start);
  }
  after_switch(block.scheduler, false);
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

inline void add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = std::make_unique<char[]>(kStackBytes);
  getcontext(&fiber->start);
  fiber->start.uc_stack.ss_sp = fiber->stack.get();
  fiber->start.uc_stack.ss_size = kStackBytes;
  fiber->start.uc_link = nullptr;
  makecontext(&fiber->start, enter, 0);
  block.fibers.push_back(std::move(fiber));
}

inline void warp_operation(WarpOperation operation, void* argument) {
  block.running->operation = operation;
  block.running->argument = argument;
  pause(State::in_warp_operation);
}

// Runs the operations of the warps whose lanes have all arrived. Returns whether there was one.
inline bool release_warps(size_t threads) {
  bool released = false;
  for (size_t first = 0; first < threads; first += kWarp) {
    void* arguments[kWarp];
    bool all = true;
    for (size_t lane = 0; lane < kWarp && all; ++lane) {
      const Fiber& fiber = *block.fibers[first + lane];
      all = fiber.state == State::in_warp_operation;
      if (all && fiber.operation != block.fibers[first]->operation)
        throw std::logic_error("cuda_host: lanes of a warp are in different operations");
      arguments[lane] = fiber.argument;
    }
    if (!all) continue;
    if (block.fibers[first]->operation) block.fibers[first]->operation(arguments);
    for (size_t lane = 0; lane < kWarp; ++lane) block.fibers[first + lane]->state = State::ready;
    released = true;
  }
  return released;
}

inline void run_block(size_t threads) {
  if (block.shared) std::memset(block.shared.get(), 0xff, block.shared_bytes);
  for (size_t t = 0; t < threads; ++t) {
    Fiber& fiber = *block.fibers[t];
    fiber.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    fiber.state = State::ready;
  }
  std::vector<size_t> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  for (;;) {
    if (block.seed) std::shuffle(turn.begin(), turn.end(), block.order);
    bool ran = false;
    for (size_t t : turn)
      if (block.fibers[t]->state == State::ready) {
        resume(*block.fibers[t]);
        ran = true;
      }
    if (release_warps(threads) || ran) continue;
    const auto in = [&](State state) {
      return std::count_if(block.fibers.begin(), block.fibers.begin() + threads,
                           [&](const auto& fiber) { return fiber->state == state; });
    };
    if (size_t(in(State::done)) == threads) return;
    if (size_t(in(State::at_barrier)) != threads)
      throw std::logic_error("cuda_host: a barrier that " + std::to_string(in(State::at_barrier)) + " of " +
                             std::to_string(threads) + " threads reach; " + std::to_string(in(State::done)) +
                             " have returned, " + std::to_string(in(State::in_warp_operation)) +
                             " wait for lanes of their warp");
    for (size_t t = 0; t < threads; ++t) block.fibers[t]->state = State::ready;
  }
}

inline std::map<const void*, size_t> most_shared;  // bytes of dynamic shared memory by kernel, over its launches

template <class Body>
void run(const void* kernel, dim3 grid, dim3 threads_of_block, size_t shared_bytes, Body body) {
  const std::lock_guard<std::mutex> lock(launches);
  const size_t threads = size_t(threads_of_block.x) * threads_of_block.y * threads_of_block.z;
  if (threads == 0 || threads > 1024 || threads % kWarp)
    throw std::logic_error("cuda_host: a block must have 32 to 1024 threads in whole warps; got " + std::to_string(threads));
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
    throw std::logic_error("cuda_host: grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                           std::to_string(grid.z) + ") cannot be launched");
  if (shared_bytes > 232448) throw std::logic_error("cuda_host: no GPU has so much shared memory");
  const char* seed = std::getenv("VLMFAST_HOST_ORDER");
  block.seed = seed ? unsigned(std::strtoul(seed, nullptr, 10)) : 0;
  block.order.seed(block.seed);
  block.shared_bytes = shared_bytes;
  most_shared[kernel] = std::max(most_shared[kernel], shared_bytes);
  block.shared.reset(shared_bytes ? new (std::align_val_t(128)) unsigned char[shared_bytes] : nullptr);
  while (block.fibers.size() < threads) add_fiber();
  block.body = [](void* argument) { (*static_cast<Body*>(argument))(); };
  block.body_argument = &body;
  gridDim = grid;
  blockDim = threads_of_block;
  std::vector<size_t> turn(size_t(grid.x) * grid.y * grid.z);
  std::iota(turn.begin(), turn.end(), 0);
  if (block.seed) std::shuffle(turn.begin(), turn.end(), block.order);
  for (size_t b : turn) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    try {
      run_block(threads);
    } catch (...) {
      block.fibers.clear();  // some are in the midst of a kernel
      throw;
    }
  }
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  if (mask != 0xffffffffu) throw std::logic_error("cuda_host: a shuffle of fewer than all lanes");
  struct Lane {
    T value, result;
    unsigned from;
  } own{value, value, from};
  warp_operation(
      [](void* const* lanes) {
        for (int i = 0; i < kWarp; ++i) {
          auto* self = static_cast<Lane*>(lanes[i]);
          self->result = static_cast<Lane*>(lanes[self->from])->value;
        }
      },
      &own);
  return own.result;
}

}  // namespace vlmfast_host

inline void __syncthreads() { vlmfast_host::pause(vlmfast_host::State::at_barrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) throw std::logic_error("cuda_host: __syncwarp of fewer than all lanes");
  vlmfast_host::warp_operation(nullptr, nullptr);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return vlmfast_host::shuffle(mask, value, vlmfast_host::lane() ^ unsigned(bits));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return vlmfast_host::shuffle(mask, value, unsigned(from) % vlmfast_host::kWarp);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = vlmfast_host::lane(), from = lane + delta;
  return vlmfast_host::shuffle(mask, value, from < vlmfast_host::kWarp ? from : lane);
}

// Tiles of 16 x 16 with float sums. Which element a lane holds where is unspecified in CUDA, so here it is no useful order.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  static constexpr int num_elements = 8;
  T x[num_elements];
};

constexpr int place(int lane, int element) { return (37 * (element * vlmfast_host::kWarp + lane) + 11) % 256; }

template <class T>
void check_access(const T* pointer, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32) throw std::logic_error("cuda_host: a wmma tile not aligned to 32 bytes");
  if (stride * sizeof(T) % 16) throw std::logic_error("cuda_host: a wmma stride that is no multiple of 16 bytes");
}

template <class Fragment, class T>
void fill_fragment(Fragment& fragment, T value) {
  std::fill(std::begin(fragment.x), std::end(fragment.x), value);
}

// Each lane reads and writes at its own time: a missing __syncwarp shows in some order of threads.
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& fragment, const T* pointer, unsigned stride) {
  check_access(pointer, stride);
  for (int e = 0; e < fragment.num_elements; ++e) {
    const int p = place(vlmfast_host::lane(), e), row = p / 16, col = p % 16;
    fragment.x[e] = std::is_same_v<Layout, row_major> ? pointer[row * stride + col] : pointer[col * stride + row];
  }
}

inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& fragment, const float* pointer, unsigned stride,
                             layout_t layout) {
  check_access(pointer, stride);
  for (int e = 0; e < fragment.num_elements; ++e) {
    const int p = place(vlmfast_host::lane(), e), row = p / 16, col = p % 16;
    fragment.x[e] = layout == mem_row_major ? pointer[row * stride + col] : pointer[col * stride + row];
  }
}

inline void store_matrix_sync(float* pointer, const fragment<accumulator, 16, 16, 16, float>& fragment, unsigned stride,
                              layout_t layout) {
  check_access(pointer, stride);
  for (int e = 0; e < fragment.num_elements; ++e) {
    const int p = place(vlmfast_host::lane(), e), row = p / 16, col = p % 16;
    (layout == mem_row_major ? pointer[row * stride + col] : pointer[col * stride + row]) = fragment.x[e];
  }
}

inline float widened(__half x) { return __half2float(x); }
inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, A>& a,
              const fragment<matrix_b, 16, 16, 16, T, B>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  struct Lane {
    float *d;
    const T *a, *b;
    const float* c;
  } own{d.x, a.x, b.x, c.x};
  vlmfast_host::warp_operation(
      [](void* const* lanes) {
        float left[256], right[256], sum[256];
        for (int lane = 0; lane < vlmfast_host::kWarp; ++lane)
          for (int e = 0; e < 8; ++e) {
            const auto* own = static_cast<const Lane*>(lanes[lane]);
            left[place(lane, e)] = widened(own->a[e]);
            right[place(lane, e)] = widened(own->b[e]);
            sum[place(lane, e)] = own->c[e];
          }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            for (int col = 0; col < 16; ++col) sum[row * 16 + col] += left[row * 16 + k] * right[k * 16 + col];
        for (int lane = 0; lane < vlmfast_host::kWarp; ++lane)
          for (int e = 0; e < 8; ++e) static_cast<const Lane*>(lanes[lane])->d[e] = sum[place(lane, e)];
      },
      &own);
}

}  // namespace nvcuda::wmma
