// Element-wise kernels on the GPU: one thread per pack of 16 bytes where every operand's rows are dense and aligned,
// else per element. Launches go to torch's current stream and neither allocate nor synchronise, so CUDA graphs can
// record them.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../formula.h"
#include "../walk.h"

namespace sdo {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T values[kWidth];
};

// What every kernel needs to find its elements; sizes and strides along dimension 0 are in packs.
struct Layout {
  Walk walk;
  void* data[kMaxOperands];
};

// One pack of each operand. kRank bounds the number of dimensions that the walk has.
template <class T, int kWidth, int kRank>
class Cursor {
 public:
  __device__ Cursor(const Layout& layout, int64_t index) : layout_(layout) {
#pragma unroll
    for (int d = 0; d < kRank; ++d) {
      place_[d] = index;
      if (d + 1 < kRank && index > 0) {
        const int64_t size = layout.walk.size[d];
        index /= size;
        place_[d] -= index * size;
      }
    }
  }

  __device__ void load(int k, Acc<T> (&values)[kWidth]) const {
    const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(address(k));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = static_cast<Acc<T>>(pack.values[i]);
  }

  __device__ void store(int k, const Acc<T> (&values)[kWidth]) const {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) pack.values[i] = static_cast<T>(values[i]);
    *reinterpret_cast<Pack<T, kWidth>*>(address(k)) = pack;
  }

 private:
  __device__ T* address(int k) const {
    int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < kRank; ++d) offset += place_[d] * layout_.walk.stride[d][k];
    return static_cast<T*>(layout_.data[k]) + offset;
  }

  const Layout& layout_;
  int64_t place_[kRank];
};

template <class Body, int kWidth, int kRank>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const __grid_constant__ Layout layout, const __grid_constant__ Body body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 1  // unrolled, every thread would begin with a division for the number of rounds, which is nearly always
                  // one
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < layout.walk.numel; i += step)
    body.template operator()<kWidth>(Cursor<typename Body::Element, kWidth, kRank>(layout, i));
}

// The launches' device, and the caller's again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device));
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  // Looked up, not linked: the CPU build of torch, which loads this library too, lacks it.
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch's current CUDA stream cannot be had");
  return static_cast<cudaStream_t>(stream);
}

inline bool packs_fit(const Layout& layout, int width) {
  const Walk& walk = layout.walk;
  if (!walk.dense_rows() || walk.size[0] % width != 0) return false;
  for (int k = 0; k < walk.operands; ++k) {
    if (reinterpret_cast<uintptr_t>(layout.data[k]) % 16 != 0) return false;
    for (int d = 1; d < walk.rank; ++d)
      if (walk.stride[d][k] % width != 0) return false;
  }
  return true;
}

// body.operator()<kWidth>(cursor) for every pack of the operands, of element type Body::Element.
template <class Body>
void for_each_pack(const Operands& operands, const Body& body) {
  constexpr int kWidth = 16 / sizeof(typename Body::Element);
  Layout layout{Walk(operands.tensors), {}};
  Walk& walk = layout.walk;
  if (walk.numel == 0) return;
  for (int k = 0; k < walk.operands; ++k) layout.data[k] = operands.data(k);
  const int32_t device = operands.tensors[0]->get_device();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const bool packed = packs_fit(layout, kWidth);
  if (packed) {
    walk.numel /= kWidth;
    walk.size[0] /= kWidth;
    std::fill(walk.stride[0], walk.stride[0] + walk.operands, int64_t{kWidth});
  }
  const unsigned blocks = static_cast<unsigned>(std::min((walk.numel + kThreads - 1) / kThreads, kMaxBlocks));
  if (!packed)
    elementwise_kernel<Body, 1, kMaxRank><<<blocks, kThreads, 0, stream>>>(layout, body);
  else if (walk.rank > 1)
    elementwise_kernel<Body, kWidth, kMaxRank><<<blocks, kThreads, 0, stream>>>(layout, body);
  else
    elementwise_kernel<Body, kWidth, 1><<<blocks, kThreads, 0, stream>>>(layout, body);
  DeviceGuard::check(cudaGetLastError());
}

// Calls f(static_cast<T*>(nullptr)) with the C++ type of a floating dtype.
template <class F>
inline void dispatch(torch::headeronly::ScalarType dtype, F&& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Half: return f(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "expected a floating dtype, got scalar type ", static_cast<int>(dtype));
  }
}

}  // namespace sdo
