// Element-wise loops on the CPU. Every element goes through the same vector arithmetic, wherever it lies in a row, so
// results do not depend on strides or on the number of threads.
#pragma once

#include "../formula.h"
#include "../walk.h"
#include "tensor.h"

namespace sdo {

constexpr int64_t kGrain = 32768;

// body(load, store): load(k) is a vector of operand k in the arithmetic type, store(k, v) writes one.
template <class T, class Body>
void for_each_vector(const Operands& operands, const Body& body) {
  using A = simd::Acc<T>;
  using V = simd::Vec<A>;
  constexpr int n = simd::kLanes<A>;
  const Walk walk(operands.tensors);
  if (walk.numel == 0) return;
  T* data[kMaxOperands] = {};
  for (int k = 0; k < walk.operands; ++k) data[k] = static_cast<T*>(operands.data(k));
  const int64_t row = walk.size[0];
  const bool dense = walk.dense_rows();

  torch::stable::parallel_for(0, walk.numel, kGrain, [&](int64_t begin, int64_t end) {
    const Body on_vectors = body;  // a local copy that no store can alias stays in registers
    T* at[kMaxOperands] = {};
    while (begin < end) {
      int64_t index = begin / row;
      const int64_t j = begin % row, count = std::min(row - j, end - begin);
      for (int k = 0; k < walk.operands; ++k) at[k] = data[k] + j * walk.stride[0][k];
      for (int d = 1; d < walk.rank; ++d) {
        const int64_t i = index % walk.size[d];
        index /= walk.size[d];
        for (int k = 0; k < walk.operands; ++k) at[k] += i * walk.stride[d][k];
      }
      int64_t done = 0;
      if (dense)
        for (; done + n <= count; done += n)
          on_vectors(
              [&](int k) { return simd::load(at[k] + done); }, [&](int k, V v) { simd::store(at[k] + done, v); });
      for (; done < count; done += n) {
        const int left = static_cast<int>(std::min<int64_t>(n, count - done));
        on_vectors(
            [&](int k) {
              T lanes[n] = {};
              for (int i = 0; i < left; ++i) lanes[i] = at[k][(done + i) * walk.stride[0][k]];
              return simd::load(lanes);
            },
            [&](int k, V v) {
              T lanes[n];
              simd::store(lanes, v);
              for (int i = 0; i < left; ++i) at[k][(done + i) * walk.stride[0][k]] = lanes[i];
            });
      }
      begin += count;
    }
  });
}

}  // namespace sdo
