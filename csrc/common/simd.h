// Fixed-width vectors on the compiler's vector extensions (GCC, Clang), as wide as the instruction set this file is
// compiled for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace simd {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// Arithmetic type for storage type T: everything but double computes in float.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// Two numbers of bf16, the first in the low half: what products take as one element.
struct Pair {
  uint32_t bits;
};
template <>
struct AccOf<Pair> {
  using type = float;
};

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kBytes)));
};
template <>
struct VecOf<Pair> {
  typedef uint32_t type __attribute__((vector_size(kBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = kBytes / sizeof(A);

using VecF = Vec<float>;
constexpr int kFloats = kLanes<float>;
using VecU = Vec<Pair>;
typedef uint16_t VecU16 __attribute__((vector_size(kBytes / 2)));

template <class V>
inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store_raw(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class A>
inline Vec<A> broadcast(A a) {
  return a - Vec<A>{};  // unlike 0 + a, exactly a for -0.0 too, so that it costs no instruction
}

inline VecU broadcast(Pair pair) { return pair.bits - VecU{}; }

inline VecF load(const float* p) { return load_raw<VecF>(p); }
inline Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
inline VecU load(const Pair* p) { return load_raw<VecU>(p); }
inline void store(Pair* p, VecU v) { store_raw(p, v); }
inline void store(float* p, VecF v) { store_raw(p, v); }
inline void store(double* p, Vec<double> v) { store_raw(p, v); }

// By the instructions: GCC makes three of an extension, and more of a truncation.
inline VecU extend(VecU16 v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, VecU);
#endif
}
inline VecU16 truncate(VecU v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU16>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, VecU16);
#endif
}

inline VecF load(const BFloat16* p) { return reinterpret_cast<VecF>(extend(load_raw<VecU16>(p)) << 16); }
// v rounded to bf16, in the high halves; rounding must not carry a NaN's payload into infinity.
inline VecU round_high(VecF v) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(v);
  const __mmask16 number = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), number, bits, _mm512_set1_epi32(0x7fff));
  return reinterpret_cast<VecU>(_mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000)));
#else
  const VecU bits = reinterpret_cast<VecU>(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : VecU{} + 0x7fc00000u;
#endif
}
inline void store(BFloat16* p, VecF v) { store_raw(p, truncate(round_high(v) >> 16)); }

// v rounded to bf16, in the low halves: what becomes part of a pair. Denormal numbers become zero.
inline VecU round_for_pair(VecF v) {
#if defined(__AVX512F__)
  VecU16 rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
  return extend(rounded);
#else
  BFloat16 rounded[kFloats];
  store(rounded, v);
  return extend(load_raw<VecU16>(rounded));
#endif
}
inline VecU pair(VecF first, VecF second) { return round_for_pair(first) | round_for_pair(second) << 16; }
// The same of neighbours, of 2 kFloats numbers in a row.
inline VecU pair_neighbours(VecF low, VecF high) {
#if defined(__AVX512F__)
  VecU pairs;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(low), "v"(high));
  return pairs;
#else
  BFloat16 numbers[2 * kFloats];
  store(numbers, low);
  store(numbers + kFloats, high);
  return load_raw<VecU>(numbers);
#endif
}
inline Pair pair(float first, float second) { return {pair(broadcast(first), broadcast(second))[0]}; }
inline VecF first_of(VecU pairs) { return reinterpret_cast<VecF>(pairs << 16); }
inline VecF second_of(VecU pairs) { return reinterpret_cast<VecF>(pairs & 0xffff0000u); }

inline VecF load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecF v;
  for (int i = 0; i < kFloats; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}
inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kFloats; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// The first `count` elements; the other lanes are zero and their memory is not touched.
template <class T>
inline Vec<Acc<T>> load_partial(const T* p, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    return reinterpret_cast<VecF>(_mm512_maskz_loadu_ps(mask, p));
  else if constexpr (std::is_same_v<T, double>)
    return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(mask, p));
  else {
    alignas(kBytes) T elements[kFloats];
    _mm256_store_si256(reinterpret_cast<__m256i*>(elements), _mm256_maskz_loadu_epi16(mask, p));
    return load(elements);
  }
#else
  T elements[kLanes<Acc<T>>] = {};
  for (int i = 0; i < count; ++i) elements[i] = p[i];
  return load(elements);
#endif
}
template <class T>
inline void store_partial(T* p, Vec<Acc<T>> v, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
  else if constexpr (std::is_same_v<T, double>)
    _mm512_mask_storeu_pd(p, mask, reinterpret_cast<__m512d>(v));
  else {
    alignas(kBytes) T elements[kFloats];
    store(elements, v);
    _mm256_mask_storeu_epi16(p, mask, _mm256_load_si256(reinterpret_cast<const __m256i*>(elements)));
  }
#else
  T elements[kLanes<Acc<T>>];
  store(elements, v);
  for (int i = 0; i < count; ++i) p[i] = elements[i];
#endif
}

template <class V>
inline double sum_of_lanes(V v) {
  double sum = 0;
  for (size_t l = 0; l < sizeof(V) / sizeof(v[0]); ++l) sum += v[l];
  return sum;
}

namespace detail {
template <class V, size_t... I>
inline void deinterleave(V a, V b, V& even, V& odd, std::index_sequence<I...>) {
  even = __builtin_shufflevector(a, b, (2 * I)...);
  odd = __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <int kFirst, class V, size_t... I>
inline V window(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (kFirst + I)...);
}
template <class V, size_t... I>
inline void interleave(V even, V odd, V& a, V& b, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  a = __builtin_shufflevector(even, odd, (I / 2 + (I % 2) * n)...);
  b = __builtin_shufflevector(even, odd, (n / 2 + I / 2 + (I % 2) * n)...);
}
template <class V, size_t... I>
inline V reverse(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (sizeof...(I) - 1 - I)...);
}
template <class V>
using Indices = std::make_index_sequence<sizeof(V) / sizeof(std::declval<V>()[0])>;
}  // namespace detail

// Elements kFirst, kFirst + 1, ... of (a, b) as one run.
template <int kFirst, class V>
inline V window(V a, V b) {
#if defined(__AVX512F__)
  // By the instruction: GCC takes a permutation, which occupies more of the processor's units.
  constexpr int bytes = kFirst * sizeof(a[0]);
  if constexpr (bytes > 0 && bytes < kBytes && bytes % 4 == 0)
    return reinterpret_cast<V>(
        _mm512_maskz_alignr_epi32(0xffff, reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a), bytes / 4));
#endif
  return detail::window<kFirst>(a, b, detail::Indices<V>{});
}
// (a, b) as one run of elements -> those at even places and those at odd places.
template <class V>
inline void deinterleave(V a, V b, V& even, V& odd) {
  detail::deinterleave(a, b, even, odd, detail::Indices<V>{});
}
template <class V>
inline V reverse(V v) {
  return detail::reverse(v, detail::Indices<V>{});
}
template <class V>
inline void interleave(V even, V odd, V& a, V& b) {
  detail::interleave(even, odd, a, b, detail::Indices<V>{});
}

// The elements at even and at odd places of two vectors in memory.
template <class T>
inline void load_alternating(const T* p, Vec<Acc<T>>& even, Vec<Acc<T>>& odd) {
  deinterleave(load(p), load(p + kLanes<Acc<T>>), even, odd);
}
inline void load_alternating(const BFloat16* p, VecF& even, VecF& odd) {
  const VecU pairs = load_raw<VecU>(p);
  even = first_of(pairs);
  odd = second_of(pairs);
}
template <class T>
inline void store_alternating(T* p, Vec<Acc<T>> even, Vec<Acc<T>> odd) {
  Vec<Acc<T>> a, b;
  interleave(even, odd, a, b);
  store(p, a);
  store(p + kLanes<Acc<T>>, b);
}
inline void store_alternating(BFloat16* p, VecF even, VecF odd) {
  store_raw(p, round_high(even) >> 16 | (round_high(odd) & 0xffff0000u));
}

// A square of vectors in place.
template <class V, int n>
__attribute__((always_inline)) inline void transpose(V (&x)[n]) {
  V y[n];
#pragma GCC unroll 4
  for (int round = n; round > 1;
       round /= 2) {  // each interleaves the halves; log2(n) rounds rotate the index bits by half a turn
#pragma GCC unroll 8
    for (int l = 0; l < n / 2; ++l) interleave(x[l], x[l + n / 2], y[2 * l], y[2 * l + 1]);
#pragma GCC unroll 16
    for (int l = 0; l < n; ++l) x[l] = y[l];
  }
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// By instructions of one step each; an interleaving takes two.
template <>
__attribute__((always_inline)) inline void transpose(VecF (&x)[8]) {
  VecF y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int at = i / 2 * 4 + i % 2;
    x[i / 2 * 4 + i % 2 * 2] = __builtin_shufflevector(y[at], y[at + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    x[i / 2 * 4 + i % 2 * 2 + 1] = __builtin_shufflevector(y[at], y[at + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = y[i];
}
#endif

// From pairs of two rows at 2 kFloats columns, the pairs of neighbours in either row.
inline void unpair(VecU low, VecU high, VecU& first, VecU& second) {
  typedef uint16_t Words __attribute__((vector_size(kBytes)));
  Words even, odd;
  deinterleave(reinterpret_cast<Words>(low), reinterpret_cast<Words>(high), even, odd);
  first = reinterpret_cast<VecU>(even);
  second = reinterpret_cast<VecU>(odd);
}

// v's lanes at the low bits of `index`.
inline VecF permute(VecF v, VecU index) {
#if !defined(__clang__)
  return __builtin_shuffle(v, index);  // to GCC 12 the intrinsic may throw, which cuts the callers' code in pieces
#elif defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecF>(
      _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256i>(index)));
#else
  VecF result;
  for (int i = 0; i < kFloats; ++i) result[i] = v[index[i] % kFloats];
  return result;
#endif
}

}  // namespace simd
