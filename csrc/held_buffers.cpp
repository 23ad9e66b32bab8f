#include "held_buffers.h"

#include <ATen/Functions.h>

#include <cstdint>

#include "ops.h"

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace vlmfast {
namespace {

// All that there are; they are never destroyed before the process ends.
struct Registry {
  std::mutex mutex;
  std::vector<HeldBuffers*> buffers;
};

Registry& registry() {
  static auto* all = new Registry;
  return *all;
}

// Asks the system for large pages under a tensor that is about to be written for the first time. Only for what is held and
// written again: where a virtual machine has to get the memory first, large pages cost more than small ones, once.
void advise_huge_pages([[maybe_unused]] const at::Tensor& fresh) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + fresh.nbytes()) / page * page;
  // Advice: where the system does not take it, small pages serve.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

HeldBuffers::HeldBuffers(size_t count) : held_(count) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().buffers.push_back(this);
}

at::Tensor HeldBuffers::take(at::IntArrayRef sizes, at::ScalarType dtype, bool large_pages) {
  constexpr size_t most = size_t(1) << 30;  // a larger one is not held between calls
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  for (const auto& storage : held_)
    if (storage && storage.use_count() == 1 && storage.nbytes() == bytes)
      return at::empty({0}, dtype).set_(storage, 0, sizes);
  auto& place = held_[oldest_];
  place = c10::Storage();
  auto fresh = at::empty(sizes, dtype);
  if (bytes <= most) {
    if (large_pages) advise_huge_pages(fresh);
    place = fresh.storage();
    oldest_ = (oldest_ + 1) % held_.size();
  }
  return fresh;
}

int64_t HeldBuffers::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t freed = 0;
  for (auto& storage : held_) {
    if (storage && storage.use_count() == 1) freed += int64_t(storage.nbytes());
    storage = c10::Storage();
  }
  return freed;
}

int64_t release_memory() {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  int64_t freed = 0;
  for (auto* buffers : registry().buffers) freed += buffers->release();
  return freed;
}

}  // namespace vlmfast
