// Haar transform, depthwise k x k convolution of the four bands and inverse transform: the forward pass over the pairs
// of rows of one channel (or one vector of channels).
#pragma once

#include "accumulate.h"
#include "haar.h"
#include "stencil.h"

namespace wavelet {

using haar::block_rows;
using haar::Filters;
using haar::kBands;
using simd::Acc;
using simd::Vec;
using stencil::Padding;
using stencil::Problem;
using stencil::Task;

template <class A>
struct Parameters {
  std::vector<A> weight, bias;
  Filters<A> dec, rec;
};

// The 2 x 2 pixel blocks of one channel (or one vector of channels), in vectors of blocks. kOffset: the pixels are
// `offset` more than what is stored.
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
  int64_t full() const { return kChannelsLast ? (lanes == n ? width / 2 : 0) : width / (2 * n); }
  // Blocks, or channels, in a vector that is not full.
  int count(int64_t v) const { return kChannelsLast ? lanes : static_cast<int>((width + 1) / 2 - v * n); }
  int last_lanes() const { return kChannelsLast ? n : count(vectors() - 1); }
  // Whether the last column of blocks, in vector v, has one pixel column.
  bool single(int64_t v) const { return width % 2 && v == vectors() - 1; }
  int last_block() const { return static_cast<int>(width / 2 % n); }
  const T* row(const T* x, int64_t i) const { return x + i * row_stride; }

  int64_t at(int64_t half) const { return half * (kChannelsLast ? pixel : n); }
  // Pixels, or channels, of the image in a half that is not full.
  int in_half(int64_t half) const {
    return kChannelsLast ? (half < width ? lanes : 0) : static_cast<int>(std::clamp<int64_t>(width - half * n, 0, n));
  }
  template <class B>
  V load_half(const T* p, int64_t half, B full) const {
    const V stored = full ? simd::load(p + at(half)) : simd::load_partial(p + at(half), in_half(half));
    if constexpr (!kOffset) return stored;
    return stored + (full ? offset : stencil::first_lanes<A>(offset, in_half(half)));
  }
  template <class B>
  void store_half(T* p, int64_t half, V value, B full) const {
    full ? simd::store(p + at(half), value) : simd::store_partial(p + at(half), value, in_half(half));
  }

  // Pixels 00, 01, 10, 11. kReplicate: the sample missing at an odd border is its neighbour; else it is zero.
  template <bool kReplicate, class B>
  void load(const T* x, int64_t i, int64_t v, B full, V (&pixels)[4]) const {
    load_pair<kReplicate>(row(x, 2 * i), v, full, pixels[0], pixels[1]);
    if (2 * i + 1 < height)
      load_pair<kReplicate>(row(x, 2 * i + 1), v, full, pixels[2], pixels[3]);
    else
      for (int a = 0; a < 2; ++a) pixels[2 + a] = kReplicate ? pixels[a] : V{};
  }
  template <bool kReplicate, class B>
  void load_pair(const T* p, int64_t v, B full, V& even, V& odd) const {
    if (!kChannelsLast && full) {
      simd::load_alternating(p + at(2 * v), even, odd);
      if constexpr (kOffset) even += offset, odd += offset;
      return;
    }
    const V a = load_half(p, 2 * v, full), b = load_half(p, 2 * v + 1, full);
    if (kChannelsLast)
      even = a, odd = b;
    else
      simd::deinterleave(a, b, even, odd);
    if (kReplicate && !full && single(v)) {
      if (kChannelsLast)
        odd = even;
      else
        odd[last_block()] = even[last_block()];
    }
  }
  // kFold: what falls on a replicated sample adds to its neighbour; else it is dropped.
  template <bool kFold, class B>
  void store(T* out, int64_t i, int64_t v, B full, V (&pixels)[4]) const {
    const bool single_row = 2 * i + 1 == height;
    if (kFold && single_row)
      for (int a = 0; a < 2; ++a) pixels[a] += pixels[2 + a];
    store_pair<kFold>(out + 2 * i * row_stride, v, full, pixels[0], pixels[1]);
    if (!single_row) store_pair<kFold>(out + (2 * i + 1) * row_stride, v, full, pixels[2], pixels[3]);
  }
  template <bool kFold, class B>
  void store_pair(T* p, int64_t v, B full, V even, V odd) const {
    if (kFold && !full && single(v)) {
      if (kChannelsLast)
        even += odd;
      else
        even[last_block()] += odd[last_block()];
    }
    if (!kChannelsLast && full) return simd::store_alternating(p + at(2 * v), even, odd);
    V a = even, b = odd;
    if (!kChannelsLast) simd::interleave(even, odd, a, b);
    store_half(p, 2 * v, a, full);
    store_half(p, 2 * v + 1, b, full);
  }
  // Of each block (or channel) the sum of those pixels that are in the image.
  template <class B>
  V sum(int64_t i, int64_t v, B full, const V (&pixels)[4]) const {
    V even = pixels[0], odd = pixels[1];
    if (2 * i + 1 < height) even += pixels[2], odd += pixels[3];
    if (full) return even + odd;
    if (kChannelsLast) return single(v) ? even : even + odd;
    return stencil::first_lanes<A>(even, count(v)) + stencil::first_lanes<A>(odd, static_cast<int>(width / 2 - v * n));
  }
};

// The rings of rows of the four bands.
template <class A, int k>
struct Bands {
  using Rows = stencil::WindowRing<A, k>;
  static constexpr int64_t kSlots = kBands * Rows::kDepth;
  Rows ring[kBands];
  Bands(A* memory, const A* zero, int64_t stride, int64_t rows) {
    for (int q = 0; q < kBands; ++q) ring[q] = {memory + q * Rows::kDepth * stride, zero, stride, rows};
  }
};

template <bool kReplicate, class B, class T, class A, int k>
void analyse_row(const B& blocks, const T* x, int64_t i, const Filters<A>& filters, const Bands<A, k>& bands) {
  const Filters<A> f = filters;  // a local copy that no store can alias stays in registers
  A* out[kBands];
  for (int q = 0; q < kBands; ++q) out[q] = bands.ring[q].slot(i);
  stencil::each_vector(blocks.full(), blocks.vectors(), [&](int64_t v, auto full) __attribute__((always_inline)) {
    Vec<A> pixels[4], y[kBands];
    blocks.template load<kReplicate>(x, i, v, full, pixels);
    haar::analyse(f, pixels, y);
    for (int q = 0; q < kBands; ++q) simd::store(out[q] + v * B::n, y[q]);
  });
}

// Writes to `out` the pixels that `synthesis` makes of a row of bands and, with kSums, adds them to `total`.
template <bool kSums, class B, class T, class A>
void synthesise_row(
    const B& blocks, int64_t i, const A* const (&bands)[kBands], const Filters<A>& synthesis, T* out, Vec<A>& total) {
  const Filters<A> f = synthesis;
  Vec<A> run = total;
  stencil::each_vector(blocks.full(), blocks.vectors(), [&](int64_t v, auto full) __attribute__((always_inline)) {
    Vec<A> y[kBands], pixels[4];
    for (int q = 0; q < kBands; ++q) y[q] = simd::load(bands[q] + v * B::n);
    haar::synthesise(f, y, pixels);
    blocks.template store<false>(out, i, v, full, pixels);
    if (kSums) run += blocks.sum(i, v, full, pixels);
  });
  total = run;
}

// The weights of the task's channels in the four bands, and their biases.
template <bool kChannelsLast, int k, class A>
void read_weights(
    const Parameters<A>& p, int64_t channels, const Task& task, Vec<A> (&weight)[kBands][k * k],
    Vec<A> (&bias)[kBands]) {
  for (int q = 0; q < kBands; ++q) {
    Task band = task;
    band.channel += q * channels;
    for (int t = 0; t < k * k; ++t) weight[q][t] = stencil::per_channel<kChannelsLast>(p.weight, band, k * k, t);
    bias[q] = stencil::per_channel<kChannelsLast>(p.bias, band, 1, 0);
  }
}

// A task's rings of rows of bands. Its output may come in several runs, each of the rows of blocks that follow the last
// run's.
template <class T, bool kChannelsLast, int k, class X = T>
class Forward {
 public:
  using A = Acc<T>;
  using B = Blocks<T, kChannelsLast>;
  using Images = Problem<T, X>;
  using Rings = Bands<A, k>;
  static constexpr int64_t kStep = B::kGroup;

  static Padding<A> padding(int64_t width) { return Padding<A>(B{0, width, 0, 0, 0}.vectors(), kStep, k); }
  // Elements of the memory of the rings, which must hold zeros, and of that of a run.
  static int64_t size(int64_t width) { return padding(width).size(Rings::kSlots + 1); }
  static int64_t run_size(int64_t width) { return kBands * 2 * padding(width).stride(); }

  Forward(A* memory, const Images& g, const Task& task)
      : Forward(memory + padding(g.width).margin, padding(g.width).stride(), g, task) {}

  // Output rows [begin, end) of blocks, from those of x up to `available`. With kSums, adds their sums to those of the
  // task's channels.
  template <bool kSums>
  void run(
      const Images& g, const Parameters<A>& p, const Task& task, int64_t begin, int64_t end, int64_t available,
      A* mixed, double* totals) {
    const Blocks<X, kChannelsLast> in{g.height, g.width, g.x_strides.h, g.x_strides.w, task.lanes};
    const B out{g.height, g.width, g.out_strides.h, g.out_strides.w, task.lanes};
    const X* x = stencil::start(g.x, g.x_strides, task);
    T* y = stencil::start(g.out, g.out_strides, task);
    const int64_t stride = padding(g.width).stride();
    const Rings bands = bands_;  // a local copy that no store can alias stays in registers
    int64_t loaded = loaded_;
    Vec<A> weight[kBands][k * k], bias[kBands];
    read_weights<kChannelsLast, k>(p, g.channels, task, weight, bias);
    accumulate::Sums<A, 1> sums;
    auto load_to = [&](int64_t row) {
      for (; loaded < std::min(available, row); ++loaded) analyse_row<true>(in, x, loaded, p.dec, bands);
    };
    stencil::by_pairs(begin, end, [&](auto count, int64_t i) {
      constexpr int kRows = count;
      load_to(i + kRows + k / 2);
      for (int q = 0; q < kBands; ++q) {
        const A* around[kRows + k - 1];
        bands.ring[q].rows_from(i - k / 2, around);
        stencil::convolve<k, kRows, kStep>(
            around, weight[q], bias[q], out.vectors(), out.vectors(), stencil::Keep<A>{mixed + q * 2 * stride, stride});
      }
      for (int o = 0; o < kRows; ++o) {
        const A* z[kBands];
        for (int q = 0; q < kBands; ++q) z[q] = mixed + (2 * q + o) * stride;
        synthesise_row<kSums>(out, i + o, z, p.rec, y, sums.run[0]);
      }
      if (kSums) sums.count(out.vectors() * kRows);
    });
    load_to(available);
    loaded_ = loaded;
    if (!kSums) return;
    sums.flush();
    for (int lane = 0; lane < task.lanes; ++lane) totals[lane] += kChannelsLast ? sums.lane(0, lane) : sums.sum(0);
  }

 private:
  Forward(A* rows, int64_t stride, const Images& g, const Task& task)
      : bands_(rows, rows + Rings::kSlots * stride, stride, block_rows(g.height)),
        loaded_(std::max<int64_t>(0, task.begin - k / 2)) {}

  Rings bands_;
  int64_t loaded_;
};

}  // namespace wavelet
