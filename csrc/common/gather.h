// Runs of elements of any storage type between images and scratch in the arithmetic type.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace gather {

using simd::Acc;
using simd::Vec;

// A vector of the elements at p, of which n are there; beyond them it is zero.
template <class T>
inline Vec<Acc<T>> load(const T* p, int64_t n) {
  return n >= simd::kLanes<Acc<T>> ? simd::load(p) : simd::load_partial(p, static_cast<int>(n));
}
template <class T>
inline void store(T* p, Vec<Acc<T>> v, int64_t n) {
  n >= simd::kLanes<Acc<T>> ? simd::store(p, v) : simd::store_partial(p, v, static_cast<int>(n));
}

// n elements, and zeros up to a whole vector. Also asks for those at `ahead`, which will be read soon: the planes are
// too many for the processor to see it.
template <class T>
inline void run(const T* in, const T* ahead, int64_t n, Acc<T>* out) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(ahead + i);
  int64_t i = 0;
  for (; i + simd::kLanes<Acc<T>> <= n; i += simd::kLanes<Acc<T>>) simd::store(out + i, simd::load(in + i));
  if (i < n) simd::store(out + i, load(in + i, n - i));
}

// out = in + offset + add, the last where there is one.
template <class T>
inline void scatter(const Acc<T>* in, int64_t n, Acc<T> offset, const T* add, T* out) {
  int64_t i = 0;
  for (; i + simd::kLanes<Acc<T>> <= n; i += simd::kLanes<Acc<T>>) {
    const Vec<Acc<T>> value = simd::load(in + i) + offset;
    simd::store(out + i, add ? value + simd::load(add + i) : value);
  }
  if (i == n) return;
  const Vec<Acc<T>> value = simd::load(in + i) + offset;
  store(out + i, add ? value + load(add + i, n - i) : value, n - i);
}

}  // namespace gather
