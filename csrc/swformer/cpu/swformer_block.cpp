// A whole SWFormer block without gradients: its ops one after the other. Each map lives as long as it is needed.
#include <array>
#include <string>
#include <utility>

#include "ops.h"

namespace {

using tensor::Tensor;

constexpr int kTensors = 53, kNumbers = 3;

constexpr char kSchema[] =
    "swformer_block(Tensor x,"
    " Tensor norm1_mean, Tensor norm1_variance, Tensor norm1_scale, Tensor norm1_shift,"
    " Tensor conv_in_weight, Tensor conv_in_bias, Tensor spatial_weight, Tensor spatial_bias,"
    " Tensor wavelet_weight, Tensor wavelet_bias, Tensor wavelet_dec_lo, Tensor wavelet_dec_hi,"
    " Tensor wavelet_rec_lo, Tensor wavelet_rec_hi, Tensor fourier_in_weight, Tensor fourier_in_bias,"
    " Tensor gate_mean, Tensor gate_variance, Tensor gate_scale, Tensor gate_shift, Tensor gate_weight,"
    " Tensor gate_bias, Tensor value_mean, Tensor value_variance, Tensor value_scale, Tensor value_shift,"
    " Tensor value_weight, Tensor value_bias, Tensor fourier_out_weight, Tensor fourier_out_bias,"
    " Tensor attention_w1, Tensor attention_b1, Tensor attention_w2, Tensor attention_b2,"
    " Tensor conv_out_weight, Tensor conv_out_bias, Tensor beta,"
    " Tensor norm2_mean, Tensor norm2_variance, Tensor norm2_scale, Tensor norm2_shift,"
    " Tensor ffn_in_weight, Tensor ffn_in_bias, Tensor ffn_dw_weight1, Tensor ffn_dw_bias1, Tensor ffn_dw_weight2,"
    " Tensor ffn_dw_bias2, Tensor ffn_dw_weight4, Tensor ffn_dw_bias4, Tensor ffn_out_weight, Tensor ffn_out_bias,"
    " Tensor gamma, float eps1, float eps2, float fourier_eps) -> Tensor";

// The tensors of the schema, one after the other.
class Arguments {
 public:
  explicit Arguments(std::array<Tensor, kTensors>& tensors) : next_(tensors.begin()) {}
  Tensor next() { return *next_++; }
  template <size_t n>
  std::array<Tensor, n> next() {
    std::array<Tensor, n> result;
    for (Tensor& t : result) t = next();
    return result;
  }

 private:
  std::array<Tensor, kTensors>::iterator next_;
};

// Parts of the vector that a fold gives, as tensors.
class Parts {
 public:
  explicit Parts(Tensor all) : all_(std::move(all)), next_(static_cast<const float*>(all_.const_data_ptr())) {}
  Tensor next(const std::vector<int64_t>& size) {
    Tensor part = tensor::write(all_, size, all_.scalar_type(), next_);
    next_ += part.numel();
    return part;
  }

 private:
  Tensor all_;
  const float* next_;
};

Tensor swformer_block(std::array<Tensor, kTensors>& tensors, const std::array<double, kNumbers>& eps) {
  using namespace swformer;
  Arguments arguments(tensors);
  const Tensor x = tensor::as_contiguous(arguments.next());
  const int64_t batch = x.size(0), dim = x.size(1);
  auto norm = arguments.next<4>();
  const auto conv_in = arguments.next<2>();
  const auto spatial = arguments.next<2>();
  const auto wavelet = arguments.next<6>();
  const auto first = arguments.next<2>();
  const auto factors = arguments.next<12>();
  const auto last = arguments.next<2>();
  const auto attention = arguments.next<4>();
  const auto conv_out = arguments.next<2>();
  const Tensor beta = arguments.next();
  const int64_t channels = first[1].numel(), inner = channels / 2;

  Tensor y;
  {
    Parts folded(fold_norm(
        conv_in[0], conv_in[1], norm[0], norm[1], norm[2], norm[3], first[0], first[1], std::nullopt, eps[0]));
    const Tensor local_weight = folded.next({2 * dim, dim}), fourier_weight = folded.next({channels, dim});
    const Tensor local_bias = folded.next({2 * dim}), fourier_bias = folded.next({channels});
    // The branch that needs most memory first.
    const auto [frequencies, of_frequencies, moments, statistics] = fourier_mix(
        x, fourier_weight, fourier_bias, factors[0], factors[1], factors[2], factors[3], factors[4], factors[5],
        factors[6], factors[7], factors[8], factors[9], factors[10], factors[11], std::nullopt, std::nullopt, eps[2],
        true);
    const auto [left, right, left_sums, right_sums] = local_branches(
        x, local_weight, local_bias, spatial[0], spatial[1], wavelet[0], wavelet[1], wavelet[2], wavelet[3], wavelet[4],
        wavelet[5]);
    Parts weights(fold_attention(
        left_sums, right_sums, of_frequencies, attention[0], attention[1], attention[2], attention[3], last[0], last[1],
        conv_out[0], conv_out[1], beta, x.size(2) * x.size(3)));
    const Tensor weight = weights.next({batch, dim, 2 * dim + inner}), bias = weights.next({batch, dim});
    y = pointwise(left, right, frequencies, weight, bias, x);
  }
  norm = arguments.next<4>();
  const auto ffn_in = arguments.next<2>();
  const auto depthwise = arguments.next<6>();
  const auto ffn_out = arguments.next<2>();
  const Tensor gamma = arguments.next();
  const int64_t hidden = ffn_in[1].numel();
  Parts in(fold_norm(
      ffn_in[0], ffn_in[1], norm[0], norm[1], norm[2], norm[3], std::nullopt, std::nullopt, std::nullopt, eps[1]));
  Parts out(fold_norm(
      ffn_out[0], ffn_out[1], std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt, gamma,
      0.0));
  const Tensor in_weight = in.next({hidden, dim}), in_bias = in.next({hidden});
  const Tensor out_weight = out.next({dim, hidden}), out_bias = out.next({dim});
  return multiscale_ffn(
      y, in_weight, in_bias, depthwise[0], depthwise[1], depthwise[2], depthwise[3], depthwise[4], depthwise[5],
      out_weight, out_bias, y);
}

// More arguments than TORCH_BOX can name.
void boxed(StableIValue* stack, uint64_t count, uint64_t) {
  STD_TORCH_CHECK(count == kTensors + kNumbers, "swformer_block takes ", kTensors + kNumbers, " arguments");
  std::array<Tensor, kTensors> tensors;
  std::array<double, kNumbers> numbers;
  for (int i = 0; i < kTensors; ++i) tensors[i] = torch::stable::detail::to<Tensor>(stack[i]);
  for (int i = 0; i < kNumbers; ++i) numbers[i] = torch::stable::detail::to<double>(stack[kTensors + i]);
  stack[0] = torch::stable::detail::from(swformer_block(tensors, numbers));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) { m.def(kSchema); }

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) { m.impl("swformer_block", &boxed); }
