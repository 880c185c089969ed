// Matrix products of cache-resident tiles: C (m x n) = A (m x k) B (k x n), the columns n in vectors, a block of C in
// registers. Elements are numbers, or pairs of bf16 numbers: then k counts pairs, and C is of floats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace gemm {

// Rows and vectors of a register block: with one row of B and one element of A they fill the vector registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kRows = 4;
#else
constexpr int kRows = 8;
#endif
constexpr int kVectors = 3;

// sum += element * row, lane by lane; of pairs, both products.
template <class V, class A>
__attribute__((always_inline)) inline void add_product(V& sum, V element, const A& row) {
  sum += element * row;
}
__attribute__((always_inline)) inline void add_product(simd::VecF& sum, simd::VecU element, simd::VecU row) {
#if defined(__AVX512F__)
  simd::VecF result = sum;  // a name of its own: an array's element would be kept in memory
  asm("vdpbf16ps %2, %1, %0" : "+v"(result) : "v"(element), "v"(row));
  sum = result;
#else
  sum += simd::first_of(element) * simd::first_of(row);
  sum += simd::second_of(element) * simd::second_of(row);
#endif
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Elements that `pack` writes.
inline int64_t packed_size(int64_t rows, int64_t k) { return round_up(rows, kRows) * k; }

// Rows in panels of kRows, each k x kRows: element (i, j) = at(i, j) goes to [i / kRows][j][i % kRows]; missing rows
// are zero.
template <class A, class At>
inline void pack(int64_t rows, int64_t k, A* panels, At&& at) {
  for (int64_t first = 0; first < rows; first += kRows, panels += k * kRows)
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = 0; i < kRows; ++i) panels[j * kRows + i] = first + i < rows ? at(first + i, j) : A{};
}

// One block: sum over j < k of A[j * lda + i] B[j * ldb ...], i < kRows, n vectors wide.
template <int n, class A>
__attribute__((always_inline)) inline void block(
    int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, simd::Vec<simd::Acc<A>> (&sum)[kRows][n]) {
  using V = simd::Vec<A>;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < n; ++v) sum[i][v] = simd::Vec<simd::Acc<A>>{};
  for (int64_t j = 0; j < k; ++j, a += lda, b += ldb) {
    V row[n];
#pragma GCC unroll 3
    for (int v = 0; v < n; ++v) row[v] = simd::load(b + v * simd::kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V element = simd::broadcast(a[i]);
#pragma GCC unroll 3
      for (int v = 0; v < n; ++v) add_product(sum[i][v], element, row[v]);
    }
  }
}

// Calls use(row, column, sum) for every block of the product, sum being Vec<Acc<A>>[kRows][vectors]. A is in panels
// `panel_stride` apart, each with its kRows elements of column j at j * lda (`pack`: lda = kRows, panel_stride = k *
// kRows). Columns are computed in whole vectors: B's rows must be readable, and what `use` does with columns past n
// harmless, up to round_up(n, kLanes).
template <class A, class Use>
inline void multiply(
    int64_t m, int64_t n, int64_t k, const A* a, int64_t panel_stride, int64_t lda, const A* b, int64_t ldb,
    Use&& use) {
  constexpr int64_t lanes = simd::kLanes<A>;
  auto strip = [&](auto width, int64_t column) __attribute__((always_inline)) {
    const A* panel = a;
    for (int64_t row = 0; row < m; row += kRows, panel += panel_stride) {
      simd::Vec<simd::Acc<A>> sum[kRows][decltype(width)::value];
      block<decltype(width)::value>(k, panel, lda, b + column, ldb, sum);
      use(row, column, sum);
    }
  };
  int64_t column = 0;
  for (; column + 2 * lanes < n; column += kVectors * lanes) strip(std::integral_constant<int, kVectors>{}, column);
  if (column + lanes < n)
    strip(std::integral_constant<int, 2>{}, column);
  else if (column < n)
    strip(std::integral_constant<int, 1>{}, column);
}

// `use` for multiply: stores (or adds, kAdd) rows < m to C.
template <bool kAdd, class A>
inline auto into(A* c, int64_t ldc, int64_t m) {
  return [=](int64_t row, int64_t column, auto& sum) __attribute__((always_inline)) {
    constexpr int n = sizeof(sum[0]) / sizeof(sum[0][0]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= m) break;
      A* out = c + (row + i) * ldc + column;
#pragma GCC unroll 3
      for (int v = 0; v < n; ++v, out += simd::kLanes<A>)
        simd::store(out, kAdd ? simd::load(out) + sum[i][v] : sum[i][v]);
    }
  };
}

// Rows of B for so many channels.
template <class A>
constexpr int64_t depth(int64_t channels) {
  return std::is_same_v<A, simd::Pair> ? (channels + 1) / 2 : channels;
}

// Sets a vector of channel c in B's rows, ldb apart. Of a pair, the first channel is set before the second.
template <class A>
inline void set_channel(int64_t c, simd::Vec<simd::Acc<A>> value, A* b, int64_t ldb) {
  if constexpr (std::is_same_v<A, simd::Pair>) {
    A* row = b + c / 2 * ldb;
    const simd::VecU rounded = simd::round_for_pair(value);
    simd::store(row, c % 2 ? simd::load(row) | rounded << 16 : rounded);
  } else {
    simd::store(b + c * ldb, value);
  }
}

// A left factor of products, packed.
template <class A>
struct Matrix {
  int64_t rows = 0, depth = 0;
  std::vector<A> panels;

  Matrix() = default;
  // The element of row i and channel j is at(i, j).
  template <class At>
  Matrix(int64_t rows, int64_t channels, At&& at)
      : rows(rows), depth(gemm::depth<A>(channels)), panels(packed_size(rows, depth)) {
    pack(rows, depth, panels.data(), [&](int64_t i, int64_t j) {
      if constexpr (std::is_same_v<A, simd::Pair>)
        return simd::pair(at(i, 2 * j), 2 * j + 1 < channels ? at(i, 2 * j + 1) : 0.0f);
      else
        return at(i, j);
    });
  }
  // `multiply` with n columns of b.
  template <class Use>
  void blocks(int64_t n, const A* b, int64_t ldb, Use&& use) const {
    multiply(rows, n, depth, panels.data(), depth * kRows, int64_t{kRows}, b, ldb, use);
  }
  // use(row, column, vector) for every vector of the product.
  template <class Use>
  void times(int64_t n, const A* b, int64_t ldb, Use&& use) const {
    blocks(n, b, ldb, [&](int64_t row, int64_t column, auto& sum) __attribute__((always_inline)) {
      constexpr int vectors = sizeof(sum[0]) / sizeof(sum[0][0]);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        if (row + i >= rows) break;
#pragma GCC unroll 3
        for (int v = 0; v < vectors; ++v) use(row + i, column + v * simd::kLanes<A>, sum[i][v]);
      }
    });
  }
};

// out[j * ldout + i] = in[i * ldin + j]; rows and columns are rounded up to whole vectors, in what is read and written.
template <class A>
inline void transpose(int64_t rows, int64_t columns, const A* in, int64_t ldin, A* out, int64_t ldout) {
  using V = simd::Vec<A>;
  constexpr int n = simd::kLanes<A>;
  for (int64_t i = 0; i < rows; i += n)
    for (int64_t j = 0; j < columns; j += n) {
      V x[n];
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) x[l] = simd::load(in + (i + l) * ldin + j);
      simd::transpose(x);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) simd::store(out + (j + l) * ldout + i, x[l]);
    }
}

// The same by pairs of neighbouring columns: row j of `out` holds columns 2 j and 2 j + 1.
template <class Load>
inline void transpose_pairs(int64_t rows, int64_t columns, simd::Pair* out, int64_t ldout, Load&& load) {
  constexpr int n = simd::kFloats;
  for (int64_t i = 0; i < rows; i += n)
    for (int64_t j = 0; j < columns; j += 2 * n) {
      simd::VecU x[n];
      load(i, j, x);
      simd::transpose(x);
#pragma GCC unroll 16
      for (int l = 0; l < n; ++l) simd::store(out + (j / 2 + l) * ldout + i, x[l]);
    }
}
inline void transpose(int64_t rows, int64_t columns, const float* in, int64_t ldin, simd::Pair* out, int64_t ldout) {
  constexpr int n = simd::kFloats;
  transpose_pairs(
      rows, columns, out, ldout, [=](int64_t i, int64_t j, simd::VecU(&x)[n]) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int l = 0; l < n; ++l) {
          const float* row = in + (i + l) * ldin + j;
          x[l] = simd::pair_neighbours(simd::load(row), simd::load(row + n));
        }
      });
}
// Of rows of pairs, each of two of the rows.
inline void transpose(
    int64_t rows, int64_t columns, const simd::Pair* in, int64_t ldin, simd::Pair* out, int64_t ldout) {
  constexpr int n = simd::kFloats;
  transpose_pairs(
      rows, columns, out, ldout, [=](int64_t i, int64_t j, simd::VecU(&x)[n]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int l = 0; l < n; l += 2) {
          const simd::Pair* row = in + (i + l) / 2 * ldin + j;
          simd::unpair(simd::load(row), simd::load(row + n), x[l], x[l + 1]);
        }
      });
}

}  // namespace gemm
