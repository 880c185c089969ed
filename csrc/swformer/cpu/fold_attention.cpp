// The mixer's last convolution with channel attention, the Fourier branch's last convolution and a scale folded in, for
// each image. All in double.
#include <algorithm>
#include <string>

#include "attention.h"
#include "ops.h"
#include "product.h"

namespace {

using gemm::Rows;
using swformer::Optional;
using tensor::Tensor;
using Values = std::vector<double>;

// Channels: `local` of the spatial and the wavelet branch, `last` that the Fourier branch's last convolution makes of
// `inner`.
struct Fold {
  int64_t batch, spatial, local, inner, last, channels, outputs, width;
  double area;
  Values sums[3], last_weight, last_bias, weight, bias, scale;
  attention::Network network;

  Fold(
      const Tensor& spatial_sums, const Tensor& wavelet_sums, const Tensor& fourier_sums, const Tensor& w1,
      const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& last_weight, const Tensor& last_bias,
      const Tensor& weight, const Tensor& bias, const Optional& scale, int64_t area)
      : batch(spatial_sums.size(0)), spatial(spatial_sums.size(1)), local(spatial + wavelet_sums.size(1)),
        inner(fourier_sums.size(1)), last(last_bias.size(0)), channels(local + last), outputs(bias.size(0)),
        width(local + inner), area(static_cast<double>(area)),
        sums{
            tensor::read<double>(spatial_sums), tensor::read<double>(wavelet_sums), tensor::read<double>(fourier_sums)},
        last_weight(tensor::read<double>(last_weight)), last_bias(tensor::read<double>(last_bias)),
        weight(tensor::read<double>(weight)), bias(tensor::read<double>(bias)),
        scale(scale ? tensor::read<double>(*scale) : Values(outputs, 1.0)), network(batch, w1, b1, w2, b2) {
    for (int64_t b = 0; b < batch; ++b) {
      double* const means = &network.mean[b * channels];
      for (int64_t c = 0; c < spatial; ++c) means[c] = sums[0][b * spatial + c] / this->area;
      for (int64_t c = spatial; c < local; ++c) means[c] = sums[1][b * (local - spatial) + c - spatial] / this->area;
      for (int64_t i = 0; i < last; ++i)
        means[local + i] =
            attention::dot(inner, &this->last_weight[i * inner], &sums[2][b * inner]) / this->area + this->last_bias[i];
    }
    network.run();
  }

  // The scaled weight times the attention.
  double attended(int64_t b, int64_t e, int64_t c) const {
    return scale[e] * weight[e * channels + c] * network.scale[b * channels + c];
  }
};

// Of the sums, the parameters and, by image, the scaled weight: in the order of the op's inputs.
struct Gradients {
  Values sums[3];
  attention::Gradients network;
  Values last_weight, last_bias, weight, bias, scale;
};

// The attention's gradient (channels,) of image b through the network that makes it.
void through_network(const Fold& f, int64_t b, const Values& of_attention, Gradients& g) {
  const Values of_mean = f.network.backward(b, of_attention.data(), g.network);
  for (int64_t c = 0; c < f.spatial; ++c) g.sums[0][b * f.spatial + c] = of_mean[c] / f.area;
  const int64_t others = f.local - f.spatial;
  for (int64_t c = 0; c < others; ++c) g.sums[1][b * others + c] = of_mean[f.spatial + c] / f.area;
  for (int64_t i = 0; i < f.last; ++i) {
    const double upstream = of_mean[f.local + i];
    g.last_bias[i] += upstream;
    for (int64_t k = 0; k < f.inner; ++k) {
      g.last_weight[i * f.inner + k] += upstream / f.area * f.sums[2][b * f.inner + k];
      g.sums[2][b * f.inner + k] += upstream / f.area * f.last_weight[i * f.inner + k];
    }
  }
}

// `grad`: all weights and then all biases.
Gradients backward(const Fold& f, const Values& grad) {
  Gradients g;
  g.network = f.network.no_gradients();
  const std::pair<Values*, size_t> sizes[] = {{&g.sums[0], f.sums[0].size()}, {&g.sums[1], f.sums[1].size()},
                                              {&g.sums[2], f.sums[2].size()}, {&g.last_weight, f.last_weight.size()},
                                              {&g.weight, f.weight.size()},   {&g.last_bias, f.last_bias.size()},
                                              {&g.bias, f.bias.size()},       {&g.scale, f.scale.size()}};
  for (const auto& [values, size] : sizes) values->resize(size);
  const auto transposed =
      gemm::filled<double>(f.inner, f.last, [&](int64_t k, int64_t i) { return f.last_weight[i * f.inner + k]; });
  for (int64_t b = 0; b < f.batch; ++b) {
    const double* const of_weights = &grad[b * f.outputs * f.width];
    const double* const of_biases = &grad[f.batch * f.outputs * f.width + b * f.outputs];
    auto of_inner = [&](int64_t e, int64_t k) { return of_weights[e * f.width + f.local + k]; };
    // Of the attended weight's columns for the Fourier branch, and of that branch's last convolution.
    auto of_last = gemm::product(f.outputs, transposed, of_inner);
    const auto of_last_weight = gemm::product(
        f.last, gemm::filled<double>(f.outputs, f.inner, of_inner),
        [&](int64_t i, int64_t e) { return f.attended(b, e, f.local + i); });
    Values of_attention(f.channels);
    for (int64_t e = 0; e < f.outputs; ++e) {
      g.bias[e] += of_biases[e];
      for (int64_t c = 0; c < f.channels; ++c) {
        const int64_t i = c - f.local;
        const double upstream = i < 0 ? of_weights[e * f.width + c] : of_last[e][i] + of_biases[e] * f.last_bias[i];
        of_attention[c] += upstream * f.scale[e] * f.weight[e * f.channels + c];
        g.weight[e * f.channels + c] += upstream * f.network.scale[b * f.channels + c];
        if (i >= 0) g.last_bias[i] += of_biases[e] * f.attended(b, e, c);
      }
    }
    for (int64_t i = 0; i < f.last; ++i)
      for (int64_t k = 0; k < f.inner; ++k) g.last_weight[i * f.inner + k] += of_last_weight[i][k];
    through_network(f, b, of_attention, g);
  }
  for (int64_t e = 0; e < f.outputs; ++e) {
    double* const row = &g.weight[e * f.channels];
    g.scale[e] = attention::dot(f.channels, row, &f.weight[e * f.channels]) + g.bias[e] * f.bias[e];
    for (int64_t c = 0; c < f.channels; ++c) row[c] *= f.scale[e];
    g.bias[e] *= f.scale[e];
  }
  return g;
}

}  // namespace

Tensor swformer::fold_attention(
    const Tensor& spatial_sums, const Tensor& wavelet_sums, const Tensor& fourier_sums, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& last_weight, const Tensor& last_bias,
    const Tensor& weight, const Tensor& bias, const Optional& scale, int64_t area) {
  const Fold f(
      spatial_sums, wavelet_sums, fourier_sums, w1, b1, w2, b2, last_weight, last_bias, weight, bias, scale, area);
  const int64_t weights = f.batch * f.outputs * f.width;
  Values values(weights + f.batch * f.outputs);
  const auto last =
      gemm::filled<double>(f.last, f.inner, [&](int64_t i, int64_t k) { return f.last_weight[i * f.inner + k]; });
  for (int64_t b = 0; b < f.batch; ++b) {
    const auto product =
        gemm::product(f.outputs, last, [&](int64_t e, int64_t i) { return f.attended(b, e, f.local + i); });
    for (int64_t e = 0; e < f.outputs; ++e) {
      double* const row = &values[(b * f.outputs + e) * f.width];
      for (int64_t c = 0; c < f.local; ++c) row[c] = f.attended(b, e, c);
      std::copy_n(product[e], f.inner, row + f.local);
      double& constant = values[weights + b * f.outputs + e] = f.scale[e] * f.bias[e];
      for (int64_t i = 0; i < f.last; ++i) constant += f.attended(b, e, f.local + i) * f.last_bias[i];
    }
  }
  return tensor::write(spatial_sums, {static_cast<int64_t>(values.size())}, spatial_sums.scalar_type(), values.data());
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
fold_attention_backward(
    const Tensor& grad, const Tensor& spatial_sums, const Tensor& wavelet_sums, const Tensor& fourier_sums,
    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& last_weight,
    const Tensor& last_bias, const Tensor& weight, const Tensor& bias, const Optional& scale, int64_t area,
    bool need_parameters) {
  const Fold f(
      spatial_sums, wavelet_sums, fourier_sums, w1, b1, w2, b2, last_weight, last_bias, weight, bias, scale, area);
  const Gradients g = need_parameters ? backward(f, tensor::read<double>(grad)) : Gradients{};
  const tensor::GradientWriter write{grad, need_parameters};
  return {
      write(spatial_sums, g.sums[0]),
      write(wavelet_sums, g.sums[1]),
      write(fourier_sums, g.sums[2]),
      write(w1, g.network.w1),
      write(b1, g.network.b1),
      write(w2, g.network.w2),
      write(b2, g.network.b2),
      write(last_weight, g.last_weight),
      write(last_bias, g.last_bias),
      write(weight, g.weight),
      write(bias, g.bias),
      write(scale, g.scale)};
}

constexpr char kInputs[] =
    "Tensor spatial_sums, Tensor wavelet_sums, Tensor fourier_sums, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
    " Tensor last_weight, Tensor last_bias, Tensor weight, Tensor bias, Tensor? scale, int area";

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  const std::string inputs = kInputs;
  m.def(("fold_attention(" + inputs + ") -> Tensor").c_str());
  m.def(("fold_attention_backward(Tensor grad, " + inputs +
         ", bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
         " Tensor, Tensor)")
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("fold_attention", TORCH_BOX(&swformer::fold_attention));
  m.impl("fold_attention_backward", TORCH_BOX(&fold_attention_backward));
}
