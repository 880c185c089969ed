// The Fourier branch: transform, one matrix made of all parameters, gate, last convolution, inverse transform.
#include <cmath>
#include <tuple>
#include <utility>

#include "../ops.h"
#include "pairs.h"
#include "parameters.h"
#include "stages.h"

namespace {

using fourier::Statistics;
using tensor::ScalarType;
using tensor::Tensor;
using Optional = std::optional<Tensor>;

struct Images {
  int64_t batch, height, width;
  double side;

  explicit Images(const Tensor& x)
      : batch(x.size(0)), height(x.size(2)), width(x.size(3)), side(std::sqrt(static_cast<double>(height * width))) {}
  double count() const { return static_cast<double>(batch * height * (width / 2 + 1)); }
};

fourier::Factor read_factor(
    const Optional& mean, const Optional& variance, const Tensor& scale, const Tensor& shift, const Tensor& weight,
    const Tensor& bias) {
  auto statistic = [&](const Optional& t) { return t ? tensor::read<double>(*t) : std::vector<double>(scale.numel()); };
  return {
      statistic(mean),
      statistic(variance),
      tensor::read<double>(scale),
      tensor::read<double>(shift),
      tensor::read<double>(weight),
      tensor::read<double>(bias)};
}

fourier::Parameters read_parameters(
    const Images& images, const Tensor& in_weight, const Tensor& in_bias, fourier::Factor gate, fourier::Factor value,
    double eps) {
  return {
      in_bias.numel() / 2,
      in_weight.size(1),
      tensor::read<double>(in_weight),
      tensor::read<double>(in_bias),
      {std::move(gate), std::move(value)},
      eps,
      images.side};
}

// The zero frequency of each channel's spectrum, which is real.
float* zero_frequency(Tensor& spectrum, int64_t image, int64_t channel) {
  return static_cast<float*>(spectrum.mutable_data_ptr()) + image * spectrum.stride(0) + channel * spectrum.stride(1);
}

fourier::Rows<double> read_zero(Tensor& spectrum) {
  fourier::Rows<double> zero(spectrum.size(0), spectrum.size(1));
  for (int64_t b = 0; b < zero.rows; ++b)
    for (int64_t c = 0; c < zero.columns; ++c) zero[b][c] = *zero_frequency(spectrum, b, c);
  return zero;
}

Statistics read_statistics(const Images& images, const fourier::Rows<double>& zero, const Tensor& moments) {
  Statistics batch;
  batch.count = images.count();
  batch.moments = static_cast<const double*>(moments.const_data_ptr());
  batch.zero = zero;
  return batch;
}

Tensor matrix_of(const Tensor& x, const fourier::Parameters& p) {
  Tensor matrix = tensor::empty(x, {4 * p.channels, 2 * (p.dim + 1)}, false, ScalarType::Float);
  fourier::compose(p, static_cast<float*>(matrix.mutable_data_ptr()));
  return matrix;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> swformer::fourier_mix(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Optional& gate_mean,
    const Optional& gate_variance, const Tensor& gate_scale, const Tensor& gate_shift, const Tensor& gate_weight,
    const Tensor& gate_bias, const Optional& value_mean, const Optional& value_variance, const Tensor& value_scale,
    const Tensor& value_shift, const Tensor& value_weight, const Tensor& value_bias, const Optional& out_weight,
    const Optional& out_bias, double eps, bool need_sums) {
  const Images images(x);
  const int64_t channels = in_bias.numel() / 2, outputs = out_weight ? out_weight->size(0) : channels;
  const bool batch_statistics = !gate_mean;
  fourier::Parameters p = read_parameters(
      images, in_weight, in_bias, read_factor(gate_mean, gate_variance, gate_scale, gate_shift, gate_weight, gate_bias),
      read_factor(value_mean, value_variance, value_scale, value_shift, value_weight, value_bias), eps);
  std::vector<double> table(4 * 2 * channels);
  const std::vector<int64_t> none = {0};
  Tensor moments = tensor::empty(x, none, false, ScalarType::Double), y = x;
  std::vector<double> of_zero;  // the result's zero frequencies, (B, C)
  auto add_zero = [&](auto&& zero) {
    for (int64_t b = 0; b < images.batch; ++b)
      for (int64_t c = 0; c < outputs; ++c) of_zero.push_back(zero(b, c));
  };
  const bool in_pairs =
      x.scalar_type() == ScalarType::BFloat16 && !batch_statistics && !out_weight && pairs::taken(x.size(1));
  if (in_pairs) {
    const auto z = fourier::rfft2_bf16(tensor::as_contiguous(x));
    const auto mixed =
        fourier::spectrum_mix_bf16(z, matrix_of(x, p), fourier::compose_zero(p, z.zero), images.height, images.width);
    y = fourier::irfft2_bf16(mixed, out_bias, x);
    add_zero([&](int64_t b, int64_t c) { return mixed.zero[b][c]; });
  } else {
    Tensor z = fourier::rfft2(tensor::as_contiguous(x));
    const auto zero = read_zero(z);
    if (batch_statistics) {
      moments = fourier::spectrum_moments(z, images.height, images.width);
      if (images.batch > 0) {
        Statistics batch = read_statistics(images, zero, moments);
        fourier::take_statistics(p, batch);
      }
      const double unbiased = images.count() / std::max(images.count() - 1, 1.0);
      double* row = table.data();
      for (const auto& factor : p.factors) {
        row = std::copy(factor.mean.begin(), factor.mean.end(), row);
        for (double variance : factor.variance) *row++ = variance * unbiased;
      }
    }
    Tensor mixed = fourier::spectrum_mix(
        z, matrix_of(x, p), fourier::compose_zero(p, zero), out_weight, images.height, images.width);
    y = fourier::irfft2(mixed, out_bias, x);
    add_zero([&](int64_t b, int64_t c) { return *zero_frequency(mixed, b, c); });
  }
  y = tensor::with_format(y, tensor::is_channels_last(x));
  Tensor sums =
      tensor::empty(x, need_sums ? std::vector<int64_t>{images.batch, outputs} : none, false, ScalarType::Float);
  if (need_sums) {
    const auto bias = out_bias ? tensor::read<double>(*out_bias) : std::vector<double>(outputs);
    float* sum = static_cast<float*>(sums.mutable_data_ptr());
    for (int64_t i = 0; i < images.batch * outputs; ++i)
      sum[i] = static_cast<float>(of_zero[i] * images.side + bias[i % outputs] * images.side * images.side);
  }
  const ScalarType dtype = tensor::dtype_of_sums(gate_scale.scalar_type());
  return {
      y, sums, moments,
      batch_statistics ? tensor::write(x, {4, 2 * channels}, dtype, table.data())
                       : tensor::empty(x, none, false, dtype)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
fourier_mix_backward(
    const Tensor& grad, const Optional& grad_sums, const Tensor& moments, const Tensor& x, const Tensor& in_weight,
    const Tensor& in_bias, const Optional& gate_mean, const Optional& gate_variance, const Tensor& gate_scale,
    const Tensor& gate_shift, const Tensor& gate_weight, const Tensor& gate_bias, const Optional& value_mean,
    const Optional& value_variance, const Tensor& value_scale, const Tensor& value_shift, const Tensor& value_weight,
    const Tensor& value_bias, const Optional& out_weight, const Optional& out_bias, double eps, bool need_images,
    bool need_parameters) {
  const Images images(x);
  const bool batch_statistics = !gate_mean && images.batch > 0;
  fourier::Parameters p = read_parameters(
      images, in_weight, in_bias, read_factor(gate_mean, gate_variance, gate_scale, gate_shift, gate_weight, gate_bias),
      read_factor(value_mean, value_variance, value_scale, value_shift, value_weight, value_bias), eps);
  Tensor z = fourier::rfft2(tensor::as_contiguous(x)), grad_mixed = fourier::rfft2(tensor::as_contiguous(grad));
  const auto zero = read_zero(z);
  const int64_t outputs = grad.size(1);
  if (grad_sums) {
    const auto of_sums = tensor::read<double>(*grad_sums);
    for (int64_t i = 0; i < grad_sums->numel(); ++i)
      *zero_frequency(grad_mixed, i / outputs, i % outputs) += static_cast<float>(of_sums[i] * images.side);
  }
  Statistics batch;
  if (batch_statistics) {
    batch = read_statistics(images, zero, moments);
    fourier::take_statistics(p, batch);
  }
  fourier::MixGradients through = fourier::spectrum_mix_backward(
      grad_mixed, z, matrix_of(x, p), fourier::compose_zero(p, zero), out_weight, images.height, images.width,
      need_images, need_parameters || batch_statistics, x.scalar_type() == ScalarType::BFloat16);
  fourier::Gradients g;
  if (images.batch > 0 && (need_parameters || batch_statistics))
    g = fourier::compose_backward(p, through.matrix.data(), batch_statistics ? &batch : nullptr);
  Tensor grad_x = tensor::empty(x, {0});
  if (need_images) {
    if (batch_statistics) {
      for (int64_t b = 0; b < images.batch; ++b)
        for (int64_t c = 0; c < p.dim; ++c) *zero_frequency(through.spectrum, b, c) += static_cast<float>(g.zero[b][c]);
      fourier::spectrum_moments_backward(through.spectrum, z, g.moments, images.height, images.width);
    }
    grad_x = tensor::with_format(fourier::irfft2(through.spectrum, std::nullopt, x), tensor::is_channels_last(x));
  }
  std::vector<double> of_out_bias(out_bias ? outputs : 0);
  for (size_t c = 0; c < of_out_bias.size(); ++c)
    for (int64_t b = 0; b < images.batch; ++b) of_out_bias[c] += *zero_frequency(grad_mixed, b, c) * images.side;
  const tensor::GradientWriter write{x, need_parameters};
  return {
      grad_x,
      write(in_weight, g.in_weight),
      write(in_bias, g.in_bias),
      write(gate_scale, g.factors[0].scale),
      write(gate_shift, g.factors[0].shift),
      write(gate_weight, g.factors[0].weight),
      write(gate_bias, g.factors[0].bias),
      write(value_scale, g.factors[1].scale),
      write(value_shift, g.factors[1].shift),
      write(value_weight, g.factors[1].weight),
      write(value_bias, g.factors[1].bias),
      write(out_weight, through.out_weight),
      write(out_bias, of_out_bias)};
}

constexpr char kInputs[] =
    "Tensor x, Tensor in_weight, Tensor in_bias, Tensor? gate_mean, Tensor? gate_variance, Tensor gate_scale,"
    " Tensor gate_shift, Tensor gate_weight, Tensor gate_bias, Tensor? value_mean, Tensor? value_variance,"
    " Tensor value_scale, Tensor value_shift, Tensor value_weight, Tensor value_bias, Tensor? out_weight,"
    " Tensor? out_bias, float eps";

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  const std::string inputs = kInputs;
  m.def(("fourier_mix(" + inputs + ", bool need_sums) -> (Tensor, Tensor, Tensor, Tensor)").c_str());
  m.def(("fourier_mix_backward(Tensor grad, Tensor? grad_sums, Tensor moments, " + inputs +
         ", bool need_images, bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
         " Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("fourier_mix", TORCH_BOX(&swformer::fourier_mix));
  m.impl("fourier_mix_backward", TORCH_BOX(&fourier_mix_backward));
}
