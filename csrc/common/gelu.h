// GELU (exact, by erf), its derivative, exp and the sigmoid on vectors.
//
// In float, Phi(x) = 1/2 + sign(x) P(|x|) and GELU'(x) = 1/2 + sign(x) D(|x|), with P and D from polynomials over equal
// cells of |x|; in the last cell both are exactly 1/2. Both absolute errors are below 6e-7. As in x Phi(x) and
// Phi(x) + x phi(x): GELU(inf) = inf, GELU(-inf) and GELU'(+-inf) are NaN, and NaN stays NaN.
#pragma once

#include <cmath>

#include "simd.h"

namespace simd {

namespace detail {

// As many cells as one permute instruction can look up; the degree makes up for wider cells.
#if defined(__AVX512F__)
constexpr int kCells = 16, kGeluDegree = 4, kSlopeDegree = 5;
#else
constexpr int kCells = 8, kGeluDegree = 5, kSlopeDegree = 6;
#endif

constexpr double exp_series(double x) {
  double term = 1, sum = 1;
  for (int i = 1; i < 40; ++i) sum += term *= x / 64 / i;
  for (int i = 0; i < 6; ++i) sum *= sum;
  return sum;
}
constexpr double cos_series(double x) {
  double term = 1, sum = 1;
  for (int i = 1; i < 20; ++i) sum += term *= -x * x / ((2 * i - 1) * (2 * i));
  return sum;
}
constexpr double kPi = 3.14159265358979323846;
constexpr double normal_density(double t) { return 0.39894228040143267794 / exp_series(t * t / 2); }
// Phi(t) - 1/2 = phi(t) (t + t^3 / 3 + t^5 / (3 5) + ...), whose terms all have one sign.
constexpr double normal_half(double t) {
  double term = t, sum = t;
  for (int i = 1; i < 160; ++i) sum += term *= t * t / (2 * i + 1);
  return normal_density(t) * sum;
}
constexpr double gelu_slope_half(double t) { return normal_half(t) + t * normal_density(t); }

// coefficient[d][cell] of the powers of t - kCentre, in the cell of the t with |t scale - cell| <= 1/2; the last cell
// holds all t > end. One centre for all cells takes fewer instructions than each cell's, and powers small enough for
// the rounding.
constexpr float kCentre = 1.5f;
template <int kDegree>
struct alignas(64) Table {
  float coefficient[kDegree + 1][kCells] = {};
  float scale = 0, limit = 0;  // limit: the middle of the last cell
};
template <int kDegree, class F>
constexpr Table<kDegree> make_table(F f, float end) {
  Table<kDegree> table;
  table.scale = (kCells - 1.5f) / end;
  table.limit = (kCells - 1) / table.scale;
  for (int cell = 0; cell < kCells - 1; ++cell) {
    const double low = cell ? cell - 0.5 : 0, high = cell + 0.5;
    // Newton's interpolation at the Chebyshev nodes.
    double node[kDegree + 1] = {}, value[kDegree + 1] = {}, power[kDegree + 1] = {};
    for (int i = 0; i <= kDegree; ++i) {
      const double place = (low + high) / 2 + (high - low) / 2 * cos_series(kPi * (i + 0.5) / (kDegree + 1));
      node[i] = place / table.scale - kCentre;
      value[i] = f(place / table.scale);
    }
    for (int level = 1; level <= kDegree; ++level)
      for (int i = kDegree; i >= level; --i) value[i] = (value[i] - value[i - 1]) / (node[i] - node[i - level]);
    for (int i = kDegree; i >= 0; --i) {
      for (int d = kDegree; d > 0; --d) power[d] = power[d - 1] - node[i] * power[d];
      power[0] = value[i] - node[i] * power[0];
    }
    for (int d = 0; d <= kDegree; ++d) table.coefficient[d][cell] = static_cast<float>(power[d]);
  }
  table.coefficient[0][kCells - 1] = 0.5f;
  return table;
}
constexpr auto kNormalHalf = make_table<kGeluDegree>(normal_half, 5.3f);
constexpr auto kNormalHalfShort = make_table<kGeluDegree - 2>(normal_half, 4.0f);
constexpr auto kGeluSlopeHalf = make_table<kSlopeDegree>(gelu_slope_half, 5.7f);

// row[index's low bits], lane by lane.
inline VecF lookup(const float (&row)[kCells], VecU index) {
  if constexpr (kCells == kFloats) return permute(load(row), index);
  VecF v;
  for (int i = 0; i < kFloats; ++i) v[i] = row[index[i] % kCells];
  return v;
}

inline VecF absolute(VecF x) { return reinterpret_cast<VecF>(reinterpret_cast<VecU>(x) & 0x7fffffffu); }
inline VecF with_sign_of(VecF magnitude, VecF x) {
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(magnitude) | (reinterpret_cast<VecU>(x) & 0x80000000u));
}
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits

// Both give x where x is NaN, as the instructions do whose second operand is x; GCC makes two of a comparison and a
// selection.
inline VecF at_most(VecF x, float limit) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(limit), reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecF>(_mm256_min_ps(_mm256_set1_ps(limit), reinterpret_cast<__m256>(x)));
#else
  return broadcast(limit) < x ? broadcast(limit) : x;
#endif
}
inline VecF at_least(VecF x, float limit) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(limit), reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecF>(_mm256_max_ps(_mm256_set1_ps(limit), reinterpret_cast<__m256>(x)));
#else
  return broadcast(limit) > x ? broadcast(limit) : x;
#endif
}

// |x|, at most `limit`; NaN gives either, and the callers use x again.
inline VecF magnitude(VecF x, float limit) {
#if defined(__AVX512DQ__)
  constexpr int kSmallerMagnitude = 2, kPositive = 8;
  return reinterpret_cast<VecF>(
      _mm512_maskz_range_ps(0xffff, reinterpret_cast<__m512>(x), _mm512_set1_ps(limit), kSmallerMagnitude | kPositive));
#else
  return at_most(absolute(x), limit);
#endif
}

// sign(x) times the table's function of |x|, plus `offset`.
template <int kDegree>
inline VecF evaluate(const Table<kDegree>& table, VecF x, VecF offset) {
  const VecF t = magnitude(x, table.limit), u = t - kCentre;
  const VecU cell = reinterpret_cast<VecU>(t * table.scale + kRound);
  VecF y = lookup(table.coefficient[kDegree], cell);
  for (int d = kDegree - 1; d >= 0; --d) y = y * u + lookup(table.coefficient[d], cell);
  return with_sign_of(y, x) + offset;
}

// 1 / x to 14 bits or better.
inline VecF short_reciprocal(VecF x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
#else
  return 1.0f / x;
#endif
}

// 1 / x to 2 units in the last place, for x in [1, 2].
inline VecF reciprocal(VecF x) {
  const VecF r = short_reciprocal(x);
#if defined(__AVX512F__)
  return r + r * (1.0f - x * r);
#else
  return r;
#endif
}

template <class F>
inline float one(F f, float x) {
  return f(broadcast(x))[0];
}
template <class F>
inline Vec<double> each(F f, Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

}  // namespace detail

inline VecF gelu(VecF x) { return x * detail::evaluate(detail::kNormalHalf, x, broadcast(0.5f)); }
inline float gelu(float x) {
  return detail::one([](VecF v) { return gelu(v); }, x);
}
inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x * 0.70710678118654752440)); }
inline Vec<double> gelu(Vec<double> x) {
  return detail::each([](double v) { return gelu(v); }, x);
}

inline VecF gelu_derivative(VecF x) {
  // x - x is zero, or NaN where x is infinite.
  return detail::evaluate(detail::kGeluSlopeHalf, x, 0.5f + (x - x));
}
inline float gelu_derivative(float x) {
  return detail::one([](VecF v) { return gelu_derivative(v); }, x);
}
inline double gelu_derivative(double x) {
  return 0.5 * (1 + std::erf(x * 0.70710678118654752440)) + x * 0.39894228040143267794 * std::exp(-0.5 * x * x);
}
inline Vec<double> gelu_derivative(Vec<double> x) {
  return detail::each([](double v) { return gelu_derivative(v); }, x);
}

// exp(x) to 2 units in the last place; 0 below -87.7 and infinity above 88.4.
inline VecF exp(VecF x) {
  x = detail::at_least(detail::at_most(x, 88.8f), -88.0f);
  VecF rounded = x * 1.44269504f + detail::kRound, n = rounded - detail::kRound;
  VecF r = x - n * 0.693359375f;  // ln 2 in two parts, the first of so few bits that its products are exact
  r = r + n * 2.12194440e-4f;
  VecF y = broadcast(1.0f / 720);
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  VecU power = (reinterpret_cast<VecU>(rounded) + 127u) << 23;
  return y * reinterpret_cast<VecF>(power);
}

// 1 / (1 + exp(-x)): exactly 1 above 17 and exactly 0 below -87.7.
inline VecF sigmoid(VecF x) {
  VecF e = exp(-detail::absolute(x)), inverse = detail::reciprocal(1.0f + e);
  return x < 0.0f ? e * inverse : inverse;
}
inline float sigmoid(float x) {
  return detail::one([](VecF v) { return sigmoid(v); }, x);
}
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline Vec<double> sigmoid(Vec<double> x) {
  return detail::each([](double v) { return sigmoid(v); }, x);
}

// For what will be rounded to T.
template <class T>
inline Vec<Acc<T>> gelu_of(Vec<Acc<T>> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return x * detail::evaluate(detail::kNormalHalfShort, x, broadcast(0.5f));
  } else {
    return gelu(x);
  }
}
template <class T>
inline Vec<Acc<T>> sigmoid_of(Vec<Acc<T>> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const VecF power = detail::at_least(detail::absolute(x) * -1.44269504f, -126.0f);
    const VecF rounded = power + detail::kRound, u = power - (rounded - detail::kRound);  // 2 ** power
    VecF y = u * 0.0555347f + 0.2419215f;
    y = y * u + 0.6931472f;
    y = y * u + 1.0f;
    const VecF e = y * reinterpret_cast<VecF>((reinterpret_cast<VecU>(rounded) + 127u) << 23);
    const VecF inverse = detail::short_reciprocal(1.0f + e);
    return x < 0.0f ? e * inverse : inverse;
  } else {
    return sigmoid(x);
  }
}

}  // namespace simd
