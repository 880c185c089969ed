// The parameters of the Fourier branch as one matrix on the spectrum of x, and the gradients through it.
//
// The first convolution, the normalisations and the second convolutions are linear up to the non-linearities. The
// matrix is (2, 2, C, 2, D + 1): factor (gate, value), part (real, imaginary) and channel of the output, part and
// channel of the input; at channel D of the input stand the constant (part 0) and what the zero frequency receives
// beside (part 1): a bias of the first convolution is a constant image.
//
// Statistics of a batch follow from the second moments of x's spectrum. The zero frequency, far larger than the others
// unless x has mean 0, is kept out of the moments and enters by itself. All this is in fp64 but the matrix, and what
// the gate takes of the zero frequency is too.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "product.h"

namespace fourier {

using gemm::Rows;

// Of the gate or the value: mean, variance, scale, shift and bias (2 * C,), weight (2 * C, 2 * C).
struct Factor {
  std::vector<double> mean, variance, scale, shift, weight, bias;
};

struct Parameters {
  int64_t channels, dim;                   // C, D
  std::vector<double> in_weight, in_bias;  // (2 * C, D), (2 * C,)
  std::array<Factor, 2> factors;
  double eps, side;  // side = sqrt(H * W)
};

// Of a batch, and what its gradients take.
struct Statistics {
  double count = 0;                 // values per channel
  const double* moments = nullptr;  // of x's spectrum, (2, D, D + 1)
  Rows<double> zero;                // its zero frequency, (B, D)
  Rows<double> products[2];         // in_weight times the moments of each part, (2 * C, D)
  Rows<double> at_zero;             // the zero frequency behind the first convolution, (B, 2 * C)
};

// Sets the factors' means and variances to the batch's; count, moments and zero of `batch` are given.
void take_statistics(Parameters& p, Statistics& batch);

// The matrix, (4 * C, 2 * (D + 1)).
void compose(const Parameters& p, float* matrix);

// What the matrix gives of the zero frequency (B, D), the batch's largest numbers: (B, 4 * C).
Rows<double> compose_zero(const Parameters& p, const Rows<double>& zero);

struct Gradients {
  std::vector<double> in_weight, in_bias;
  std::array<Factor, 2> factors;  // means and variances as well
  std::vector<double> moments;    // of the batch, if there is one
  Rows<double> zero;
};
Gradients compose_backward(const Parameters& p, const double* grad_matrix, const Statistics* batch);

}  // namespace fourier
