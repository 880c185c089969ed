// Haar transform, depthwise k x k convolution of the four bands and inverse transform in one pass over pairs of pixel rows, and
// their gradients, with nothing saved but the input. No band leaves the ring of rows.
#include "wavelet_mix.h"

namespace {

using haar::Filters;
using simd::Acc;
using simd::Vec;
using stencil::Padding;
using stencil::Problem;
using stencil::start;
using stencil::Task;
using stencil::Tasks;
using tensor::Tensor;
using namespace wavelet;

// sums[4 * band + pixel] += band * pixel over a row of blocks; writes to `out`, where it is given, the pixels that `synthesis`
// makes of the bands. Only lanes of the image count in the sums.
template <bool kReplicate, bool kSum, bool kStore, class B, class T, class A>
void synthesise_row(
    const B& blocks, const B& out_blocks, int64_t i, const A* const (&bands)[kBands], const Filters<A>& synthesis, const T* x, T* out,
    Vec<A>* sums) {
  const Filters<A> f = synthesis;
  Vec<A> total[16];
  if (kSum) {
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) total[t] = sums[t];  // unrolled, not std::copy, so that they stay in registers
  }
  stencil::each_vector(blocks.whole(), blocks.vectors(), [&](int64_t v, auto whole) __attribute__((always_inline)) {
    Vec<A> y[kBands], pixels[4];
    for (int q = 0; q < kBands; ++q) y[q] = simd::load(bands[q] + v * B::n);
    if (kSum) {
      blocks.template load<kReplicate>(x, i, v, whole, pixels);
      for (int q = 0; q < kBands; ++q) {
        const Vec<A> band = whole ? y[q] : stencil::first_lanes<A>(y[q], blocks.count(v));
        for (int a = 0; a < 4; ++a) total[4 * q + a] += band * pixels[a];
      }
    }
    if (kStore) {
      haar::synthesise(f, y, pixels);
      out_blocks.template store<kReplicate>(out, i, v, whole, pixels);
    }
  });
  if (kSum) {
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) sums[t] = total[t];
  }
}

// Returns, with kSums, the sums of the output over the pixels, (B, C).
template <class T, bool kChannelsLast, int k, bool kSums>
std::vector<double> forward(const Problem<T>& g, const Parameters<Acc<T>>& p) {
  using F = wavelet::Forward<T, kChannelsLast, k>;
  const int64_t rows = block_rows(g.height);
  const Tasks tasks(g.batch, g.channels, rows, F::kStep);
  std::vector<double> partial(kSums ? tasks.size() * F::kStep : 0);
  torch::stable::parallel_for(0, tasks.size(), Tasks::grain(g.height * g.width * F::kStep), [&](int64_t begin, int64_t end) {
    Acc<T>* memory = stencil::workspace<Acc<T>>(F::size(g.width) + F::run_size(g.width));
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks[index];
      F(memory, g, task).template run<kSums>(
          g, p, task, task.begin, task.end, std::min(rows, task.end + k / 2), memory + F::size(g.width),
          kSums ? &partial[index * F::kStep] : nullptr);
    }
  });
  return kSums ? tasks.by_plane(partial) : std::vector<double>();
}

struct Gradients {
  std::vector<double> weight, bias;
  double dec[16] = {}, rec[16] = {};  // correlations of bands and pixels, for haar::filter_gradients
};

// With y = bands of x, z = conv(y) and the output made of z: grad_z = bands of grad by the synthesis filters, grad_y = the
// transposed convolution of grad_z, and grad_x is made of grad_y by the analysis filters.
template <class T, bool kChannelsLast, int k>
void backward(const Problem<T>& g, const Parameters<Acc<T>>& p, bool need_params, Gradients& gradients) {
  using A = Acc<T>;
  using B = Blocks<T, kChannelsLast>;
  constexpr int64_t kStep = B::kGroup, kDepth = k == 3 ? 4 : 8;
  constexpr int kTaps = k * k + 1, kFilterSums = kBands * kTaps, kCount = kFilterSums + 32;
  const int64_t rows = block_rows(g.height), per_task = kFilterSums * kStep + 32;
  const Tasks tasks(g.batch, g.channels, rows, B::kGroup);
  const Padding<A> padding(B{g.height, g.width, 0, 0, 0}.vectors(), kStep, k);
  const int64_t stride = padding.stride();
  std::vector<double> partial(need_params ? tasks.size() * per_task : 0);

  torch::stable::parallel_for(0, tasks.size(), Tasks::grain(g.height * g.width * kStep), [&](int64_t begin, int64_t end) {
    A* memory = stencil::workspace<A>(padding.size(kBands * (2 * kDepth + 4) + 1)) + padding.margin;
    A* mixed = memory + kBands * 2 * kDepth * stride;
    A* grad_bands = mixed + kBands * 2 * stride;
    const A* zero = grad_bands + kBands * 2 * stride;
    const Bands<A, kDepth> y(memory, zero, stride, rows), grad_z(memory + kBands * kDepth * stride, zero, stride, rows);
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks[index];
      const B in{g.height, g.width, g.x_strides.h, g.x_strides.w, task.lanes};
      const Blocks<T, kChannelsLast, true> upstream{
          g.height, g.width, g.grad_strides.h, g.grad_strides.w, task.lanes,
          stencil::per_plane<kChannelsLast>(g.grad_sums, task, g.channels)};
      const B out{g.height, g.width, g.out_strides.h, g.out_strides.w, task.lanes};
      const T* x = start(g.x, g.x_strides, task);
      const T* grad = start(g.grad, g.grad_strides, task);
      T* grad_x = g.out ? start(g.out, g.out_strides, task) : nullptr;
      Vec<A> weight[kBands][k * k], flipped[kBands][k * k], bias[kBands];
      read_weights<kChannelsLast, k>(p, g.channels, task, weight, bias);
      for (int q = 0; q < kBands; ++q) std::reverse_copy(weight[q], weight[q] + k * k, flipped[q]);
      stencil::Sums<A, kCount> sums;
      int64_t next = std::max<int64_t>(0, task.begin - k / 2);
      stencil::by_pairs(task.begin, task.end, [&](auto count, int64_t i) {
        constexpr int kRows = count;
        for (; next < std::min(rows, i + kRows + k / 2); ++next) {
          if (need_params) analyse_row<true>(in, x, next, p.dec, y);
          analyse_row<false>(upstream, grad, next, p.rec, grad_z);
        }
        auto keep = [stride](A* to) {
          return [=](int64_t v, auto& value, auto) __attribute__((always_inline)) {
            for (int o = 0; o < kRows; ++o) simd::store(to + o * stride + v * B::n, value[o]);
          };
        };
        for (int q = 0; q < kBands; ++q) {
          const A* around[kRows + k - 1];
          if (need_params) {
            y.around(q, i - k / 2, around);
            const A* middle[kRows];
            grad_z.around(q, i, middle);
            stencil::correlate<true, k, kRows, kStep>(
                around, middle, sums.run + q * kTaps, in.vectors(), in.last_lanes(), weight[q], bias[q], keep(mixed + q * 2 * stride));
          }
          grad_z.around(q, i - k / 2, around);
          stencil::convolve<k, kRows, kStep>(
              around, flipped[q], Vec<A>{}, in.vectors(), in.vectors(), keep(grad_bands + q * 2 * stride));
        }
        for (int o = 0; o < kRows; ++o) {
          const A *z[kBands], *grad_y[kBands];
          for (int q = 0; q < kBands; ++q) {
            z[q] = mixed + (2 * q + o) * stride;
            grad_y[q] = grad_bands + (2 * q + o) * stride;
          }
          Vec<A>* dec_sums = sums.run + kFilterSums;
          if (need_params)
            synthesise_row<false, true, false>(upstream, upstream, i + o, z, p.rec, grad, static_cast<T*>(nullptr), dec_sums + 16);
          if (need_params && grad_x)
            synthesise_row<true, true, true>(in, out, i + o, grad_y, p.dec, x, grad_x, dec_sums);
          else if (need_params)
            synthesise_row<true, true, false>(in, in, i + o, grad_y, p.dec, x, static_cast<T*>(nullptr), dec_sums);
          else if (grad_x)
            synthesise_row<true, false, true>(out, out, i + o, grad_y, p.dec, x, grad_x, dec_sums);
        }
        if (need_params) sums.count(in.vectors() * kRows);
      });
      if (need_params) {
        sums.flush();
        double* to = &partial[index * per_task];
        for (int lane = 0; lane < task.lanes; ++lane)
          for (int t = 0; t < kFilterSums; ++t) *to++ = kChannelsLast ? sums.lane(t, lane) : sums.sum(t);
        to = &partial[index * per_task + kFilterSums * kStep];
        for (int t = 0; t < 32; ++t) to[t] = sums.sum(kFilterSums + t);
      }
    }
  });
  if (!need_params) return;
  for (int64_t index = 0; index < tasks.size(); ++index) {
    const Task task = tasks[index];
    const double* from = &partial[index * per_task];
    for (int lane = 0; lane < task.lanes; ++lane)
      for (int q = 0; q < kBands; ++q) {
        const int64_t channel = q * g.channels + task.channel + lane;
        for (int t = 0; t < k * k; ++t) gradients.weight[channel * k * k + t] += *from++;
        gradients.bias[channel] += *from++;
      }
    from = &partial[index * per_task + kFilterSums * kStep];
    for (int t = 0; t < 16; ++t) {
      gradients.dec[t] += from[t];
      gradients.rec[t] += from[16 + t];
    }
  }
}

template <class T>
Problem<T> describe(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), static_cast<const T*>(x.const_data_ptr()), tensor::strides_of(x)};
}

template <class A>
Parameters<A> read_parameters(
    const Tensor& weight, const Tensor& bias, const Tensor& dec_lo, const Tensor& dec_hi, const Tensor& rec_lo, const Tensor& rec_hi) {
  return {tensor::read<A>(weight), tensor::read<A>(bias), Filters<A>(dec_lo, dec_hi), Filters<A>(rec_lo, rec_hi)};
}

std::tuple<Tensor, Tensor> wavelet_mix(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& dec_lo, const Tensor& dec_hi, const Tensor& rec_lo,
    const Tensor& rec_hi, bool need_sums) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last);
  Tensor y = tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last);
  std::vector<double> sums;
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g = describe<T>(dense);
    g.out = static_cast<T*>(y.mutable_data_ptr());
    g.out_strides = tensor::strides_of(y);
    const auto p = read_parameters<Acc<T>>(weight, bias, dec_lo, dec_hi, rec_lo, rec_hi);
    sums = need_sums ? forward<T, layout, k, true>(g, p) : forward<T, layout, k, false>(g, p);
  });
  return {y, stencil::plane_sums(x, need_sums, sums)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wavelet_mix_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_sums, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& dec_lo, const Tensor& dec_hi, const Tensor& rec_lo, const Tensor& rec_hi, bool need_x, bool need_params) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last), upstream = tensor::with_format(grad, channels_last);
  Tensor grad_x =
      need_x ? tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last) : tensor::empty(x, {0});
  Gradients gradients{std::vector<double>(weight.numel()), std::vector<double>(bias.numel())};
  double dec[2][2], rec[2][2];
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g = describe<T>(dense);
    g.grad = static_cast<const T*>(upstream.const_data_ptr());
    g.grad_strides = tensor::strides_of(upstream);
    g.grad_sums = stencil::read_plane_sums<Acc<T>>(x, grad_sums);
    if (need_x) {
      g.out = static_cast<T*>(grad_x.mutable_data_ptr());
      g.out_strides = tensor::strides_of(grad_x);
    }
    const auto p = read_parameters<Acc<T>>(weight, bias, dec_lo, dec_hi, rec_lo, rec_hi);
    backward<T, layout, k>(g, p, need_params, gradients);
    haar::filter_gradients(p.dec, gradients.dec, dec[0], dec[1]);
    haar::filter_gradients(p.rec, gradients.rec, rec[0], rec[1]);
  });
  auto result = [&](const Tensor& like, const double* values) {
    return need_params ? tensor::write(like, values) : tensor::empty(like, {0});
  };
  return {grad_x, result(weight, gradients.weight.data()), result(bias, gradients.bias.data()), result(dec_lo, dec[0]),
          result(dec_hi, dec[1]), result(rec_lo, rec[0]), result(rec_hi, rec[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def(
      "wavelet_mix(Tensor x, Tensor weight, Tensor bias, Tensor dec_lo, Tensor dec_hi, Tensor rec_lo, Tensor rec_hi, bool need_sums)"
      " -> (Tensor, Tensor)");
  m.def(
      "wavelet_mix_backward(Tensor grad, Tensor? grad_sums, Tensor x, Tensor weight, Tensor bias, Tensor dec_lo, Tensor dec_hi,"
      " Tensor rec_lo, Tensor rec_hi, bool need_x, bool need_params)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("wavelet_mix", TORCH_BOX(&wavelet_mix));
  m.impl("wavelet_mix_backward", TORCH_BOX(&wavelet_mix_backward));
}
