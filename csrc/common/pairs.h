// Products of bf16 numbers in pairs, by the instructions that processors with AVX512-BF16 have for them. Whether they
// run is decided where the library runs: so they are written in assembly, which no compiler flag has to allow.
#pragma once

#include <atomic>
#include <type_traits>

#include "simd.h"

namespace pairs {

#if defined(__AVX512F__)
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

inline bool supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Whether bf16 maps go into products as pairs.
inline std::atomic<bool>& enabled() {
  static std::atomic<bool> value{supported()};
  return value;
}

constexpr int64_t kFewest = 8;  // channels of a product that is worth rounding weights

inline bool taken(int64_t channels) { return enabled() && channels >= kFewest; }

// How maps of T go into products: in their arithmetic type, or in pairs; f gets a value of that type.
template <class T, class F>
inline void choose(int64_t channels, F&& f) {
  if constexpr (kCompiled && std::is_same_v<T, simd::BFloat16>)
    if (taken(channels)) return f(simd::Pair{});
  f(simd::Acc<T>{});
}

}  // namespace pairs
