// How Python's arguments become those of csrc/ops.h, where pybind11 and torch do not say.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "ops.h"

namespace pybind11::detail {

// Of a named tuple.
template <>
struct type_caster<vlmfast::Media> {
  PYBIND11_TYPE_CASTER(vlmfast::Media, const_name("Media"));

  bool load(handle source, bool convert) {
    using Tensor = std::optional<at::Tensor>;
    make_caster<std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, double, bool>> fields;
    if (!fields.load(source, convert)) return false;
    std::apply([&](auto&&... field) { value = vlmfast::Media{std::move(field)...}; },
               cast_op<std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, double, bool>>(std::move(fields)));
    return true;
  }
};

}  // namespace pybind11::detail
