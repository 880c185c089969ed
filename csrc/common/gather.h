// Runs of elements of any storage type between images and scratch in the arithmetic type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

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

// Asks for n elements, which will be read soon: the planes are too many for the processor to see it.
template <class T>
inline void prefetch(const T* in, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(in + i);
}

// n elements, and zeros up to a whole vector.
template <class T>
inline void run(const T* in, int64_t n, Acc<T>* out) {
  int64_t i = 0;
  for (; i + simd::kLanes<Acc<T>> <= n; i += simd::kLanes<Acc<T>>) simd::store(out + i, simd::load(in + i));
  if (i < n) simd::store(out + i, load(in + i, n - i));
}

// n pairs of two planes' elements, and zeros up to a whole vector; zeros for a plane that there is not.
inline void pairs(const simd::BFloat16* first, const simd::BFloat16* second, int64_t n, simd::Pair* out) {
  for (int64_t i = 0; i < n; i += simd::kFloats) {
    const simd::VecF low = load(first + i, n - i), high = second ? load(second + i, n - i) : simd::VecF{};
    simd::store_raw(out + i, (reinterpret_cast<simd::VecU>(low) >> 16) | reinterpret_cast<simd::VecU>(high));
  }
}

// A tile of `channels` planes, n pixels of each, as the rows of a product, `pitch` apart: plane(c) is where that of
// channel c begins. A row of pairs holds two planes.
template <class A, class Plane>
inline void tile(int64_t channels, int64_t n, Plane&& plane, A* rows, int64_t pitch) {
  constexpr int64_t step = std::is_same_v<A, simd::Pair> ? 2 : 1;
  for (int64_t c = 0; c < channels; c += step, rows += pitch) {
    for (int64_t next = c + step; next < std::min(c + 2 * step, channels); ++next) prefetch(plane(next), n);
    if constexpr (step == 2)
      pairs(plane(c), c + 1 < channels ? plane(c + 1) : nullptr, n, rows);
    else
      run(plane(c), n, rows);
  }
}

// The same planes as rows for sums over their pixels: of numbers, or of pairs of neighbouring pixels; zeros up to a
// whole vector.
template <class A, class Plane>
inline void lines(int64_t channels, int64_t n, Plane&& plane, A* rows, int64_t pitch) {
  if constexpr (std::is_same_v<A, simd::Pair>) {
    constexpr int64_t lanes = 2 * simd::kLanes<A>;
    for (int64_t c = 0; c < channels; ++c, rows += pitch) {
      if (c + 1 < channels) prefetch(plane(c + 1), n);
      auto* row = reinterpret_cast<simd::BFloat16*>(rows);
      std::copy_n(plane(c), n, row);
      std::fill(row + n, row + (n + lanes - 1) / lanes * lanes, simd::BFloat16(0.0f));
    }
  } else {
    tile(channels, n, plane, rows, pitch);
  }
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
