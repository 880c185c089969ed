// What every CPU kernel needs around the stable ABI's tensors: layouts, scalars read by dtype, dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "simd.h"

namespace tensor {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element strides of a (B, C, H, W) tensor.
struct Strides {
  int64_t b, c, h, w;
};

inline Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

inline bool is_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return c > 1 && !x.is_contiguous() && x.stride(1) == 1 && (w == 1 || x.stride(3) == c) && (h == 1 || x.stride(2) == w * c) &&
         (x.size(0) == 1 || x.stride(0) == h * w * c);
}

// x itself where its rows are dense, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor with_format(const Tensor& x, bool channels_last) {
  if (channels_last) return is_channels_last(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  return with_dense_rows(x);
}

inline Tensor empty(
    const Tensor& like, std::initializer_list<int64_t> size, bool channels_last = false,
    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::empty(
      size, dtype.value_or(like.scalar_type()), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Calls f(static_cast<T*>(nullptr)) with the C++ type of a floating dtype.
template <class F>
inline void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Half: return f(static_cast<simd::Half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<simd::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "expected a floating dtype, got scalar type ", static_cast<int>(dtype));
  }
}

// The elements of a parameter tensor of any floating dtype and layout.
template <class A>
inline std::vector<A> read(const Tensor& parameter) {
  Tensor dense = torch::stable::contiguous(parameter);
  std::vector<A> values(dense.numel());
  dispatch(dense.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* p = static_cast<const T*>(dense.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(p[i]);
  });
  return values;
}

// A tensor shaped like `parameter`, in its dtype, holding `values`.
template <class A>
inline Tensor write(const Tensor& parameter, const A* values) {
  Tensor out = torch::stable::empty(parameter.sizes(), parameter.scalar_type(), std::nullopt, parameter.device());
  dispatch(out.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* p = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < out.numel(); ++i) p[i] = static_cast<T>(values[i]);
  });
  return out;
}

}  // namespace tensor
