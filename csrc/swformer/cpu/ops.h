// The ops that others are made of.
#pragma once

#include <optional>
#include <tuple>

#include "tensor.h"

namespace swformer {

using tensor::Tensor;
using Optional = std::optional<Tensor>;

Tensor fold_attention(
    const Tensor& spatial_sums, const Tensor& wavelet_sums, const Tensor& fourier_sums, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& last_weight, const Tensor& last_bias,
    const Tensor& weight, const Tensor& bias, const Optional& scale, int64_t area);

Tensor fold_norm(
    const Tensor& weight, const Tensor& bias, const Optional& mean, const Optional& variance,
    const Optional& norm_weight, const Optional& norm_bias, const Optional& then_weight, const Optional& then_bias,
    const Optional& scale, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor> fourier_mix(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Optional& gate_mean,
    const Optional& gate_variance, const Tensor& gate_scale, const Tensor& gate_shift, const Tensor& gate_weight,
    const Tensor& gate_bias, const Optional& value_mean, const Optional& value_variance, const Tensor& value_scale,
    const Tensor& value_shift, const Tensor& value_weight, const Tensor& value_bias, const Optional& out_weight,
    const Optional& out_bias, double eps, bool need_sums);

std::tuple<Tensor, Tensor, Tensor, Tensor> local_branches(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& spatial_weight,
    const Tensor& spatial_bias, const Tensor& wavelet_weight, const Tensor& wavelet_bias, const Tensor& dec_lo,
    const Tensor& dec_hi, const Tensor& rec_lo, const Tensor& rec_hi);

Tensor multiscale_ffn(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& dw_weight1, const Tensor& dw_bias1,
    const Tensor& dw_weight2, const Tensor& dw_bias2, const Tensor& dw_weight4, const Tensor& dw_bias4,
    const Tensor& out_weight, const Tensor& out_bias, const Optional& residual);

Tensor pointwise(
    const Tensor& x0, const Optional& x1, const Optional& x2, const Tensor& weight, const Tensor& bias,
    const Optional& residual);

}  // namespace swformer
