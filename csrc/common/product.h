// Products of small matrices that are not in panels: of parameters, with the rows shared out to the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "tasks.h"

namespace gemm {

// Rows in whole vectors, as `multiply` reads and writes them.
template <class A>
struct Rows {
  int64_t rows = 0, columns = 0, ld = 0;
  std::vector<A> values;
  Rows() = default;
  Rows(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), ld(round_up(columns, simd::kLanes<A>)), values(rows * ld) {}
  A* operator[](int64_t i) { return values.data() + i * ld; }
  const A* operator[](int64_t i) const { return values.data() + i * ld; }
};

// Element (i, j) = at(i, j).
template <class A, class At>
Rows<A> filled(int64_t rows, int64_t columns, At&& at) {
  Rows<A> result(rows, columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) result[i][j] = static_cast<A>(at(i, j));
  return result;
}

// left (m x k, element (i, j) = at(i, j)) times right (k x n).
template <class A, class At>
Rows<A> product(int64_t m, const Rows<A>& right, At&& at) {
  const int64_t n = right.columns, k = right.rows, panel = k * kRows;
  const Matrix<A> left(m, k, at);
  Rows<A> out(m, n);
  tasks::parallel((m + kRows - 1) / kRows, tasks::grain(panel * n), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRows, count = std::min(end * kRows, m) - first;
    multiply(
        count, n, k, left.panels.data() + begin * panel, panel, int64_t{kRows}, right.values.data(), right.ld,
        into<false>(out[first], out.ld, count));
  });
  return out;
}

}  // namespace gemm
