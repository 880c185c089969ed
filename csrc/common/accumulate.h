// Sums kept in the arithmetic type for short runs and in double beyond.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace accumulate {

using simd::Vec;

// kCount vectors of sums.
template <class A, int kCount>
struct Sums {
  static constexpr int n = simd::kLanes<A>, kWide = simd::kLanes<double>, kParts = n / kWide;
  static constexpr int64_t kTermsPerFlush = 128;
  using Wide = Vec<double>;
  Vec<A> run[kCount] = {};
  Wide total[kCount][kParts] = {};
  int64_t terms = 0;

  void count(int64_t added) {
    if ((terms += added) >= kTermsPerFlush) flush();
  }
  void flush() {
    typedef A Part __attribute__((vector_size(kWide * sizeof(A))));
    for (int i = 0; i < kCount; ++i) {
      for (int part = 0; part < kParts; ++part)
        total[i][part] +=
            __builtin_convertvector(simd::load_raw<Part>(reinterpret_cast<A*>(&run[i]) + part * kWide), Wide);
      run[i] = Vec<A>{};
    }
    terms = 0;
  }
  double lane(int i, int l) const { return total[i][l / kWide][l % kWide]; }
  double sum(int i) const {
    Wide all = total[i][0];
    for (int part = 1; part < kParts; ++part) all += total[i][part];
    double s = 0;
    for (int l = 0; l < kWide; ++l) s += all[l];
    return s;
  }
};

// total += the sum of the lanes, and sum = 0.
template <class V, class Total>
inline void flush(V& sum, Total& total) {
  total += simd::sum_of_lanes(sum);
  sum = V{};
}

// totals += sums, and sums = 0, m x n numbers.
template <class A>
inline void flush(int64_t m, int64_t n, A* sums, int64_t ldsums, double* totals, int64_t ldtotals) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      totals[i * ldtotals + j] += sums[i * ldsums + j];
      sums[i * ldsums + j] = 0;
    }
}

// sums[i] += row i, n elements up to a whole vector, vector by vector.
template <class A>
inline void add_rows(int64_t rows, int64_t n, const A* row, int64_t pitch, Vec<A>* sums) {
  for (int64_t i = 0; i < rows; ++i, row += pitch) {
    Vec<A> sum = sums[i];
    for (int64_t j = 0; j < n; j += simd::kLanes<A>) sum += simd::load(row + j);
    sums[i] = sum;
  }
}

// The same of rows of pairs, each of two of the rows that are summed.
inline void add_rows(int64_t rows, int64_t n, const simd::Pair* row, int64_t pitch, simd::VecF* sums) {
  for (int64_t i = 0; i < rows; i += 2, row += pitch)
    for (int64_t j = 0; j < n; j += simd::kFloats) {
      const simd::VecU both = simd::load(row + j);
      sums[i] += simd::first_of(both);
      if (i + 1 < rows) sums[i + 1] += simd::second_of(both);
    }
}

// The sum of term(i), i < n, term being called for vectors (true_type) and for single elements.
template <class A, class Term>
double over(int64_t n, Term&& term) {
  constexpr int64_t lanes = simd::kLanes<A>, step = 4 * lanes, kSegment = 4096;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    const int64_t end = std::min(n, begin + kSegment);
    Vec<A> sums[4] = {};
    int64_t i = begin;
    for (; i + step <= end; i += step)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] += term(std::true_type{}, i + k * lanes);
    total += simd::sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < end; ++i) total += term(std::false_type{}, i);
  }
  return total;
}

}  // namespace accumulate
