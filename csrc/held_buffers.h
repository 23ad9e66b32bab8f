// Memory that is held from call to call.
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <vector>

namespace vlmfast {

// Tensors that outlive the call. Fresh memory costs as much as a quarter of the whole op in page faults, so that of the last
// `count` calls serves again once nobody else holds it: a training loop needs it in every step. There is one such object for
// each use, a static of the function that takes from it; release_memory() of csrc/ops.h empties them all.
class HeldBuffers {
 public:
  explicit HeldBuffers(size_t count);
  HeldBuffers(const HeldBuffers&) = delete;

  // large_pages: asks the system for them; fresh ones cost more than small ones do, so only for what seldom changes its size.
  at::Tensor take(at::IntArrayRef sizes, at::ScalarType dtype, bool large_pages);

  // Lets go of all; the bytes that nobody else holds, and which are so freed.
  int64_t release();

 private:
  std::mutex mutex_;
  std::vector<c10::Storage> held_;
  size_t oldest_ = 0;
};

}  // namespace vlmfast
