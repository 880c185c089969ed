// What the backward pass sums: over pixels, for the parameters, and over strips, for the low-resolution maps.
#pragma once

#include "accumulate.h"
#include "rows.h"

namespace multiscale_ffn {

// Where the sums of each parameter's gradient lie in the floats of one task; the first pass has those before `second`.
struct SumPlaces {
  int64_t in_weight[kScales], in_bias[kScales], dw[kScales], out_weight, out_bias, second, size;
  int64_t in_pitch, out_pitch;  // of the weights' rows, whole vectors

  explicit SumPlaces(const Net& net)
      : in_pitch(gemm::round_up(net.in, kLanes)), out_pitch(gemm::round_up(kScales * net.mid, kLanes)) {
    int64_t at = 0;
    auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    out_weight = take(net.out * out_pitch);
    out_bias = take(net.out);
    for (int s = 0; s < kScales; ++s) {
      in_weight[s] = take(net.mid * in_pitch);
      in_bias[s] = take(net.mid);
      dw[s] = take(net.mid * (kTaps + 1));
      if (s == 0) second = at;
    }
    size = at;
  }
};

// A row of pixels [pixel][channel], or of pairs of neighbouring pixels, for products that sum over the pixels.
template <class M>
struct PixelMajor {
  static constexpr bool kPairs = std::is_same_v<M, simd::Pair>;
  static constexpr int64_t kRows = kPairs ? kBlock / 2 : kBlock;  // of a block
  int64_t channels, pitch;
  M* data;

  PixelMajor(Frame& frame, int64_t channels_, const Grid& grid)
      : channels(channels_), pitch(gemm::round_up(channels_, kLanes) + kLanes),  // no power of two
        data(frame.take<M>(grid.blocks * kRows * pitch)) {}

  // `block`, of rows of floats or as products take them, is read up to a whole vector of channels.
  template <class B>
  void set(int64_t b, const B* block) const {
    gemm::transpose(channels, kBlock, block, kBlock, data + b * kRows * pitch, pitch);
  }
};

// sum[i][j] += a[p][i] b[p][j] over the pixels p of a row.
template <class M>
inline void add_product(const PixelMajor<M>& a, const PixelMajor<M>& b, int64_t pixels, float* sum, int64_t pitch) {
  gemm::multiply(
      a.channels, b.channels, gemm::depth<M>(pixels), a.data, gemm::kRows, a.pitch, b.data, b.pitch,
      gemm::into<true>(sum, pitch, a.channels));
}

// Sums of a task, in vectors for runs of `longest` and in double beyond.
struct VectorSums {
  int64_t count, longest, terms = 0;
  VecF* sums;
  double* totals;

  VectorSums(Frame& frame, int64_t count, int64_t longest = 128)
      : count(count), longest(longest), sums(frame.zeros<VecF>(count)), totals(frame.zeros<double>(count)) {}
  // So many vectors were added to each sum.
  void added(int64_t vectors) {
    if ((terms += vectors) >= longest) flush();
  }
  void finish(float* out) {
    flush();
    for (int64_t i = 0; i < count; ++i) out[i] += static_cast<float>(totals[i]);
  }

 private:
  void flush() {
    for (int64_t i = 0; i < count; ++i) accumulate::flush(sums[i], totals[i]);
    terms = 0;
  }
};

template <class M = float>
inline M* take_block(Frame& frame, int64_t channels) {
  return frame.take<M>(gemm::round_up(channels, kLanes) * kBlock);
}

// From the gradient after the depthwise convolution of one scale to those of its taps, of the first 1x1 convolution and
// of its input.
template <class M>
class ScaleBackward {
 public:
  ScaleBackward(Frame& frame, const NetOf<M>& net, const SumPlaces& layout, int scale, bool need_images, float* sums)
      : net_(net), layout_(layout), scale_(scale), need_images_(need_images), sums_(sums),
        zeros_(zero_row(frame, net.grid[scale])), block_(take_block(frame, net.mid)), rows_(rows_of(frame)),
        grad_pixels_(frame, net.mid, net.grid[scale]), x_pixels_(frame, net.in, net.grid[scale]),
        tap_sums_(frame, net.mid * (kTaps + 1)), bias_sums_(frame, net.mid) {}

  // Row i: `hidden` and `grad` hold its neighbours, `x` its blocks; grad_x is a planar row.
  void row(const Rows& hidden, const Rows& grad, int64_t i, const M* x, float* grad_x) {
    const Grid& grid = net_.grid[scale_];
    if (sums_) add_taps(Neighbours(hidden, i, grid.height, zeros_), grad[i]);
    const Neighbours near(grad, i, grid.height, zeros_);
    const VecF inverse_rows = simd::broadcast(1.0f / grid.rows_of(i));
    for (int64_t b = 0; b < grid.blocks; ++b) {
      VecU inside[kVectors];
      for (int v = 0; v < kVectors; ++v) inside[v] = first_lanes(grid.width - b * kBlock - v * kLanes);
      depthwise(
          near, net_.flipped[scale_].data(), net_.mid, b * kBlock,
          [&](int64_t c, int v, VecF g) __attribute__((always_inline)) {
            g = keep(inside[v], g);
            simd::store(block_ + c * kBlock + v * kLanes, g);
            if constexpr (PixelMajor<M>::kPairs) gemm::set_channel(c, g, rows_ + v * kLanes, kBlock);
            if (sums_) bias_sums_.sums[c] += g;
          });
      if (need_images_) {
        const float* inverse = grid.inverse.data() + b * kBlock;
        net_.in_transposed[scale_].times(
            grid.columns(b), rows_, kBlock, [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
              simd::store(grad_x + c * grid.pitch + b * kBlock + j, g * simd::load(inverse + j) * inverse_rows);
            });
      }
      if (sums_) {
        grad_pixels_.set(b, block_);
        x_pixels_.set(b, x + b * net_.in_weight[scale_].depth * kBlock);
      }
    }
    if (!sums_) return;
    add_product(grad_pixels_, x_pixels_, grid.width, sums_ + layout_.in_weight[scale_], layout_.in_pitch);
    tap_sums_.added(grid.blocks * kVectors);
    bias_sums_.added(grid.blocks * kVectors);
  }

  void finish() {
    if (!sums_) return;
    tap_sums_.finish(sums_ + layout_.dw[scale_]);
    bias_sums_.finish(sums_ + layout_.in_bias[scale_]);
  }

 private:
  M* rows_of(Frame& frame) const {
    if constexpr (PixelMajor<M>::kPairs)
      return take_block<M>(frame, net_.mid);
    else
      return block_;
  }

  void add_taps(const Neighbours& hidden, const float* grad) {
    const Grid& grid = net_.grid[scale_];
    for (int64_t c = 0; c < net_.mid; ++c, grad += grid.pitch) {
      VecF* total = tap_sums_.sums + c * (kTaps + 1);
      VecF sum[kTaps + 1];
      std::copy(total, total + kTaps + 1, sum);
      for (int64_t j = 0; j < grid.width; j += kLanes) {
        const VecF g = simd::load(grad + j);
        for (int k = 0; k < 3; ++k) {
          const float* row = hidden.row[k] + c * hidden.pitch[k] + j;
          for (int l = 0; l < 3; ++l) sum[3 * k + l] += g * simd::load(row + l - 1);
        }
        sum[kTaps] += g;
      }
      std::copy(sum, sum + kTaps + 1, total);
    }
  }

  const NetOf<M>& net_;
  const SumPlaces& layout_;
  const int scale_;
  const bool need_images_;
  float* const sums_;  // null where no parameter needs a gradient
  const float* const zeros_;
  float* const block_;
  M* const rows_;  // the same, as rows of a product
  const PixelMajor<M> grad_pixels_, x_pixels_;
  VectorSums tap_sums_, bias_sums_;
};

// Gradients of the low-resolution maps, by image, strip and row: a strip holds what its own pixels add to the rows it
// touches.
struct LowGradients {
  const Net& net;
  int scale;
  int64_t strips, rows, capacity, row_size;
  float* data;

  LowGradients(Frame& frame, const Net& n, int s, int64_t images)
      : net(n), scale(s), strips(n.strips()), rows(n.rows_per_strip()), capacity(capacity_of(n, s)),
        row_size(n.mid * n.grid[s].pitch), data(frame.take<float>(images * strips * capacity * row_size)) {}

  static int64_t capacity_of(const Net& n, int s) { return n.rows_per_strip() * n.grid[s].height / n.height + 4; }
  int64_t first(int64_t strip) const { return net.row_source[scale][strip * rows].low; }
  int64_t last(int64_t strip) const { return net.row_source[scale][std::min(net.height, (strip + 1) * rows) - 1].high; }
  float* row(int64_t image, int64_t strip, int64_t u) const {
    return data + ((image * strips + strip) * capacity + u - first(strip)) * row_size;
  }

  // Row u of all strips together into the planar row `sum`.
  void gather(int64_t image, int64_t u, float* sum) const {
    bool started = false;
    for (int64_t strip = 0; strip < strips; ++strip) {
      if (u < first(strip) || u > last(strip)) continue;
      const float* part = row(image, strip, u);
      for (int64_t j = 0; j < row_size; ++j) sum[j] = started ? sum[j] + part[j] : part[j];
      started = true;
    }
    if (!started) std::fill_n(sum, row_size, 0.0f);
  }
};

// The transpose of `upsample`, row by row of the full resolution: gradients gather in full-width rows, one for each
// open row of the low resolution, and are summed along the row when it closes.
class Downsample {
 public:
  Downsample(Frame& frame, const Net& net, const LowGradients& low, int64_t image, int64_t strip)
      : net_(net), low_(low), image_(image), strip_(strip), open_(frame, 2, net.mid, net.grid[0]),
        next_open_(low.first(strip)), next_closed_(next_open_) {}

  void begin(const Source& source) {
    for (; next_closed_ < source.low; ++next_closed_) close(next_closed_);
    for (; next_open_ <= source.high; ++next_open_) open_.clear(next_open_);
    source_ = &source;
    low_row_ = open_[source.low];
    high_row_ = open_[source.high];
  }
  void add(int64_t c, int64_t j, VecF grad) const {
    float* low = low_row_ + c * open_.pitch + j;
    float* high = high_row_ + c * open_.pitch + j;
    simd::store(low, simd::load(low) + source_->low_weight * grad);
    simd::store(high, simd::load(high) + source_->high_weight * grad);
  }
  void finish() {
    for (; next_closed_ < next_open_; ++next_closed_) close(next_closed_);
  }

 private:
  void close(int64_t u) const {
    const ColumnMap& map = net_.column_map[low_.scale - 1];
    const int64_t pitch = net_.grid[low_.scale].pitch;
    float* row = low_.row(image_, strip_, u);
    std::fill_n(row, low_.row_size, 0.0f);
    for (int64_t v = 0; v * kLanes < net_.width; ++v) {
      const ColumnMap::Tap* taps = map.adjoint.data() + v * map.taps;
      const float* from = open_[u] + v * kLanes;
      float* to = row + kLanes + map.windows[v].base;
      const VecU reached = map.windows[v].reached;
      for (int64_t c = 0; c < net_.mid; ++c, from += open_.pitch, to += pitch) {
        const VecF grad = simd::load(from);
        VecF sum = {};
        for (int64_t t = 0; t < map.taps; ++t) sum += taps[t].weight * simd::permute(grad, taps[t].lane);
        simd::store(to, simd::load(to) + keep(reached, sum));
      }
    }
  }

  const Net& net_;
  const LowGradients& low_;
  const int64_t image_, strip_;
  const Rows open_;
  int64_t next_open_, next_closed_;
  const Source* source_ = nullptr;
  float *low_row_ = nullptr, *high_row_ = nullptr;
};

}  // namespace multiscale_ffn
