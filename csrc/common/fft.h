// Discrete Fourier transforms of kFloats signals at a time, one in each lane.
//
// A signal of n complex numbers is n vectors of real parts, each followed by its vector of imaginary parts. The inverse
// transform is the forward one with the two exchanged before and after.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <utility>
#include <vector>

#include "simd.h"

namespace fft {

using simd::kFloats;
using simd::VecF;

constexpr int kComplex = 2 * kFloats;  // floats of a vector of complex numbers
constexpr int kLargestRadix = 31;      // its transform takes r^2 operations

struct Complex {
  VecF re, im;
};
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, const float* w) { return {a.re * w[0] - a.im * w[1], a.re * w[1] + a.im * w[0]}; }
inline Complex operator*(Complex a, float s) { return {a.re * s, a.im * s}; }
inline Complex conj(Complex a) { return {a.re, -a.im}; }
inline Complex times_minus_i(Complex a) { return {a.im, -a.re}; }

inline Complex load(const float* p) { return {simd::load(p), simd::load(p + kFloats)}; }
inline void store(float* p, Complex z) {
  simd::store(p, z.re);
  simd::store(p + kFloats, z.im);
}

// exp(-2 pi i k / n) to two floats.
inline void root(int64_t k, int64_t n, float* out) {
  const double angle = -2 * std::numbers::pi * static_cast<double>(k % n) / static_cast<double>(n);
  out[0] = static_cast<float>(std::cos(angle));
  out[1] = static_cast<float>(std::sin(angle));
}

// The transform of length R: of load(k), into store(k, result), k < R. roots: exp(-2 pi i k / R).
template <int R>
struct Butterfly {
  static_assert(R % 4 == 0);
  static constexpr int A = R == 8 ? 2 : 4, B = R / A;
  template <class Load, class Store>
  static __attribute__((always_inline)) inline void apply(const float* roots, Load&& load, Store&& store) {
    Complex parts[R];
#pragma GCC unroll 8
    for (int j = 0; j < B; ++j)
      Butterfly<A>::apply(
          roots, [&](int i) __attribute__((always_inline)) { return load(j + B * i); },
          [&](int i, Complex z)
              __attribute__((always_inline)) { parts[i * B + j] = i * j != 0 ? z * (roots + 2 * i * j) : z; });
#pragma GCC unroll 8
    for (int i = 0; i < A; ++i)
      Butterfly<B>::apply(
          roots, [&](int j) __attribute__((always_inline)) { return parts[i * B + j]; },
          [&](int k, Complex z) __attribute__((always_inline)) { store(i + A * k, z); });
  }
};

template <>
struct Butterfly<2> {
  template <class Load, class Store>
  static __attribute__((always_inline)) inline void apply(const float*, Load&& load, Store&& store) {
    const Complex a = load(0), b = load(1);
    store(0, a + b);
    store(1, a - b);
  }
};

template <>
struct Butterfly<4> {
  template <class Load, class Store>
  static __attribute__((always_inline)) inline void apply(const float*, Load&& load, Store&& store) {
    const Complex x0 = load(0), x2 = load(2), x1 = load(1), x3 = load(3);
    const Complex a = x0 + x2, b = x0 - x2, c = x1 + x3, d = times_minus_i(x1 - x3);
    store(0, a + c);
    store(1, b + d);
    store(2, a - c);
    store(3, b - d);
  }
};

template <>
struct Butterfly<8> {
  template <class Load, class Store>
  static __attribute__((always_inline)) inline void apply(const float* roots, Load&& load, Store&& store) {
    constexpr float s = 0.70710678118654752f;
    Complex even[4], odd[4];
    auto into = [](Complex* to) { return [to](int k, Complex z) __attribute__((always_inline)) { to[k] = z; }; };
    Butterfly<4>::apply(roots, [&](int k) __attribute__((always_inline)) { return load(2 * k); }, into(even));
    Butterfly<4>::apply(roots, [&](int k) __attribute__((always_inline)) { return load(2 * k + 1); }, into(odd));
    odd[1] = {(odd[1].re + odd[1].im) * s, (odd[1].im - odd[1].re) * s};
    odd[2] = times_minus_i(odd[2]);
    odd[3] = {(odd[3].im - odd[3].re) * s, (odd[3].re + odd[3].im) * -s};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      store(k, even[k] + odd[k]);
      store(k + 4, even[k] - odd[k]);
    }
  }
};

// Of odd length r (R, or any where R is 0), by the sums and differences of the elements j and r - j.
template <int R, class Load, class Store>
inline void odd_butterfly(int64_t radix, const float* roots, Load&& load, Store&& store) {
  const int64_t r = R ? R : radix, half = r / 2;
  Complex sums[(R ? R : kLargestRadix) / 2], differences[(R ? R : kLargestRadix) / 2];
  const Complex x0 = load(0);
  Complex total = x0;
  for (int64_t j = 0; j < half; ++j) {
    const Complex a = load(j + 1), b = load(r - 1 - j);
    sums[j] = a + b;
    differences[j] = a - b;
    total = total + sums[j];
  }
  store(0, total);
  for (int64_t k = 1; k <= half; ++k) {
    Complex even = x0, odd = {};
    for (int64_t j = 0, at = k; j < half; ++j, at = at + k < r ? at + k : at + k - r) {
      const float c = roots[2 * at], s = -roots[2 * at + 1];
      even = {even.re + sums[j].re * c, even.im + sums[j].im * c};
      odd = {odd.re + differences[j].im * s, odd.im - differences[j].re * s};
    }
    store(k, even + odd);
    store(r - k, even - odd);
  }
}

// A transform of n complex numbers: passes of small radices, or Bluestein's convolution where n has a large prime
// factor.
class Plan {
 public:
  explicit Plan(int64_t n, bool inverse = false) : n_(n), inverse_(inverse) {
    std::vector<int64_t> radices;
    int64_t remaining = n;
    for (int64_t r = 3; r <= kLargestRadix; r += 2)
      for (; remaining % r == 0; remaining /= r) radices.push_back(r);
    for (; remaining % 2 == 0; remaining /= radices.back()) radices.push_back(next_power(remaining & -remaining));
    if (remaining > 1) {
      prepare_convolution();
      return;
    }
    // The last pass has no twiddle factors, which saves most where there are most of them.
    std::sort(radices.begin(), radices.end());
    places_ = {0};
    remaining = n;
    for (int64_t r : radices) {
      Pass pass{r, remaining / r, {}, {}};
      for (int64_t p = 0; p < pass.m; ++p)
        for (int64_t k = 1; k < r; ++k) append_root(p * k, remaining, pass.twiddles);
      for (int64_t k = 0; k < r; ++k) append_root(k, r, pass.roots);
      passes_.push_back(std::move(pass));
      if ((remaining /= r) == 1) break;
      std::vector<int64_t> places;
      for (int64_t place : places_)
        for (int64_t k = 0; k < r; ++k) places.push_back(place + k * (n / (remaining * r)));
      places_ = std::move(places);
    }
  }

  // Floats of the memory that `run` works in.
  int64_t work() const { return (convolution_.empty() ? n_ : 2 * convolution_[0].n_) * kComplex; }

  // Whether a signal is memory enough to work in.
  bool in_place() const { return convolution_.empty(); }

  // `work` may be `in` (which is lost then), `out` neither of them.
  void run(const float* in, float* work, float* out) const {
    if (!convolution_.empty()) return convolve(in, work, out);
    if (passes_.empty()) std::copy(in, in + kComplex, out);
    for (const Pass& pass : passes_) {
      switch (pass.radix) {
        case 2: apply<2>(pass, in, work, out); break;
        case 3: apply<3>(pass, in, work, out); break;
        case 4: apply<4>(pass, in, work, out); break;
        case 5: apply<5>(pass, in, work, out); break;
        case 8: apply<8>(pass, in, work, out); break;
        case 16: apply<16>(pass, in, work, out); break;
        case 32: apply<32>(pass, in, work, out); break;
        default: apply<0>(pass, in, work, out);
      }
      in = work;
    }
  }

 private:
  struct Pass {
    int64_t radix, m;  // transforms of length radix * m are left, one after the other
    std::vector<float> twiddles, roots;
  };

  static void append_root(int64_t k, int64_t n, std::vector<float>& list) {
    float w[2];
    root(k, n, w);
    list.insert(list.end(), w, w + 2);
  }

  // Two passes for up to 1024: each more goes through the whole memory.
  static int64_t next_power(int64_t power) {
    for (int64_t r : {2, 4, 8, 16, 32})
      if (power <= r || (r > 4 && power <= r * r)) return std::min(r, power);
    return 32;
  }

  template <int R>
  void apply(const Pass& pass, const float* in, float* work, float* out) const {
    const int64_t r = R ? R : pass.radix, exchange = inverse_ && pass.radix * pass.m == n_ ? kFloats : 0;
    const float* roots = pass.roots.data();
    auto transform = [&](auto&& load, auto&& store) __attribute__((always_inline)) {
      if constexpr (R != 0 && R % 2 == 0)
        Butterfly<R>::apply(roots, load, store);
      else
        odd_butterfly<R>(r, roots, load, store);
    };
    auto load = [&](const float* from) __attribute__((always_inline)) {
      return Complex{simd::load(from + exchange), simd::load(from + kFloats - exchange)};
    };
    const int64_t step = pass.m * kComplex;
    if (pass.m > 1) {
      for (int64_t first = 0; first < n_; first += r * pass.m) {
        const float* w = pass.twiddles.data();
        for (int64_t p = 0; p < pass.m; ++p, w += 2 * (r - 1)) {
          const int64_t at = (first + p) * kComplex;
          transform(
              [&](int64_t k) __attribute__((always_inline)) { return load(in + at + k * step); },
              [&](int64_t k, Complex z)
                  __attribute__((always_inline)) { store(work + at + k * step, k ? z * (w + 2 * (k - 1)) : z); });
        }
      }
      return;
    }
    const int64_t exchange_out = inverse_ ? kFloats : 0, stride = n_ / r * kComplex;
    for (int64_t place : places_) {
      float* to = out + place * kComplex;
      transform(
          [&](int64_t k) __attribute__((always_inline)) { return load(in + k * kComplex); },
          [&](int64_t k, Complex z) __attribute__((always_inline)) {
            simd::store(to + k * stride + exchange_out, z.re);
            simd::store(to + k * stride + kFloats - exchange_out, z.im);
          });
      in += r * kComplex;
    }
  }

  // With b[j] = exp(pi i j^2 / n), X[k] = conj b[k] sum over j of (x[j] conj b[j]) b[k - j].
  void prepare_convolution() {
    int64_t length = 1;
    while (length < 2 * n_ - 1) length *= 2;
    convolution_.emplace_back(length);
    convolution_.emplace_back(length, true);
    for (int64_t j = 0; j < n_; ++j) append_root(j * j, 2 * n_, chirp_);
    std::vector<VecF> b(2 * length), spectrum(2 * length);
    for (int64_t j = 0; j < n_; ++j)
      for (int64_t at : {j, (length - j) % length})
        store(
            reinterpret_cast<float*>(&b[2 * at]),
            Complex{{chirp_[2 * j]}, {-chirp_[2 * j + 1]}} * (1.0f / static_cast<float>(length)));
    convolution_[0].run(
        reinterpret_cast<float*>(b.data()), reinterpret_cast<float*>(b.data()),
        reinterpret_cast<float*>(spectrum.data()));
    for (VecF v : spectrum) kernel_.push_back(v[0]);
  }

  void convolve(const float* in, float* work, float* out) const {
    const int64_t length = convolution_[0].n_, exchange = inverse_ ? kFloats : 0;
    float* spectrum = work + length * kComplex;
    for (int64_t j = 0; j < n_; ++j) {
      const float* from = in + j * kComplex;
      store(
          work + j * kComplex,
          Complex{simd::load(from + exchange), simd::load(from + kFloats - exchange)} * &chirp_[2 * j]);
    }
    std::fill(work + n_ * kComplex, spectrum, 0.0f);
    convolution_[0].run(work, work, spectrum);
    for (int64_t j = 0; j < length; ++j)
      store(spectrum + j * kComplex, load(spectrum + j * kComplex) * &kernel_[2 * j]);
    convolution_[1].run(spectrum, spectrum, work);
    for (int64_t j = 0; j < n_; ++j) {
      const Complex z = load(work + j * kComplex) * &chirp_[2 * j];
      simd::store(out + j * kComplex + exchange, z.re);
      simd::store(out + j * kComplex + kFloats - exchange, z.im);
    }
  }

  int64_t n_;
  bool inverse_;
  std::vector<Pass> passes_;
  std::vector<int64_t> places_;    // in the result, of the first number of each transform of the last pass
  std::vector<Plan> convolution_;  // the transform of a power of two numbers and its inverse
  std::vector<float> chirp_, kernel_;
};

}  // namespace fft
