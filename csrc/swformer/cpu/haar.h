// The 2-D Haar transform of one 2 x 2 block (or one vector of blocks), and its filters' gradients.
//
// A block's pixels (a, b) and its bands (p, q) are tied by band[p, q] = sum f[p][a] f[q][b] pixel[a, b] (analysis) or
// its transpose (synthesis); every filter gradient is a contraction of the 16 sums correlation[p, q][a, b] over the
// blocks of band * pixel.
#pragma once

#include <algorithm>

#include "tensor.h"

namespace haar {

constexpr int kBands = 4;

// Of blocks of 2 x 2 pixels.
inline int64_t block_rows(int64_t height) { return (height + 1) / 2; }

template <class A>
struct Filters {
  A lo[2], hi[2];
  Filters(const tensor::Tensor& low, const tensor::Tensor& high) {
    auto l = tensor::read<A>(low), h = tensor::read<A>(high);
    std::copy(l.begin(), l.end(), lo);
    std::copy(h.begin(), h.end(), hi);
  }
};

// Bands in the order LL, LH (high along H), HL (high along W), HH; pixels in the order 00, 01, 10, 11.
template <class F, class V>
inline void analyse(const F& f, const V (&x)[4], V (&y)[4]) {
  V low0 = f.lo[0] * x[0] + f.lo[1] * x[1], high0 = f.hi[0] * x[0] + f.hi[1] * x[1];
  V low1 = f.lo[0] * x[2] + f.lo[1] * x[3], high1 = f.hi[0] * x[2] + f.hi[1] * x[3];
  y[0] = f.lo[0] * low0 + f.lo[1] * low1;
  y[1] = f.hi[0] * low0 + f.hi[1] * low1;
  y[2] = f.lo[0] * high0 + f.lo[1] * high1;
  y[3] = f.hi[0] * high0 + f.hi[1] * high1;
}

template <class F, class V>
inline void synthesise(const F& f, const V (&y)[4], V (&x)[4]) {
  V low0 = f.lo[0] * y[0] + f.hi[0] * y[1], high0 = f.lo[0] * y[2] + f.hi[0] * y[3];
  V low1 = f.lo[1] * y[0] + f.hi[1] * y[1], high1 = f.lo[1] * y[2] + f.hi[1] * y[3];
  x[0] = f.lo[0] * low0 + f.hi[0] * high0;
  x[1] = f.lo[1] * low0 + f.hi[1] * high0;
  x[2] = f.lo[0] * low1 + f.hi[0] * high1;
  x[3] = f.lo[1] * low1 + f.hi[1] * high1;
}

// sums[4 * band + pixel] += band * pixel.
template <class V>
inline void correlate(const V (&y)[4], const V (&x)[4], V* sums) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q)
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) sums[4 * q + a] += y[q] * x[a];
}

// From correlation[4 * band + pixel], the sums over the blocks of band * pixel. Each filter acts along H (its first
// index into a band) and along W (its second): both roles add to its gradient.
template <class A>
void filter_gradients(const Filters<A>& f, const double* correlation, double (&low)[2], double (&high)[2]) {
  const A* taps[2] = {f.lo, f.hi};
  double grad[2][2] = {};
  for (int p = 0; p < 2; ++p)
    for (int q = 0; q < 2; ++q)
      for (int a = 0; a < 2; ++a)
        for (int b = 0; b < 2; ++b) {
          const double sum = correlation[4 * (p + 2 * q) + 2 * a + b];
          grad[p][a] += sum * taps[q][b];
          grad[q][b] += sum * taps[p][a];
        }
  std::copy(grad[0], grad[0] + 2, low);
  std::copy(grad[1], grad[1] + 2, high);
}

}  // namespace haar
