// Haar transform, depthwise k x k convolution of the four bands and inverse transform in one pass over pairs of pixel
// rows, and their gradients, with nothing saved but the input. No band leaves the ring of rows.
#include "wavelet_mix.h"
#include "tasks.h"

namespace {

using haar::Filters;
using scratch::Frame;
using simd::Acc;
using simd::Vec;
using stencil::Padding;
using stencil::Problem;
using stencil::start;
using stencil::Task;
using stencil::Tasks;
using tensor::Tensor;
using namespace wavelet;

// sums[4 * band + pixel] += band * pixel over a row of blocks; writes to `out`, where it is given, the pixels that
// `synthesis` makes of the bands. Only lanes of the image count in the sums.
template <bool kReplicate, bool kSum, bool kStore, class B, class T, class A>
void synthesise_row(
    const B& blocks, const B& out_blocks, int64_t i, const A* const (&bands)[kBands], const Filters<A>& synthesis,
    const T* x, T* out, Vec<A>* sums) {
  const Filters<A> f = synthesis;
  Vec<A> total[16];
  if (kSum) {
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) total[t] = sums[t];  // unrolled, not std::copy, so that they stay in registers
  }
  stencil::each_vector(blocks.full(), blocks.vectors(), [&](int64_t v, auto full) __attribute__((always_inline)) {
    Vec<A> y[kBands], pixels[4];
    for (int q = 0; q < kBands; ++q) y[q] = simd::load(bands[q] + v * B::n);
    if (kSum) {
      blocks.template load<kReplicate>(x, i, v, full, pixels);
      Vec<A> bands_of_image[kBands];
      for (int q = 0; q < kBands; ++q) bands_of_image[q] = full ? y[q] : stencil::first_lanes<A>(y[q], blocks.count(v));
      haar::correlate(bands_of_image, pixels, total);
    }
    if (kStore) {
      haar::synthesise(f, y, pixels);
      out_blocks.template store<kReplicate>(out, i, v, full, pixels);
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
  const Tasks cut(g.batch, g.channels, rows, F::kStep);
  Frame frame;
  const tasks::Partial<> partial(frame, cut.size(), kSums ? F::kStep : 0);
  tasks::parallel(cut.size(), tasks::grain(g.height * g.width * F::kStep), [&](int64_t begin, int64_t end) {
    Frame frame;
    Acc<T>* memory = frame.zeros<Acc<T>>(F::size(g.width));
    Acc<T>* mixed = frame.zeros<Acc<T>>(F::run_size(g.width));
    for (int64_t index = begin; index < end; ++index) {
      const Task task = cut[index];
      F(memory, g, task)
          .template run<kSums>(
              g, p, task, task.begin, task.end, std::min(rows, task.end + k / 2), mixed, partial.start(index));
    }
  });
  return cut.by_plane(partial);
}

struct Gradients {
  std::vector<double> weight, bias;
  double dec[16] = {}, rec[16] = {};  // correlations of bands and pixels, for haar::filter_gradients
};

// One task of the backward pass. With y = bands of x, z = conv(y) and the output made of z: grad_z = bands of grad by
// the synthesis filters, grad_y = the transposed convolution of grad_z, and grad_x is made of grad_y by the analysis
// filters.
template <class T, bool kChannelsLast, int k>
class Backward {
 public:
  using A = Acc<T>;
  using B = Blocks<T, kChannelsLast>;
  using Upstream = Blocks<T, kChannelsLast, true>;
  using Rings = Bands<A, k>;
  static constexpr int kStep = B::kGroup, kTaps = k * k + 1, kTapSums = kBands * kTaps;
  static constexpr int kSums = kTapSums * kStep + 32;  // numbers that `run` writes

  static Padding<A> padding(int64_t width) { return Padding<A>(B{0, width, 0, 0, 0}.vectors(), kStep, k); }
  // Elements of the memory, which must hold zeros: rings, rows between them, a row of zeros.
  static int64_t size(int64_t width) { return padding(width).size(2 * Rings::kSlots + 4 * kBands + 1); }

  Backward(A* memory, const Problem<T>& g, const Parameters<A>& p, const Task& task)
      : p_(p), task_(task), in_{g.height, g.width, g.x_strides.h, g.x_strides.w, task.lanes},
        out_{g.height, g.width, g.out_strides.h, g.out_strides.w, task.lanes},
        upstream_{g.height,         g.width,    g.grad_strides.h,
                  g.grad_strides.w, task.lanes, stencil::per_plane<kChannelsLast>(g.grad_sums, task, g.channels)},
        x_(start(g.x, g.x_strides, task)), grad_(start(g.grad, g.grad_strides, task)),
        grad_x_(start(g.out, g.out_strides, task)), stride_(padding(g.width).stride()), rows_(block_rows(g.height)),
        mixed_(memory + padding(g.width).margin + 2 * Rings::kSlots * stride_),
        grad_bands_(mixed_ + 2 * kBands * stride_), y_(memory + padding(g.width).margin, zero(), stride_, rows_),
        grad_z_(memory + padding(g.width).margin + Rings::kSlots * stride_, zero(), stride_, rows_) {
    read_weights<kChannelsLast, k>(p, g.channels, task, weight_, bias_);
    for (int q = 0; q < kBands; ++q) std::reverse_copy(weight_[q], weight_[q] + k * k, flipped_[q]);
  }

  // Writes the sums to `totals`, where it is given: for each of the task's channels the taps and the bias of each band,
  // then, at the end, the correlations for the analysis and the synthesis filters.
  void run(double* totals) {
    accumulate::Sums<A, kTapSums + 32> sums;
    int64_t next = std::max<int64_t>(0, task_.begin - k / 2);
    stencil::by_pairs(task_.begin, task_.end, [&](auto count, int64_t i) {
      constexpr int kRows = count;
      for (; next < std::min(rows_, i + kRows + k / 2); ++next) {
        if (totals) analyse_row<true>(in_, x_, next, p_.dec, y_);
        analyse_row<false>(upstream_, grad_, next, p_.rec, grad_z_);
      }
      convolve<kRows>(i, totals ? sums.run : nullptr);
      for (int o = 0; o < kRows; ++o) synthesise(i + o, o, totals ? sums.run + kTapSums : nullptr);
      if (totals) sums.count(in_.vectors() * kRows);
    });
    if (!totals) return;
    sums.flush();
    for (int t = 0; t < 32; ++t) totals[kTapSums * kStep + t] = sums.sum(kTapSums + t);
    for (int lane = 0; lane < task_.lanes; ++lane)
      for (int t = 0; t < kTapSums; ++t) *totals++ = kChannelsLast ? sums.lane(t, lane) : sums.sum(t);
  }

 private:
  const A* zero() const { return grad_bands_ + 2 * kBands * stride_; }

  // Rows of blocks i, ... of grad_y, and with `sums` of z.
  template <int kRows>
  void convolve(int64_t i, Vec<A>* sums) const {
    for (int q = 0; q < kBands; ++q) {
      const A *around[kRows + k - 1], *middle[kRows];
      if (sums) {
        y_.ring[q].rows_from(i - k / 2, around);
        grad_z_.ring[q].rows_from(i, middle);
        stencil::correlate<true, k, kRows, kStep>(
            around, middle, sums + q * kTaps, in_.vectors(), in_.last_lanes(), weight_[q], bias_[q],
            stencil::Keep<A>{mixed_ + q * 2 * stride_, stride_});
      }
      grad_z_.ring[q].rows_from(i - k / 2, around);
      stencil::convolve<k, kRows, kStep>(
          around, flipped_[q], Vec<A>{}, in_.vectors(), in_.vectors(),
          stencil::Keep<A>{grad_bands_ + q * 2 * stride_, stride_});
    }
  }

  // From row o of those, row i of the blocks of grad_x, and with `sums` the correlations.
  void synthesise(int64_t i, int o, Vec<A>* sums) const {
    const A *z[kBands], *grad_y[kBands];
    for (int q = 0; q < kBands; ++q) {
      z[q] = mixed_ + (2 * q + o) * stride_;
      grad_y[q] = grad_bands_ + (2 * q + o) * stride_;
    }
    T* const nothing = nullptr;
    if (sums) synthesise_row<false, true, false>(upstream_, upstream_, i, z, p_.rec, grad_, nothing, sums + 16);
    if (sums && grad_x_)
      synthesise_row<true, true, true>(in_, out_, i, grad_y, p_.dec, x_, grad_x_, sums);
    else if (sums)
      synthesise_row<true, true, false>(in_, in_, i, grad_y, p_.dec, x_, nothing, sums);
    else if (grad_x_)
      synthesise_row<true, false, true>(out_, out_, i, grad_y, p_.dec, x_, grad_x_, sums);
  }

  const Parameters<A>& p_;
  const Task task_;
  const B in_, out_;
  const Upstream upstream_;
  const T *const x_, *const grad_;
  T* const grad_x_;
  const int64_t stride_, rows_;
  A *const mixed_, *const grad_bands_;  // two rows of each band
  const Rings y_, grad_z_;
  Vec<A> weight_[kBands][k * k], flipped_[kBands][k * k], bias_[kBands];
};

template <class T, bool kChannelsLast, int k>
void backward(const Problem<T>& g, const Parameters<Acc<T>>& p, bool need_parameters, Gradients& gradients) {
  using B = Backward<T, kChannelsLast, k>;
  const Tasks cut(g.batch, g.channels, block_rows(g.height), B::kStep);
  Frame frame;
  const tasks::Partial<> partial(frame, cut.size(), need_parameters ? B::kSums : 0);
  tasks::parallel(cut.size(), tasks::grain(g.height * g.width * B::kStep), [&](int64_t begin, int64_t end) {
    Frame frame;
    Acc<T>* memory = frame.zeros<Acc<T>>(B::size(g.width));
    for (int64_t index = begin; index < end; ++index) B(memory, g, p, cut[index]).run(partial.start(index));
  });
  partial.each([&](int64_t index, const double* sums) {
    const Task task = cut[index];
    const double* correlations = sums + B::kTapSums * B::kStep;
    for (int lane = 0; lane < task.lanes; ++lane)
      for (int q = 0; q < kBands; ++q) {
        const int64_t channel = q * g.channels + task.channel + lane;
        for (int t = 0; t < k * k; ++t) gradients.weight[channel * k * k + t] += *sums++;
        gradients.bias[channel] += *sums++;
      }
    for (int t = 0; t < 16; ++t) {
      gradients.dec[t] += correlations[t];
      gradients.rec[t] += correlations[16 + t];
    }
  });
}

template <class T>
Problem<T> describe(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), static_cast<const T*>(x.const_data_ptr()), tensor::strides_of(x)};
}

template <class A>
Parameters<A> read_parameters(
    const Tensor& weight, const Tensor& bias, const Tensor& dec_lo, const Tensor& dec_hi, const Tensor& rec_lo,
    const Tensor& rec_hi) {
  return {tensor::read<A>(weight), tensor::read<A>(bias), Filters<A>(dec_lo, dec_hi), Filters<A>(rec_lo, rec_hi)};
}

std::tuple<Tensor, Tensor> wavelet_mix(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& dec_lo, const Tensor& dec_hi,
    const Tensor& rec_lo, const Tensor& rec_hi, bool need_sums) {
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
    const Tensor& grad, const std::optional<Tensor>& grad_sums, const Tensor& x, const Tensor& weight,
    const Tensor& bias, const Tensor& dec_lo, const Tensor& dec_hi, const Tensor& rec_lo, const Tensor& rec_hi,
    bool need_images, bool need_parameters) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last), upstream = tensor::with_format(grad, channels_last);
  Tensor grad_x = need_images ? tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last)
                              : tensor::empty(x, {0});
  Gradients gradients{std::vector<double>(weight.numel()), std::vector<double>(bias.numel())};
  double dec[2][2], rec[2][2];
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g = describe<T>(dense);
    g.grad = static_cast<const T*>(upstream.const_data_ptr());
    g.grad_strides = tensor::strides_of(upstream);
    g.grad_sums = stencil::read_plane_sums<Acc<T>>(x, grad_sums);
    if (need_images) {
      g.out = static_cast<T*>(grad_x.mutable_data_ptr());
      g.out_strides = tensor::strides_of(grad_x);
    }
    const auto p = read_parameters<Acc<T>>(weight, bias, dec_lo, dec_hi, rec_lo, rec_hi);
    backward<T, layout, k>(g, p, need_parameters, gradients);
    haar::filter_gradients(p.dec, gradients.dec, dec[0], dec[1]);
    haar::filter_gradients(p.rec, gradients.rec, rec[0], rec[1]);
  });
  auto result = [&](const Tensor& like, const double* values) {
    return need_parameters ? tensor::write(like, values) : tensor::empty(like, {0});
  };
  return {
      grad_x,
      result(weight, gradients.weight.data()),
      result(bias, gradients.bias.data()),
      result(dec_lo, dec[0]),
      result(dec_hi, dec[1]),
      result(rec_lo, rec[0]),
      result(rec_hi, rec[1])};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def(
      "wavelet_mix(Tensor x, Tensor weight, Tensor bias, Tensor dec_lo, Tensor dec_hi, Tensor rec_lo, Tensor rec_hi, "
      "bool need_sums)"
      " -> (Tensor, Tensor)");
  m.def(
      "wavelet_mix_backward(Tensor grad, Tensor? grad_sums, Tensor x, Tensor weight, Tensor bias, Tensor dec_lo, "
      "Tensor dec_hi,"
      " Tensor rec_lo, Tensor rec_hi, bool need_images, bool need_parameters)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("wavelet_mix", TORCH_BOX(&wavelet_mix));
  m.impl("wavelet_mix_backward", TORCH_BOX(&wavelet_mix_backward));
}
