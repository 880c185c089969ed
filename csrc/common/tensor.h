// What every CPU kernel needs around the stable ABI's tensors: layouts, scalars read by dtype, dtype dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "memory.h"
#include "pool.h"
#include "simd.h"

// Since torch 2.11; the address is null in older ones.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace tensor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element strides of a (B, C, H, W) tensor.
struct Strides {
  int64_t b, c, h, w;
};

inline Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

inline bool is_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return c > 1 && !x.is_contiguous() && x.stride(1) == 1 && (w == 1 || x.stride(3) == c) &&
         (h == 1 || x.stride(2) == w * c) && (x.size(0) == 1 || x.stride(0) == h * w * c);
}

inline size_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Double: return 8;
    default: return 4;
  }
}

// Of sums of this dtype's numbers.
inline ScalarType dtype_of_sums(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// By the shims, not by the dispatcher: its boxed calls take microseconds.
inline Tensor empty(
    const Tensor& like, const std::vector<int64_t>& size, bool channels_last = false,
    std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  const int64_t rank = static_cast<int64_t>(size.size());
  std::vector<int64_t> strides(rank), order(rank);
  for (int64_t i = 0; i < rank; ++i) order[i] = rank - 1 - i;
  if (channels_last) order = {1, 3, 2, 0};
  int64_t numel = 1;
  for (int64_t i : order) {
    strides[i] = std::max<int64_t>(1, numel);
    numel *= size[i];
  }
  namespace detail = torch::stable::detail;
  const auto device = like.device();
  const int32_t dtype_code = detail::to<int32_t>(detail::from(type)),
                device_type = detail::to<int32_t>(detail::from(device.type()));
  AtenTensorHandle handle;
  const size_t bytes = static_cast<size_t>(numel) * size_of(type);
  if (torch_from_blob && bytes >= pool::kSmallest) {
    const pool::Pool::Block block = pool::instance().take(bytes);
    const auto error = torch_from_blob(
        block.memory, rank, size.data(), strides.data(), 0, dtype_code, device_type, device.index(), &handle,
        aoti_torch_layout_strided(), nullptr, 0,
        [](void* memory, void* context) { pool::instance().give({memory, reinterpret_cast<size_t>(context)}); },
        reinterpret_cast<void*>(block.bytes));
    if (error != 0) pool::instance().give(block);
    STD_TORCH_CHECK(error == 0, "torch_from_blob failed");
  } else {
    const auto error =
        aoti_torch_empty_strided(rank, size.data(), strides.data(), dtype_code, device_type, device.index(), &handle);
    if (error != 0) memory::fail(bytes);
  }
  return Tensor(handle);
}

// x itself where it is in this format, else a copy.
inline Tensor as_contiguous(const Tensor& x, bool channels_last = false) {
  if (channels_last ? is_channels_last(x) : x.is_contiguous()) return x;
  const auto size = x.sizes();
  Tensor copy = empty(x, {size.begin(), size.end()}, channels_last);
  torch::stable::copy_(copy, x);
  return copy;
}

// x itself where its rows are dense, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& x) { return x.size(3) <= 1 || x.stride(3) == 1 ? x : as_contiguous(x); }

inline Tensor with_format(const Tensor& x, bool channels_last) {
  return channels_last ? as_contiguous(x, true) : with_dense_rows(x);
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
  const Tensor dense = as_contiguous(parameter);
  std::vector<A> values(dense.numel());
  dispatch(dense.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* p = static_cast<const T*>(dense.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(p[i]);
  });
  return values;
}

// A tensor of this size and dtype, on the device of `like`, holding `values`.
template <class A>
inline Tensor write(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype, const A* values) {
  Tensor out = empty(like, size, false, dtype);
  dispatch(out.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* p = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < out.numel(); ++i) p[i] = static_cast<T>(values[i]);
  });
  return out;
}

// A tensor shaped like `parameter`, in its dtype, holding `values`.
template <class A>
inline Tensor write(const Tensor& parameter, const A* values) {
  const auto size = parameter.sizes();
  return write(parameter, {size.begin(), size.end()}, parameter.scalar_type(), values);
}

// Writes the gradients of parameters, each shaped and typed like its parameter: zeros where there are no values, as of
// no images; empty, on the device of `like`, where there is no parameter or nobody needs gradients.
struct GradientWriter {
  const Tensor& like;
  bool needed;

  Tensor operator()(const std::optional<Tensor>& parameter, const std::vector<double>& values) const {
    if (!needed || !parameter) return empty(like, {0});
    return write(*parameter, values.empty() ? std::vector<double>(parameter->numel()).data() : values.data());
  }
};

}  // namespace tensor
