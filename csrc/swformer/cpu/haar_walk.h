// The four Haar ops as one walk over 2 x 2 pixel blocks: a block's pixels (a, b) and its bands (p, q) are tied by
// band[p, q] = sum f[p][a] f[q][b] pixel[a, b] (analysis) or its transpose (synthesis), and every filter gradient is a
// contraction of the 16 sums correlation[p, q][a, b] = sum over blocks of band * pixel.
#pragma once

#include "haar.h"
#include "tasks.h"

namespace haar {

using simd::Acc;
using tensor::Strides;
using tensor::Tensor;

enum class Out { kNone, kBands, kPixels };
constexpr int64_t kBlocksPerTask = 8192;
constexpr int64_t kBlocksPerFlush = 512;  // float sums stay this short before they are added up in double

template <class A>
struct IsVector {
  static constexpr bool value = !std::is_arithmetic_v<A>;
};

template <class V, class T>
inline V load(const T* p) {
  if constexpr (IsVector<V>::value)
    return simd::load(p);
  else
    return static_cast<V>(*p);
}
template <class V, class T>
inline void store(T* p, V v) {
  if constexpr (IsVector<V>::value)
    simd::store(p, v);
  else
    *p = static_cast<T>(v);
}

// Neighbours along W: interleaved in memory, or `stride` apart where a vector runs over the channels.
template <bool kChannelsLast, class V, class T>
inline void load_pair(const T* p, int64_t stride, V& even, V& odd) {
  if constexpr (!kChannelsLast && IsVector<V>::value) {
    simd::load_alternating(p, even, odd);
  } else {
    even = load<V>(p);
    odd = load<V>(p + stride);
  }
}
template <bool kChannelsLast, class V, class T>
inline void store_pair(T* p, int64_t stride, V even, V odd) {
  if constexpr (!kChannelsLast && IsVector<V>::value) {
    simd::store_alternating(p, even, odd);
  } else {
    store(p, even);
    store(p + stride, odd);
  }
}

template <class T>
struct Walk {
  int64_t batch, channels, height, width;  // of the pixels
  const T* pixels = nullptr;
  Strides pixel_strides{};
  const T* bands = nullptr;
  Strides band_strides{};
  T* out = nullptr;
  Strides out_strides{};
};

// One function, and lambdas in it: what a line's blocks need stays in registers. kReplicate: the sample missing at an
// odd border is its neighbour (gradients fold onto it); else it is zero (and cropped).
template <class T, bool kChannelsLast, bool kReplicate, Out kOut, bool kCorrelate>
void walk(const Walk<T>& problem, const Filters<Acc<T>>& filters, double* correlation) {
  const Walk<T> g = problem;
  using A = Acc<T>;
  using V = simd::Vec<A>;
  constexpr int n = simd::kLanes<A>;
  constexpr bool kReadPixels = kCorrelate || kOut == Out::kBands;
  constexpr bool kReadBands = kCorrelate || kOut == Out::kPixels;
  const int64_t rows = (g.height + 1) / 2, cols = (g.width + 1) / 2, whole_cols = g.width / 2;
  const int64_t lines = g.batch * rows * (kChannelsLast ? 1 : g.channels);
  const int64_t line_blocks = cols * (kChannelsLast ? g.channels : 1);
  const int64_t lines_per_task = std::max<int64_t>(1, kBlocksPerTask / std::max<int64_t>(1, line_blocks));
  const int64_t count = (lines + lines_per_task - 1) / lines_per_task;
  const std::vector<T> zeros(std::max(kChannelsLast ? g.channels : g.width, int64_t{2}), static_cast<T>(0.0f));
  scratch::Frame frame;
  const tasks::Partial<> partial(frame, count, kCorrelate ? 16 : 0);

  tasks::parallel(count, 4, [&](int64_t begin, int64_t end) {
    const Filters<A> f = filters;  // a local copy that no store can alias stays in registers
    for (int64_t task = begin; task < end; ++task) {
      V vector_sums[16] = {};
      A scalar_sums[16] = {};
      double totals[16][n] = {};
      int64_t unflushed = 0;
      auto flush = [&] {
        for (int k = 0; k < 16; ++k) {
          for (int lane = 0; lane < n; ++lane) totals[k][lane] += vector_sums[k][lane];
          totals[k][0] += scalar_sums[k];
          vector_sums[k] = V{};
          scalar_sums[k] = 0;
        }
        unflushed = 0;
      };
      for (int64_t line = task * lines_per_task; line < std::min(lines, (task + 1) * lines_per_task); ++line) {
        const int64_t i = line % rows, c = kChannelsLast ? 0 : line / rows % g.channels;
        const int64_t b = line / rows / (kChannelsLast ? 1 : g.channels);
        const bool single_row = 2 * i + 1 == g.height;
        const T* row0 =
            g.pixels + (kReadPixels ? b * g.pixel_strides.b + c * g.pixel_strides.c + 2 * i * g.pixel_strides.h : 0);
        const T* row1 = !single_row ? row0 + g.pixel_strides.h : kReplicate ? row0 : zeros.data();
        const bool zero_row = single_row && !kReplicate;
        const T* band[4];
        T* band_out[4];
        for (int k = 0; k < 4; ++k) {
          const int64_t channel = k * g.channels + c;
          if (kReadBands) band[k] = g.bands + b * g.band_strides.b + channel * g.band_strides.c + i * g.band_strides.h;
          if (kOut == Out::kBands)
            band_out[k] = g.out + b * g.out_strides.b + channel * g.out_strides.c + i * g.out_strides.h;
        }
        T* out0 =
            g.out + (kOut == Out::kPixels ? b * g.out_strides.b + c * g.out_strides.c + 2 * i * g.out_strides.h : 0);
        T* out1 = out0 + g.out_strides.h;

        // One block, or one vector of blocks: at column j, channel k; `single` where the block has one pixel column.
        auto block = [&](auto& sums, int64_t j, int64_t k, bool single) __attribute__((always_inline)) {
          using B = std::remove_reference_t<decltype(sums[0])>;
          B x[4], y[4];
          if constexpr (kReadPixels) {
            const int64_t at = 2 * j * (kChannelsLast ? g.pixel_strides.w : 1) + k;
            const int64_t step = kChannelsLast ? g.pixel_strides.w : 1;
            const T* p0 = row0 + at;
            const T* p1 = zero_row ? zeros.data() + (kChannelsLast ? k : 2 * j) : row1 + at;
            if (single) {
              x[0] = load<B>(p0);
              x[2] = load<B>(p1);
              x[1] = kReplicate ? x[0] : B{};
              x[3] = kReplicate ? x[2] : B{};
            } else {
              load_pair<kChannelsLast>(p0, step, x[0], x[1]);
              load_pair<kChannelsLast>(p1, zero_row && kChannelsLast ? 0 : step, x[2], x[3]);
            }
          }
          if constexpr (kReadBands) {
            const int64_t at = j * (kChannelsLast ? g.band_strides.w : 1) + k;
            for (int q = 0; q < 4; ++q) y[q] = load<B>(band[q] + at);
          }
          if constexpr (kCorrelate) correlate(y, x, &sums[0]);
          if constexpr (kOut == Out::kBands) {
            B z[4];
            analyse(f, x, z);
            const int64_t at = j * (kChannelsLast ? g.out_strides.w : 1) + k;
            for (int q = 0; q < 4; ++q) store(band_out[q] + at, z[q]);
          }
          if constexpr (kOut == Out::kPixels) {
            B z[4];
            synthesise(f, y, z);
            if (kReplicate && single) z[0] += z[1], z[2] += z[3];
            if (kReplicate && single_row) z[0] += z[2], z[1] += z[3];
            const int64_t step = kChannelsLast ? g.out_strides.w : 1, at = 2 * j * step + k;
            if (single) {
              store(out0 + at, z[0]);
              if (!single_row) store(out1 + at, z[2]);
            } else {
              store_pair<kChannelsLast>(out0 + at, step, z[0], z[1]);
              if (!single_row) store_pair<kChannelsLast>(out1 + at, step, z[2], z[3]);
            }
          }
        };
        if constexpr (kChannelsLast) {
          for (int64_t j = 0; j < cols; ++j) {
            int64_t k = 0;
            for (; k + n <= g.channels; k += n) block(vector_sums, j, k, j >= whole_cols);
            for (; k < g.channels; ++k) block(scalar_sums, j, k, j >= whole_cols);
          }
        } else {
          int64_t j = 0;
          V sums[16];  // a local copy stays in registers
          if (kCorrelate) std::copy(vector_sums, vector_sums + 16, sums);
          for (; j + n <= whole_cols; j += n) block(sums, j, 0, false);
          if (kCorrelate) std::copy(sums, sums + 16, vector_sums);
          for (; j < whole_cols; ++j) block(scalar_sums, j, 0, false);
          if (j < cols) block(scalar_sums, j, 0, true);
        }
        if (kCorrelate && (unflushed += line_blocks) >= kBlocksPerFlush) flush();
      }
      if (kCorrelate) {
        flush();
        double* sums = partial.start(task);
        for (int k = 0; k < 16; ++k)
          for (int lane = 0; lane < n; ++lane) sums[k] += totals[k][lane];
      }
    }
  });
  if (kCorrelate) {
    std::fill(correlation, correlation + 16, 0.0);
    partial.add_to(correlation);
  }
}

template <bool kReplicate, Out kOut, bool kCorrelate, class T>
void walk_layout(bool channels_last, const Walk<T>& g, const Filters<Acc<T>>& f, double* correlation) {
  if (g.batch * g.channels == 0) {
    if (kCorrelate) std::fill(correlation, correlation + 16, 0.0);
    return;
  }
  if (channels_last)
    walk<T, true, kReplicate, kOut, kCorrelate>(g, f, correlation);
  else
    walk<T, false, kReplicate, kOut, kCorrelate>(g, f, correlation);
}

// The shared body of the backward ops; out is written where need_images, filter gradients where need_parameters.
template <bool kReplicate, Out kOut>
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& pixels, const Tensor& bands, const Tensor& like, const Tensor& low, const Tensor& high,
    bool channels_last, bool need_images, bool need_parameters) {
  Tensor out = need_images
                   ? tensor::empty(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, channels_last)
                   : tensor::empty(like, {0});
  double correlation[16], grad_low[2], grad_high[2];
  tensor::dispatch(like.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Filters<Acc<T>> f(low, high);
    Walk<T> g{pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)};
    g.pixels = static_cast<const T*>(pixels.const_data_ptr());
    g.pixel_strides = tensor::strides_of(pixels);
    g.bands = static_cast<const T*>(bands.const_data_ptr());
    g.band_strides = tensor::strides_of(bands);
    if (need_images) {
      g.out = static_cast<T*>(out.mutable_data_ptr());
      g.out_strides = tensor::strides_of(out);
    }
    if (need_images && need_parameters) walk_layout<kReplicate, kOut, true>(channels_last, g, f, correlation);
    if (need_images && !need_parameters) walk_layout<kReplicate, kOut, false>(channels_last, g, f, correlation);
    if (!need_images && need_parameters) walk_layout<kReplicate, Out::kNone, true>(channels_last, g, f, correlation);
    if (need_parameters) filter_gradients(f, correlation, grad_low, grad_high);
  });
  if (!need_parameters) return {out, tensor::empty(low, {0}), tensor::empty(high, {0})};
  return {out, tensor::write(low, grad_low), tensor::write(high, grad_high)};
}

}  // namespace haar
