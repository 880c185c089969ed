// What the Fourier branch is made of, in order. Spectra lie in memory as spectrum.h says.
#pragma once

#include <optional>
#include <vector>

#include "parameters.h"
#include "tensor.h"

namespace fourier {

using tensor::Tensor;

// (B, C, H, W), contiguous -> (B, C, blocks, 2, kFloats) of fp32.
Tensor rfft2(const Tensor& x);

// Over all frequencies but zero, (2, D, D + 1) in fp64: of each part, the channels' products with each other, and in
// the last column their sums.
Tensor spectrum_moments(const Tensor& spectrum, int64_t height, int64_t width);

// `matrix`, (4 * C, 2 * (D + 1)) of fp32, on the spectrum, gate times value, out_weight (E, C, 1, 1) if there is one.
// What the matrix gives of the zero frequency is `of_zero`, (B, 4 * C).
Tensor spectrum_mix(
    const Tensor& spectrum, const Tensor& matrix, const Rows<double>& of_zero, const std::optional<Tensor>& out_weight,
    int64_t height, int64_t width);

// The inverse transform, plus the channels' biases, in the size (but for its channels) and dtype of `like`.
Tensor irfft2(const Tensor& spectrum, const std::optional<Tensor>& bias, const Tensor& like);

// Spectra and, apart from them, their zero frequencies, which would lose too much in bf16.
struct Spectrum {
  Tensor values;
  Rows<double> zero;
};

// The three in bf16, where the processor multiplies it in pairs.
Spectrum rfft2_bf16(const Tensor& x);
Spectrum spectrum_mix_bf16(
    const Spectrum& spectrum, const Tensor& matrix, const Rows<double>& of_zero, int64_t height, int64_t width);
Tensor irfft2_bf16(const Spectrum& spectrum, const std::optional<Tensor>& bias, const Tensor& like);

struct MixGradients {
  Tensor spectrum;
  std::vector<double> matrix, out_weight;
};
// in_pairs: products in bf16, where the processor has them.
MixGradients spectrum_mix_backward(
    const Tensor& grad, const Tensor& spectrum, const Tensor& matrix, const Rows<double>& of_zero,
    const std::optional<Tensor>& out_weight, int64_t height, int64_t width, bool need_spectrum, bool need_parameters,
    bool in_pairs);

// Adds to `grad`, the spectrum's gradient, what comes through its moments.
void spectrum_moments_backward(
    Tensor& grad, const Tensor& spectrum, const std::vector<double>& grad_moments, int64_t height, int64_t width);

}  // namespace fourier
