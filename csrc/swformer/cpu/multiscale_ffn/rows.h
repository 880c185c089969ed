// Rows of the image and of the network's maps: between storage and scratch, and from stage to stage.
#pragma once

#include "gather.h"
#include "plan.h"
#include "scratch.h"

namespace multiscale_ffn {

using scratch::Frame;
using tensor::Strides;

template <class T>
struct Image {
  T* data;
  Strides strides;
  int64_t channels, width;

  Image(T* memory, const Tensor& t, int64_t b)
      : data(memory + b * t.stride(0)), strides(tensor::strides_of(t)), channels(t.size(1)), width(t.size(3)) {}
  bool dense() const { return strides.w == 1 || width == 1; }
  T* row(int64_t i) const { return data + i * strides.h; }
};

template <class T>
Image<const T> input(const Tensor& t, int64_t b) {
  return {static_cast<const T*>(t.const_data_ptr()), t, b};
}
template <class T>
Image<T> output(Tensor& t, int64_t b) {
  return {static_cast<T*>(t.mutable_data_ptr()), t, b};
}

// Row i as blocks of `gemm::depth<M>(x.channels)` rows.
template <class T, class M>
void pack_row(const Image<const T>& x, int64_t i, M* blocks) {
  const T* row = x.row(i);
  const int64_t depth = gemm::depth<M>(x.channels);
  for (int64_t j = 0; j < x.width; j += kBlock, blocks += depth * kBlock) {
    const int64_t n = std::min(kBlock, x.width - j);
    if (x.dense()) {
      gather::tile(x.channels, n, [&](int64_t c) { return row + c * x.strides.c + j; }, blocks, kBlock);
      continue;
    }
    for (int64_t c = 0; c < x.channels; ++c)
      for (int64_t v = 0; v < n; v += kLanes) {
        VecF value = {};
        for (int64_t l = 0; l < std::min(kLanes, n - v); ++l)
          value[l] = static_cast<float>(row[c * x.strides.c + (j + v + l) * x.strides.w]);
        gemm::set_channel(c, value, blocks + v, kBlock);
      }
  }
}

inline VecF add_pairs(VecF a, VecF b) {
  VecF even, odd;
  simd::deinterleave(a, b, even, odd);
  return even + odd;
}

// Row u of the pooled image as blocks. `line` holds factor * blocks * kBlock floats, zero from the width rounded up to
// kLanes on.
template <class T, class M>
void pool_row(const Image<const T>& x, const Grid& grid, int64_t u, float* line, M* blocks) {
  const int64_t depth = gemm::depth<M>(x.channels);
  const int64_t rows = grid.rows_of(u);
  const VecF inverse_rows = simd::broadcast(1.0f / rows);
  for (int64_t c = 0; c < x.channels; ++c) {
    const T* row = x.row(u * grid.factor) + c * x.strides.c;
    if (x.dense()) {
      for (int64_t j = 0; j < x.width; j += kLanes) {
        VecF sum = gather::load(row + j, x.width - j);
        for (int64_t r = 1; r < rows; ++r) sum += gather::load(row + r * x.strides.h + j, x.width - j);
        simd::store(line + j, sum);
      }
    } else {
      for (int64_t j = 0; j < x.width; ++j) {
        float sum = 0;
        for (int64_t r = 0; r < rows; ++r) sum += static_cast<float>(row[r * x.strides.h + j * x.strides.w]);
        line[j] = sum;
      }
    }
    for (int64_t j = 0; j < grid.width; j += kLanes) {
      const float* from = line + j * grid.factor;
      VecF sum = add_pairs(simd::load(from), simd::load(from + kLanes));
      if (grid.factor == 4)
        sum = add_pairs(sum, add_pairs(simd::load(from + 2 * kLanes), simd::load(from + 3 * kLanes)));
      gemm::set_channel(
          c, sum * simd::load(grid.inverse.data() + j) * inverse_rows,
          blocks + j / kBlock * depth * kBlock + j % kBlock, kBlock);
    }
  }
}

// Row i of y = the planar row, plus that of `add` where there is one.
template <class T>
void store_row(const float* planar, int64_t pitch, const Image<T>& y, int64_t i, const Image<const T>* add = nullptr) {
  T* row = y.row(i);
  const T* added = add ? add->row(i) : nullptr;
  if (y.dense() && (!add || add->dense())) {
    for (int64_t c = 0; c < y.channels; ++c)
      for (int64_t j = 0; j < y.width; j += kLanes) {
        const VecF value = simd::load(planar + c * pitch + j);
        gather::store(
            row + c * y.strides.c + j, add ? value + gather::load(added + c * add->strides.c + j, y.width - j) : value,
            y.width - j);
      }
    return;
  }
  for (int64_t j = 0; j < y.width; ++j)
    for (int64_t c = 0; c < y.channels; ++c) {
      const float value = planar[c * pitch + j];
      row[c * y.strides.c + j * y.strides.w] =
          static_cast<T>(add ? value + static_cast<float>(added[c * add->strides.c + j * add->strides.w]) : value);
    }
}

// The last `slots` planar rows of a map, zero at first.
struct Rows {
  int64_t slots, channels, pitch;
  float* data;

  Rows(Frame& frame, int64_t slots_, int64_t channels_, const Grid& grid)
      : slots(slots_), channels(channels_), pitch(grid.pitch),
        data(frame.zeros<float>(slots_ * channels_ * grid.pitch)) {}
  float* operator[](int64_t i) const { return data + i % slots * channels * pitch + kLanes; }
  void clear(int64_t i) const { std::memset((*this)[i] - kLanes, 0, channels * pitch * sizeof(float)); }
};

// Rows i - 1, i and i + 1; those outside the map are zero.
struct Neighbours {
  const float* row[3];
  int64_t pitch[3];

  Neighbours(const Rows& rows, int64_t i, int64_t height, const float* zeros) {
    for (int k = 0; k < 3; ++k) {
      const bool inside = i + k >= 1 && i + k <= height;
      row[k] = inside ? rows[i + k - 1] : zeros;
      pitch[k] = inside ? rows.pitch : 0;
    }
  }
};

// A planar row of zeros of any number of channels (at pitch 0).
inline const float* zero_row(Frame& frame, const Grid& grid) { return frame.zeros<float>(grid.pitch) + kLanes; }

// use(channel, vector, value) of the depthwise convolution at the block of columns from j.
template <class Use>
inline void depthwise(const Neighbours& near, const float* taps, int64_t channels, int64_t j, Use&& use) {
  for (int64_t c = 0; c < channels; ++c, taps += kTaps) {
    VecF sum[kVectors] = {};
    for (int k = 0; k < 3; ++k) {
      const float* row = near.row[k] + c * near.pitch[k] + j;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        sum[v] += taps[3 * k] * simd::load(row + v * kLanes - 1) + taps[3 * k + 1] * simd::load(row + v * kLanes) +
                  taps[3 * k + 2] * simd::load(row + v * kLanes + 1);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) use(c, v, sum[v]);
  }
}

// use(channel, vector, value) of the bilinear map of `low` to row `source` at a block of full-resolution columns.
template <class Use>
inline void upsample(const Rows& low, const Source& source, const ColumnMap& map, int64_t block, Use&& use) {
  const float* top = low[source.low];
  const float* bottom = low[source.high];
  for (int v = 0; v < kVectors; ++v) {
    const ColumnMap::Window window = map.windows[block * kVectors + v];
    for (int64_t c = 0; c < low.channels; ++c) {
      const int64_t at = c * low.pitch + window.base;
      const VecF blend = source.low_weight * simd::load(top + at) + source.high_weight * simd::load(bottom + at);
      use(c, v,
          window.low_weight * simd::permute(blend, window.low) +
              window.high_weight * simd::permute(blend, window.high));
    }
  }
}

// Rows of the (pooled) image and of the first 1x1 convolution, made in order as they are asked for.
template <class T, class M>
class Hidden {
 public:
  Hidden(
      Frame& frame, const NetOf<M>& net, int scale, const Image<const T>& x, int64_t first, int64_t row_slots,
      int64_t pack_slots)
      : rows(frame, row_slots, net.mid, net.grid[scale]), net_(net), scale_(scale), x_(x),
        next_(std::max<int64_t>(0, first)), pack_slots_(pack_slots),
        pack_size_(net.grid[scale].blocks * kBlock * net.in_weight[scale].depth),
        packs_(frame.take<M>(pack_slots * pack_size_ + kLanes * kBlock)),
        line_(frame.zeros<float>(net.grid[scale].blocks * kBlock * kFactor[scale])) {}

  M* blocks(int64_t i) const { return packs_ + i % pack_slots_ * pack_size_; }

  void advance(int64_t last) {
    const Grid& grid = net_.grid[scale_];
    const float* bias = net_.in_bias.data() + scale_ * net_.mid;
    for (; next_ <= std::min(last, grid.height - 1); ++next_) {
      M* block = blocks(next_);
      float* row = rows[next_];
      if (scale_ == 0)
        pack_row(x_, next_, block);
      else
        pool_row(x_, grid, next_, line_, block);
      for (int64_t b = 0; b < grid.blocks; ++b, block += net_.in_weight[scale_].depth * kBlock, row += kBlock)
        net_.in_weight[scale_].times(
            grid.columns(b), block, kBlock, [&](int64_t c, int64_t j, VecF v) __attribute__((always_inline)) {
              simd::store(row + c * grid.pitch + j, v + bias[c]);
            });
      if (grid.width % kLanes)
        for (int64_t c = 0; c < net_.mid; ++c)
          std::fill_n(rows[next_] + c * grid.pitch + grid.width, kLanes - grid.width % kLanes, 0.0f);
    }
  }

  const Rows rows;

 private:
  const NetOf<M>& net_;
  const int scale_;
  const Image<const T> x_;
  int64_t next_;
  const int64_t pack_slots_, pack_size_;
  M* const packs_;
  float* const line_;
};

// Rows of the depthwise convolution at scale 2 or 4, made in order as they are asked for.
template <class T, class M>
class Mixed {
 public:
  Mixed(Frame& frame, const NetOf<M>& net, int scale, const Image<const T>& x, int64_t first)
      : rows(frame, 2, net.mid, net.grid[scale]), net_(net), scale_(scale),
        hidden_(frame, net, scale, x, first - 1, 3, 1), zeros_(zero_row(frame, net.grid[scale])), next_(first) {}

  void advance(int64_t last) {
    const Grid& grid = net_.grid[scale_];
    const float* bias = net_.dw_bias[scale_].data();
    for (; next_ <= last; ++next_) {
      hidden_.advance(next_ + 1);
      const Neighbours near(hidden_.rows, next_, grid.height, zeros_);
      for (int64_t b = 0; b < grid.blocks; ++b) {
        float* row = rows[next_] + b * kBlock;
        depthwise(
            near, net_.taps[scale_].data(), net_.mid, b * kBlock,
            [&](int64_t c, int v, VecF z)
                __attribute__((always_inline)) { simd::store(row + c * grid.pitch + v * kLanes, z + bias[c]); });
      }
    }
  }

  const Rows rows;

 private:
  const NetOf<M>& net_;
  const int scale_;
  Hidden<T, M> hidden_;
  const float* const zeros_;
  int64_t next_;
};

// use(channel of the concatenation, vector, value) for what enters the GELU at block b of row i; full resolution only,
// or all scales.
template <class T, class M, class Use>
inline void before_gelu(
    const Net& net, const Neighbours& near, const Mixed<T, M>& half, const Mixed<T, M>& quarter, int64_t i, int64_t b,
    bool all, Use&& use) {
  depthwise(
      near, net.taps[0].data(), net.mid, b * kBlock,
      [&](int64_t c, int v, VecF z) __attribute__((always_inline)) { use(c, v, z + net.dw_bias[0][c]); });
  if (!all) return;
  upsample(
      half.rows, net.row_source[1][i], net.column_map[0], b,
      [&](int64_t c, int v, VecF z) __attribute__((always_inline)) { use(net.mid + c, v, z); });
  upsample(
      quarter.rows, net.row_source[2][i], net.column_map[1], b,
      [&](int64_t c, int v, VecF z) __attribute__((always_inline)) { use(2 * net.mid + c, v, z); });
}

}  // namespace multiscale_ffn
