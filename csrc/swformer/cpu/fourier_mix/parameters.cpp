#include "parameters.h"

#include <algorithm>
#include <cmath>

namespace fourier {

namespace {

using gemm::filled, gemm::product;

// A factor's normalisation: u -> slope u + offset.
struct Norm {
  std::vector<double> deviation, slope, offset;  // deviation: 1 / sqrt(variance + eps)
  Norm(const Factor& f, double eps) : deviation(f.scale.size()), slope(deviation), offset(deviation) {
    for (size_t n = 0; n < slope.size(); ++n) {
      deviation[n] = 1 / std::sqrt(f.variance[n] + eps);
      slope[n] = f.scale[n] * deviation[n];
      offset[n] = f.shift[n] - f.mean[n] * slope[n];
    }
  }
};

// use(row, output, part) for the rows of a factor's half of the matrix cut by the parts of the input, (2, C, 2): output
// channel of the second convolution, and part of the input.
template <class Use>
void for_rows(int64_t channels, Use&& use) {
  for (int64_t i = 0, row = 0; i < 2 * channels; ++i)
    for (int64_t part = 0; part < 2; ++part) use(row++, i % channels * 2 + i / channels, part);
}

// The second convolution's weight by those rows, (4 * C, C).
std::vector<double> by_rows(const std::vector<double>& weight, int64_t channels) {
  std::vector<double> result(weight.size());
  for_rows(channels, [&](int64_t row, int64_t output, int64_t part) {
    for (int64_t j = 0; j < channels; ++j) result[row * channels + j] = weight[output * 2 * channels + 2 * j + part];
  });
  return result;
}

// Of the zero frequency (B, D), which is real: (B, 2 * C).
Rows<double> first_convolution(const Parameters& p, const Rows<double>& zero) {
  const int64_t c2 = 2 * p.channels, d = p.dim;
  auto result = product(
      zero.rows, filled<double>(d, c2, [&](int64_t j, int64_t n) { return p.in_weight[n * d + j]; }),
      [&](int64_t b, int64_t j) { return zero[b][j]; });
  for (int64_t b = 0; b < zero.rows; ++b)
    for (int64_t n = 0; n < c2; ++n) result[b][n] += p.in_bias[n] * p.side;
  return result;
}

}  // namespace

void take_statistics(Parameters& p, Statistics& batch) {
  const int64_t c2 = 2 * p.channels, d = p.dim, images = batch.zero.rows;
  const double count = batch.count, nonzero = count - static_cast<double>(images), others = std::max(nonzero, 1.0);
  auto weight = [&](int64_t n, int64_t j) { return p.in_weight[n * d + j]; };
  batch.at_zero = first_convolution(p, batch.zero);
  for (int q = 0; q < 2; ++q) {
    const double* const gram = batch.moments + q * d * (d + 1);
    batch.products[q] =
        product(c2, filled<double>(d, d, [&](int64_t i, int64_t j) { return gram[i * (d + 1) + j]; }), weight);
    for (int64_t n = 0; n < c2; ++n) {
      double sum = 0, spread = 0, zero_sum = 0, at_zero = 0;
      for (int64_t j = 0; j < d; ++j) {
        sum += weight(n, j) * gram[j * (d + 1) + d];
        spread += weight(n, j) * batch.products[q][n][j];
      }
      for (int64_t b = 0; q == 0 && b < images; ++b) zero_sum += batch.at_zero[b][n];
      const double mean = (sum + zero_sum) / count, away = sum / others - mean;
      for (int64_t b = 0; b < images; ++b) {
        const double difference = (q == 0 ? batch.at_zero[b][n] : 0) - mean;
        at_zero += difference * difference;
      }
      spread = std::max(spread - sum * sum / others, 0.0);
      Factor& f = p.factors[n / p.channels];
      const int64_t place = 2 * (n % p.channels) + q;
      f.mean[place] = mean;
      f.variance[place] = (spread + nonzero * away * away + at_zero) / count;
    }
  }
}

void compose(const Parameters& p, float* matrix) {
  const int64_t c = p.channels, d = p.dim, c2 = 2 * c;
  for (int64_t f = 0; f < 2; ++f, matrix += 4 * c * (d + 1)) {
    const Factor& factor = p.factors[f];
    const Norm norm(factor, p.eps);
    const auto weight = by_rows(factor.weight, c);
    auto mixing = [&](int64_t row, int64_t j) { return weight[row * c + j] * norm.slope[2 * j + row % 2]; };
    const auto combined = product(
        4 * c, filled<float>(c, d, [&](int64_t j, int64_t i) { return p.in_weight[(f * c + j) * d + i]; }),
        [&](int64_t row, int64_t j) { return static_cast<float>(mixing(row, j)); });
    for_rows(c, [&](int64_t row, int64_t output, int64_t part) {
      std::copy(combined[row], combined[row] + d, matrix + row * (d + 1));
      double last = 0;
      if (part == 0) {
        last = factor.bias[output];
        for (int64_t n = 0; n < c2; ++n) last += factor.weight[output * c2 + n] * norm.offset[n];
      } else {
        for (int64_t j = 0; j < c; ++j) last += mixing(row - 1, j) * p.in_bias[f * c + j];
        last *= p.side;
      }
      matrix[row * (d + 1) + d] = static_cast<float>(last);
    });
  }
}

Rows<double> compose_zero(const Parameters& p, const Rows<double>& zero) {
  const int64_t c = p.channels, c2 = 2 * c, images = zero.rows;
  const auto u = first_convolution(p, zero);
  Rows<double> result(images, 2 * c2);
  for (int64_t f = 0; f < 2; ++f) {
    const Factor& factor = p.factors[f];
    const Norm norm(factor, p.eps);
    const auto normalised = filled<double>(c2, images, [&](int64_t n, int64_t b) {
      return norm.offset[n] + (n % 2 ? 0 : norm.slope[n] * u[b][f * c + n / 2]);
    });
    const auto mixed = product(c2, normalised, [&](int64_t i, int64_t n) { return factor.weight[i * c2 + n]; });
    for (int64_t b = 0; b < images; ++b)
      for (int64_t i = 0; i < c2; ++i) result[b][f * c2 + i % 2 * c + i / 2] = mixed[i][b] + factor.bias[i];
  }
  return result;
}

namespace {

// By the matrix alone: of the first convolution, and of the factors, of their means and variances too.
Gradients through_matrix(const Parameters& p, const double* grad_matrix) {
  const int64_t c = p.channels, d = p.dim, c2 = 2 * c;
  Gradients g;
  g.in_weight.resize(c2 * d);
  g.in_bias.resize(c2);
  for (int64_t f = 0; f < 2; ++f) {
    const Factor& factor = p.factors[f];
    const Norm norm(factor, p.eps);
    const double* const grad = grad_matrix + f * 4 * c * (d + 1);
    auto of_constant = [&](int64_t row) { return grad[(row - row % 2) * (d + 1) + d]; };
    auto of_zero = [&](int64_t row) { return grad[(row - row % 2 + 1) * (d + 1) + d]; };
    const auto weight = by_rows(factor.weight, c);
    const double *const in_weight = &p.in_weight[f * c * d], *const in_bias = &p.in_bias[f * c];
    const auto of_mixing = product(
        4 * c, filled<double>(d, c, [&](int64_t i, int64_t j) { return in_weight[j * d + i]; }),
        [&](int64_t row, int64_t i) { return grad[row * (d + 1) + i]; });
    const auto of_in_weight = product(
        c, filled<double>(4 * c, d, [&](int64_t row, int64_t i) { return grad[row * (d + 1) + i]; }),
        [&](int64_t j, int64_t row) { return weight[row * c + j] * norm.slope[2 * j + row % 2]; });
    for (int64_t j = 0; j < c; ++j) std::copy(of_in_weight[j], of_in_weight[j] + d, &g.in_weight[(f * c + j) * d]);
    Factor& of = g.factors[f];
    of.bias.resize(c2);
    of.weight.resize(c2 * c2);
    std::vector<double> of_slope(c2), of_offset(c2);
    for_rows(c, [&](int64_t row, int64_t output, int64_t part) {
      const double constant = of_constant(row), at_zero = part == 0 ? of_zero(row) * p.side : 0;
      of.bias[output] = constant;
      for (int64_t j = 0; j < c; ++j) {
        const int64_t n = 2 * j + part;
        const double w = weight[row * c + j], through = of_mixing[row][j] + at_zero * in_bias[j];
        of.weight[output * c2 + n] = through * norm.slope[n] + constant * norm.offset[n];
        of_slope[n] += w * through;
        of_offset[n] += w * constant;
        g.in_bias[f * c + j] += w * norm.slope[n] * at_zero;
      }
    });
    of.scale.resize(c2);
    of.mean.resize(c2);
    of.variance.resize(c2);
    for (int64_t n = 0; n < c2; ++n) {
      const double full = of_slope[n] - factor.mean[n] * of_offset[n];
      of.scale[n] = full * norm.deviation[n];
      of.mean[n] = -norm.slope[n] * of_offset[n];
      of.variance[n] = -0.5 * full * norm.slope[n] * norm.deviation[n] * norm.deviation[n];
    }
    of.shift = std::move(of_offset);
  }
  return g;
}

// Adds what comes through the means and variances of the batch: a value u of channel n of the first convolution's
// spectrum has the gradient constant[n] + linear[n] u.
void add_through_statistics(const Parameters& p, const Statistics& batch, Gradients& g) {
  const int64_t c = p.channels, d = p.dim, c2 = 2 * c, images = batch.zero.rows;
  const auto weights = filled<double>(c2, d, [&](int64_t n, int64_t i) { return p.in_weight[n * d + i]; });
  g.moments.resize(2 * d * (d + 1));
  Rows<double> of_zero(images, c2);
  for (int q = 0; q < 2; ++q) {
    std::vector<double> linear(c2), constant(c2);
    for (int64_t n = 0; n < c2; ++n) {
      const int64_t f = n / c, place = 2 * (n % c) + q;
      linear[n] = 2 * g.factors[f].variance[place] / batch.count;
      constant[n] = g.factors[f].mean[place] / batch.count - linear[n] * p.factors[f].mean[place];
    }
    const double* const sums = batch.moments + q * d * (d + 1) + d;
    for (int64_t n = 0; n < c2; ++n)
      for (int64_t i = 0; i < d; ++i)
        g.in_weight[n * d + i] += linear[n] * batch.products[q][n][i] + constant[n] * sums[i * (d + 1)];
    const auto of_gram =
        product(d, weights, [&](int64_t i, int64_t n) { return 0.5 * linear[n] * p.in_weight[n * d + i]; });
    double* const of_moments = &g.moments[q * d * (d + 1)];
    for (int64_t i = 0; i < d; ++i) {
      std::copy(of_gram[i], of_gram[i] + d, of_moments + i * (d + 1));
      for (int64_t n = 0; n < c2; ++n) of_moments[i * (d + 1) + d] += constant[n] * p.in_weight[n * d + i];
    }
    for (int64_t b = 0; q == 0 && b < images; ++b)
      for (int64_t n = 0; n < c2; ++n) of_zero[b][n] = constant[n] + linear[n] * batch.at_zero[b][n];
  }
  const auto through_zero = product(c2, batch.zero, [&](int64_t n, int64_t b) { return of_zero[b][n]; });
  for (int64_t n = 0; n < c2; ++n) {
    for (int64_t i = 0; i < d; ++i) g.in_weight[n * d + i] += through_zero[n][i];
    for (int64_t b = 0; b < images; ++b) g.in_bias[n] += of_zero[b][n] * p.side;
  }
  g.zero = product(images, weights, [&](int64_t b, int64_t n) { return of_zero[b][n]; });
}

}  // namespace

Gradients compose_backward(const Parameters& p, const double* grad_matrix, const Statistics* batch) {
  Gradients g = through_matrix(p, grad_matrix);
  if (batch) add_through_statistics(p, *batch, g);
  return g;
}

}  // namespace fourier
