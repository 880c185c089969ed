// A 1x1 convolution with what is linear around it folded in: a normalisation, another convolution of its last outputs,
// a scale. All in double.
#include <cmath>
#include <string>

#include "ops.h"
#include "product.h"

namespace {

using gemm::Rows;
using swformer::Optional;
using tensor::Tensor;
using Values = std::vector<double>;

// y = slope x + offset of each input: a normalisation, or nothing.
struct Norm {
  bool exists;
  Values mean, weight, deviation, slope, offset;  // deviation: 1 / sqrt(variance + eps)
  Norm(
      int64_t inputs, const Optional& means, const Optional& variances, const Optional& weights, const Optional& biases,
      double eps)
      : exists(means.has_value()), mean(inputs), weight(inputs, 1.0), deviation(inputs, 1.0), slope(inputs, 1.0),
        offset(inputs) {
    if (!exists) return;
    mean = tensor::read<double>(*means);
    if (weights) weight = tensor::read<double>(*weights);
    if (biases) offset = tensor::read<double>(*biases);
    const Values variance = tensor::read<double>(*variances);
    for (int64_t d = 0; d < inputs; ++d) {
      deviation[d] = 1 / std::sqrt(variance[d] + eps);
      slope[d] = weight[d] * deviation[d];
      offset[d] -= mean[d] * slope[d];
    }
  }
};

// Weight (rows x columns) and bias of a convolution.
struct Convolution {
  Rows<double> weight;
  Values bias;
};

struct Fold {
  int64_t rows, inputs, composed = 0, kept, outputs;  // the last `composed` rows go through another convolution
  Values weight, bias, then_weight, then_bias, scale;
  Norm norm;

  Fold(
      const Tensor& weight, const Tensor& bias, const Optional& mean, const Optional& variance,
      const Optional& norm_weight, const Optional& norm_bias, const Optional& then_weight, const Optional& then_bias,
      const Optional& scale, double eps)
      : rows(weight.size(0)), inputs(weight.size(1)), kept(rows), outputs(rows), weight(tensor::read<double>(weight)),
        bias(tensor::read<double>(bias)), norm(inputs, mean, variance, norm_weight, norm_bias, eps) {
    if (then_weight) {
      composed = then_weight->size(1);
      kept -= composed;
      outputs = kept + then_weight->size(0);
      this->then_weight = tensor::read<double>(*then_weight);
      this->then_bias = tensor::read<double>(*then_bias);
    }
    this->scale = scale ? tensor::read<double>(*scale) : Values(outputs, 1.0);
  }

  // Behind the normalisation.
  Convolution behind_norm() const {
    Convolution result{
        gemm::filled<double>(
            rows, inputs, [&](int64_t r, int64_t d) { return weight[r * inputs + d] * norm.slope[d]; }),
        bias};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < inputs; ++d) result.bias[r] += weight[r * inputs + d] * norm.offset[d];
    return result;
  }

  // And through the other convolution; not scaled.
  Convolution through(const Convolution& first) const {
    Convolution result{Rows<double>(outputs, inputs), Values(outputs)};
    std::copy_n(first.weight.values.begin(), kept * first.weight.ld, result.weight.values.begin());
    std::copy_n(first.bias.begin(), kept, result.bias.begin());
    if (outputs == kept) return result;
    const auto last =
        gemm::filled<double>(composed, inputs, [&](int64_t n, int64_t d) { return first.weight[kept + n][d]; });
    auto then = [&](int64_t e, int64_t n) { return then_weight[e * composed + n]; };
    const auto product = gemm::product(outputs - kept, last, then);
    std::copy(product.values.begin(), product.values.end(), result.weight[kept]);
    for (int64_t e = 0; e < outputs - kept; ++e) {
      double& sum = result.bias[kept + e] = then_bias[e];
      for (int64_t n = 0; n < composed; ++n) sum += then(e, n) * first.bias[kept + n];
    }
    return result;
  }
};

struct Gradients {
  Values weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale;
};

// `grad`: weight and then bias.
Gradients backward(const Fold& f, const Values& grad) {
  const int64_t rows = f.rows, inputs = f.inputs, kept = f.kept, others = f.outputs - kept;
  const Convolution first = f.behind_norm(), folded = f.through(first);
  Gradients g;
  g.scale.resize(f.outputs);
  Rows<double> of_weight(f.outputs, inputs);
  Values of_bias(f.outputs);
  for (int64_t r = 0; r < f.outputs; ++r) {
    const double upstream = grad[f.outputs * inputs + r];
    of_bias[r] = upstream * f.scale[r];
    g.scale[r] = upstream * folded.bias[r];
    for (int64_t d = 0; d < inputs; ++d) {
      of_weight[r][d] = grad[r * inputs + d] * f.scale[r];
      g.scale[r] += grad[r * inputs + d] * folded.weight[r][d];
    }
  }
  Rows<double> total(rows, inputs);
  g.bias.assign(of_bias.begin(), of_bias.begin() + kept);
  g.bias.resize(rows);
  std::copy_n(of_weight.values.begin(), kept * of_weight.ld, total.values.begin());
  if (f.composed > 0) {
    const auto upstream =
        gemm::filled<double>(others, inputs, [&](int64_t e, int64_t d) { return of_weight[kept + e][d]; });
    const auto product =
        gemm::product(f.composed, upstream, [&](int64_t n, int64_t e) { return f.then_weight[e * f.composed + n]; });
    std::copy(product.values.begin(), product.values.end(), total[kept]);
    const auto of_then = gemm::product(
        others,
        gemm::filled<double>(inputs, f.composed, [&](int64_t d, int64_t n) { return first.weight[kept + n][d]; }),
        [&](int64_t e, int64_t d) { return upstream[e][d]; });
    g.then_weight.resize(others * f.composed);
    g.then_bias.assign(of_bias.begin() + kept, of_bias.end());
    for (int64_t e = 0; e < others; ++e)
      for (int64_t n = 0; n < f.composed; ++n) {
        g.then_weight[e * f.composed + n] = of_then[e][n] + g.then_bias[e] * first.bias[kept + n];
        g.bias[kept + n] += f.then_weight[e * f.composed + n] * g.then_bias[e];
      }
  }
  g.weight.resize(rows * inputs);
  Values of_slope(inputs), of_offset(inputs);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < inputs; ++d) {
      g.weight[r * inputs + d] = total[r][d] * f.norm.slope[d] + g.bias[r] * f.norm.offset[d];
      of_slope[d] += f.weight[r * inputs + d] * total[r][d];
      of_offset[d] += f.weight[r * inputs + d] * g.bias[r];
    }
  for (Values* values : {&g.mean, &g.variance, &g.norm_weight}) values->resize(inputs);
  for (int64_t d = 0; d < inputs; ++d) {
    const double full = of_slope[d] - f.norm.mean[d] * of_offset[d], deviation = f.norm.deviation[d];
    g.mean[d] = -f.norm.slope[d] * of_offset[d];
    g.variance[d] = -0.5 * full * f.norm.slope[d] * deviation * deviation;
    g.norm_weight[d] = full * deviation;
  }
  g.norm_bias = std::move(of_offset);
  return g;
}

}  // namespace

Tensor swformer::fold_norm(
    const Tensor& weight, const Tensor& bias, const Optional& mean, const Optional& variance,
    const Optional& norm_weight, const Optional& norm_bias, const Optional& then_weight, const Optional& then_bias,
    const Optional& scale, double eps) {
  const Fold f(weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale, eps);
  const Convolution folded = f.through(f.behind_norm());
  Values values(f.outputs * (f.inputs + 1));
  for (int64_t r = 0; r < f.outputs; ++r) {
    for (int64_t d = 0; d < f.inputs; ++d) values[r * f.inputs + d] = f.scale[r] * folded.weight[r][d];
    values[f.outputs * f.inputs + r] = f.scale[r] * folded.bias[r];
  }
  const std::vector<int64_t> size{static_cast<int64_t>(values.size())};
  return tensor::write(weight, size, tensor::dtype_of_sums(weight.scalar_type()), values.data());
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fold_norm_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& bias, const Optional& mean, const Optional& variance,
    const Optional& norm_weight, const Optional& norm_bias, const Optional& then_weight, const Optional& then_bias,
    const Optional& scale, double eps, bool need_parameters) {
  const Fold f(weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale, eps);
  const Gradients g = need_parameters ? backward(f, tensor::read<double>(grad)) : Gradients{};
  const tensor::GradientWriter write{grad, need_parameters};
  return {
      write(weight, g.weight),
      write(bias, g.bias),
      write(mean, g.mean),
      write(variance, g.variance),
      write(norm_weight, g.norm_weight),
      write(norm_bias, g.norm_bias),
      write(then_weight, g.then_weight),
      write(then_bias, g.then_bias),
      write(scale, g.scale)};
}

constexpr char kInputs[] =
    "Tensor weight, Tensor bias, Tensor? mean, Tensor? variance, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor? then_weight, Tensor? then_bias, Tensor? scale, float eps";

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  const std::string inputs = kInputs;
  m.def(("fold_norm(" + inputs + ") -> Tensor").c_str());
  m.def(("fold_norm_backward(Tensor grad, " + inputs +
         ", bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("fold_norm", TORCH_BOX(&swformer::fold_norm));
  m.impl("fold_norm_backward", TORCH_BOX(&fold_norm_backward));
}
