// Element-wise work on tensors of one shape and any strides: the operands, and one order of iteration for all of them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace sdo {

using torch::stable::Tensor;

constexpr int kMaxTerms = 8;
constexpr int kMaxOperands = 4 + kMaxTerms;
constexpr int kMaxRank = 6;

struct Operands {
  std::vector<const Tensor*> tensors;
  std::vector<bool> written;

  // The place of the tensor among the operands, -1 for none.
  int add(const Tensor& tensor, bool writes = false) {
    tensors.push_back(&tensor);
    written.push_back(writes);
    return static_cast<int>(tensors.size()) - 1;
  }
  int add(const std::optional<Tensor>& tensor, bool writes = false) { return tensor ? add(*tensor, writes) : -1; }

  void* data(int k) const {
    return written[k] ? tensors[k]->mutable_data_ptr() : const_cast<void*>(tensors[k]->const_data_ptr());
  }
};

// Dimensions sorted by the first operand's strides, innermost first, and merged where every operand allows it, so that
// dense tensors of one layout become a single run.
struct Walk {
  int rank = 0;
  int operands = 0;
  int64_t numel = 0;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank][kMaxOperands] = {};

  explicit Walk(const std::vector<const Tensor*>& tensors) : operands(static_cast<int>(tensors.size())) {
    const Tensor& first = *tensors[0];
    numel = first.numel();
    std::vector<int64_t> dims;
    for (int64_t d = first.dim() - 1; d >= 0; --d)
      if (first.size(d) != 1) dims.push_back(d);
    std::stable_sort(dims.begin(), dims.end(), [&](int64_t i, int64_t j) { return first.stride(i) < first.stride(j); });
    for (int64_t d : dims) {
      bool merges = rank > 0;
      for (int k = 0; k < operands && merges; ++k)
        merges = tensors[k]->stride(d) == stride[rank - 1][k] * size[rank - 1];
      if (merges) {
        size[rank - 1] *= first.size(d);
        continue;
      }
      STD_TORCH_CHECK(rank < kMaxRank, "expected at most ", kMaxRank, " dimensions that cannot be merged");
      size[rank] = first.size(d);
      for (int k = 0; k < operands; ++k) stride[rank][k] = tensors[k]->stride(d);
      ++rank;
    }
    if (rank == 0) {
      rank = 1;
      size[0] = 1;
      std::fill(stride[0], stride[0] + operands, int64_t{1});
    }
  }

  // Whether the innermost dimension is one run of memory in every operand.
  bool dense_rows() const {
    return std::all_of(stride[0], stride[0] + operands, [](int64_t s) { return s == 1; });
  }
};

// Calls f with the flag as a compile-time constant.
template <class F>
inline void with_flag(bool flag, F&& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace sdo
