// Haar transform, depthwise k x k convolution of the four bands and inverse transform in one pass over pairs of pixel rows, and
// their gradients, with nothing saved but the input. No band leaves the ring of rows.
#include "haar.h"
#include "stencil.h"

namespace {

using haar::Filters;
using simd::Acc;
using simd::Vec;
using stencil::Padding;
using stencil::Ring;
using stencil::Task;
using stencil::Tasks;
using tensor::Strides;
using tensor::Tensor;

constexpr int kBands = 4;

template <class T>
struct Problem {
  int64_t batch, channels, height, width;
  const T* x;
  Strides x_strides;
  const T* grad = nullptr;
  Strides grad_strides{};
  std::vector<Acc<T>> grad_sums{};  // (B, C), part of the gradient of every pixel
  T* out = nullptr;
  Strides out_strides{};

  int64_t rows() const { return (height + 1) / 2; }
};

template <class A>
struct Parameters {
  std::vector<A> weight, bias;
  Filters<A> dec, rec;
};

// The 2 x 2 pixel blocks of one channel (or one vector of channels), in vectors of blocks. kOffset: the pixels are `offset` more than
// what is stored.
template <class T, bool kChannelsLast, bool kOffset = false>
struct Blocks {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int n = simd::kLanes<A>;
  static constexpr int kGroup = kChannelsLast ? n : 1;
  int64_t height, width, row_stride, pixel;
  int lanes;
  V offset{};

  int64_t vectors() const { return kChannelsLast ? (width + 1) / 2 : (width + 2 * n - 1) / (2 * n); }
  int64_t whole() const { return kChannelsLast ? (lanes == n ? width / 2 : 0) : width / (2 * n); }
  // Blocks, or channels, in a vector that is not whole.
  int count(int64_t v) const { return kChannelsLast ? lanes : static_cast<int>((width + 1) / 2 - v * n); }
  int last_lanes() const { return kChannelsLast ? n : count(vectors() - 1); }
  // Whether the last column of blocks, in vector v, has one pixel column.
  bool single(int64_t v) const { return width % 2 && v == vectors() - 1; }
  int last_block() const { return static_cast<int>(width / 2 % n); }
  const T* row(const T* x, int64_t i) const { return x + i * row_stride; }

  int64_t at(int64_t half) const { return half * (kChannelsLast ? pixel : n); }
  // Pixels, or channels, of the image in a half that is not whole.
  int in_half(int64_t half) const {
    return kChannelsLast ? (half < width ? lanes : 0) : static_cast<int>(std::clamp<int64_t>(width - half * n, 0, n));
  }
  template <class B>
  V load_half(const T* p, int64_t half, B whole) const {
    const V stored = whole ? simd::load(p + at(half)) : simd::load_partial(p + at(half), in_half(half));
    if constexpr (!kOffset) return stored;
    return stored + (whole ? offset : stencil::first_lanes<A>(offset, in_half(half)));
  }
  template <class B>
  void store_half(T* p, int64_t half, V value, B whole) const {
    whole ? simd::store(p + at(half), value) : simd::store_partial(p + at(half), value, in_half(half));
  }

  // Pixels 00, 01, 10, 11. kReplicate: the sample missing at an odd border is its neighbour; else it is zero.
  template <bool kReplicate, class B>
  void load(const T* x, int64_t i, int64_t v, B whole, V (&pixels)[4]) const {
    load_pair<kReplicate>(row(x, 2 * i), v, whole, pixels[0], pixels[1]);
    if (2 * i + 1 < height)
      load_pair<kReplicate>(row(x, 2 * i + 1), v, whole, pixels[2], pixels[3]);
    else
      for (int a = 0; a < 2; ++a) pixels[2 + a] = kReplicate ? pixels[a] : V{};
  }
  template <bool kReplicate, class B>
  void load_pair(const T* p, int64_t v, B whole, V& even, V& odd) const {
    const V a = load_half(p, 2 * v, whole), b = load_half(p, 2 * v + 1, whole);
    if (kChannelsLast)
      even = a, odd = b;
    else
      simd::deinterleave(a, b, even, odd);
    if (kReplicate && !whole && single(v)) {
      if (kChannelsLast)
        odd = even;
      else
        odd[last_block()] = even[last_block()];
    }
  }
  // kFold: what falls on a replicated sample adds to its neighbour; else it is dropped.
  template <bool kFold, class B>
  void store(T* out, int64_t i, int64_t v, B whole, V (&pixels)[4]) const {
    const bool single_row = 2 * i + 1 == height;
    if (kFold && single_row)
      for (int a = 0; a < 2; ++a) pixels[a] += pixels[2 + a];
    store_pair<kFold>(out + 2 * i * row_stride, v, whole, pixels[0], pixels[1]);
    if (!single_row) store_pair<kFold>(out + (2 * i + 1) * row_stride, v, whole, pixels[2], pixels[3]);
  }
  template <bool kFold, class B>
  void store_pair(T* p, int64_t v, B whole, V even, V odd) const {
    if (kFold && !whole && single(v)) {
      if (kChannelsLast)
        even += odd;
      else
        even[last_block()] += odd[last_block()];
    }
    V a = even, b = odd;
    if (!kChannelsLast) simd::interleave(even, odd, a, b);
    store_half(p, 2 * v, a, whole);
    store_half(p, 2 * v + 1, b, whole);
  }
  // Of each block (or channel) the sum of those pixels that are in the image.
  template <class B>
  V sum(int64_t i, int64_t v, B whole, const V (&pixels)[4]) const {
    V even = pixels[0], odd = pixels[1];
    if (2 * i + 1 < height) even += pixels[2], odd += pixels[3];
    if (whole) return even + odd;
    if (kChannelsLast) return single(v) ? even : even + odd;
    return stencil::first_lanes<A>(even, count(v)) + stencil::first_lanes<A>(odd, static_cast<int>(width / 2 - v * n));
  }
};

// The rings of rows of the four bands.
template <class A, int64_t kDepth>
struct Bands {
  Ring<A, kDepth> ring[kBands];
  Bands(A* memory, const A* zero, int64_t stride, int64_t rows) {
    for (int q = 0; q < kBands; ++q) ring[q] = {memory + q * kDepth * stride, zero, stride, rows};
  }
  template <size_t kCount>
  void around(int q, int64_t first, const A* (&rows)[kCount]) const {
    for (size_t r = 0; r < kCount; ++r) rows[r] = ring[q].row(first + static_cast<int64_t>(r));
  }
};

template <bool kReplicate, class B, class T, class A, int64_t kDepth>
void analyse_row(const B& blocks, const T* x, int64_t i, const Filters<A>& filters, const Bands<A, kDepth>& bands) {
  const Filters<A> f = filters;  // a local copy that no store can alias stays in registers
  A* out[kBands];
  for (int q = 0; q < kBands; ++q) out[q] = bands.ring[q].slot(i);
  stencil::each_vector(blocks.whole(), blocks.vectors(), [&](int64_t v, auto whole) __attribute__((always_inline)) {
    Vec<A> pixels[4], y[kBands];
    blocks.template load<kReplicate>(x, i, v, whole, pixels);
    haar::analyse(f, pixels, y);
    for (int q = 0; q < kBands; ++q) simd::store(out[q] + v * B::n, y[q]);
  });
}

// Writes to `out` the pixels that `synthesis` makes of a row of bands and, with kSums, adds them to `total`.
template <bool kSums, class B, class T, class A>
void synthesise_row(const B& blocks, int64_t i, const A* const (&bands)[kBands], const Filters<A>& synthesis, T* out, Vec<A>& total) {
  const Filters<A> f = synthesis;
  Vec<A> run = total;
  stencil::each_vector(blocks.whole(), blocks.vectors(), [&](int64_t v, auto whole) __attribute__((always_inline)) {
    Vec<A> y[kBands], pixels[4];
    for (int q = 0; q < kBands; ++q) y[q] = simd::load(bands[q] + v * B::n);
    haar::synthesise(f, y, pixels);
    blocks.template store<false>(out, i, v, whole, pixels);
    if (kSums) run += blocks.sum(i, v, whole, pixels);
  });
  total = run;
}

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

template <class P>
inline P* start(P* data, const Strides& strides, const Task& task) {
  return data + task.image * strides.b + task.channel * strides.c;
}

// The weights of the task's channels in the four bands, and their biases.
template <bool kChannelsLast, int k, class A>
void read_weights(const Parameters<A>& p, int64_t channels, const Task& task, Vec<A> (&weight)[kBands][k * k], Vec<A> (&bias)[kBands]) {
  for (int q = 0; q < kBands; ++q) {
    Task band = task;
    band.channel += q * channels;
    for (int t = 0; t < k * k; ++t) weight[q][t] = stencil::per_channel<kChannelsLast>(p.weight, band, k * k, t);
    bias[q] = stencil::per_channel<kChannelsLast>(p.bias, band, 1, 0);
  }
}

// Returns, with kSums, the sums of the output over the pixels, (B, C).
template <class T, bool kChannelsLast, int k, bool kSums>
std::vector<double> forward(const Problem<T>& g, const Parameters<Acc<T>>& p) {
  using A = Acc<T>;
  using B = Blocks<T, kChannelsLast>;
  constexpr int64_t kStep = B::kGroup, kDepth = k == 3 ? 4 : 8;
  const int64_t rows = g.rows();
  const Tasks tasks(g.batch, g.channels, rows, B::kGroup);
  const Padding<A> padding(B{g.height, g.width, 0, 0, 0}.vectors(), kStep, k);
  const int64_t stride = padding.stride();
  std::vector<double> partial(kSums ? tasks.size() * kStep : 0);

  torch::stable::parallel_for(0, tasks.size(), Tasks::grain(g.height * g.width * kStep), [&](int64_t begin, int64_t end) {
    A* memory = stencil::workspace<A>(padding.size(kBands * (kDepth + 2) + 1)) + padding.margin;
    A* mixed = memory + kBands * kDepth * stride;
    const Bands<A, kDepth> bands(memory, mixed + kBands * 2 * stride, stride, rows);
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks[index];
      const B in{g.height, g.width, g.x_strides.h, g.x_strides.w, task.lanes};
      const B out{g.height, g.width, g.out_strides.h, g.out_strides.w, task.lanes};
      const T* x = start(g.x, g.x_strides, task);
      T* y = start(g.out, g.out_strides, task);
      Vec<A> weight[kBands][k * k], bias[kBands];
      read_weights<kChannelsLast, k>(p, g.channels, task, weight, bias);
      stencil::Sums<A, 1> sums;
      int64_t next = std::max<int64_t>(0, task.begin - k / 2);
      stencil::by_pairs(task.begin, task.end, [&](auto count, int64_t i) {
        constexpr int kRows = count;
        for (; next < std::min(rows, i + kRows + k / 2); ++next) analyse_row<true>(in, x, next, p.dec, bands);
        for (int q = 0; q < kBands; ++q) {
          const A* around[kRows + k - 1];
          bands.around(q, i - k / 2, around);
          A* z = mixed + q * 2 * stride;
          stencil::convolve<k, kRows, kStep>(
              around, weight[q], bias[q], out.vectors(), out.vectors(),
              [&](int64_t v, auto& value, auto) __attribute__((always_inline)) {
                for (int o = 0; o < kRows; ++o) simd::store(z + o * stride + v * B::n, value[o]);
              });
        }
        for (int o = 0; o < kRows; ++o) {
          const A* z[kBands];
          for (int q = 0; q < kBands; ++q) z[q] = mixed + (2 * q + o) * stride;
          synthesise_row<kSums>(out, i + o, z, p.rec, y, sums.run[0]);
        }
        if (kSums) sums.count(out.vectors() * kRows);
      });
      if (!kSums) continue;
      sums.flush();
      for (int lane = 0; lane < task.lanes; ++lane) partial[index * kStep + lane] = kChannelsLast ? sums.lane(0, lane) : sums.sum(0);
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
  const int64_t rows = g.rows(), per_task = kFilterSums * kStep + 32;
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
