// Multi-scale feed-forward network, streamed by rows. Average pooling commutes with the first 1x1 convolution, so for the scales 2 and
// 4 the input is pooled and then convolved. A task owns a strip of rows; it keeps a few rows of each stage in rings and computes the
// rows that it shares with its neighbours' strips again. All arithmetic is float.
//
// Two layouts: "planar" rows [channel][pitch] with zeros before column 0 and after the last, for stencils; and "blocks"
// [block][channel][kBlock] of pixels, for matrix products.
//
// The backward pass recomputes the forward and takes two passes over the strips: the first has every full-resolution gradient and the
// gradient of each low-resolution map (strip by strip, boundary rows in parts); the second takes those to the input and the weights.
#include <cmath>
#include <optional>

#include "gelu.h"
#include "gemm.h"
#include "scratch.h"
#include "tensor.h"

namespace {

using simd::VecF;
using simd::VecU;
using tensor::Strides;
using tensor::Tensor;
using scratch::Frame;

constexpr int64_t kLanes = simd::kFloats;
constexpr int kVectors = 2;
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int kScales = 3;
constexpr int64_t kFactor[kScales] = {1, 2, 4};
constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kGroupBytes = int64_t{32} << 20;  // of gradients between the two backward passes
constexpr int kTaps = 9;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
inline VecF load_part(const T* p, int64_t n) {
  if (n >= kLanes) return simd::load(p);
  VecF v{};
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
template <class T>
inline void store_part(T* p, VecF v, int64_t n) {
  if (n >= kLanes) return simd::store(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<T>(v[i]);
}

// tensor::dispatch without double.
template <class F>
inline void dispatch(tensor::ScalarType dtype, F&& f) {
  tensor::dispatch(dtype, [&](auto* tag) {
    if constexpr (std::is_same_v<decltype(tag), double*>) {
      STD_TORCH_CHECK(false, "multiscale_ffn has no float64 kernel");
    } else {
      f(tag);
    }
  });
}

// All bits set in the first n lanes.
inline VecU first_lanes(int64_t n) {
  VecU mask;
  for (int64_t i = 0; i < kLanes; ++i) mask[i] = i < n ? ~0u : 0u;
  return mask;
}
inline VecF keep(VecU mask, VecF v) { return reinterpret_cast<VecF>(mask & reinterpret_cast<VecU>(v)); }

// One resolution: `factor` x `factor` pixels of the image (fewer at the bottom and right) to a sample.
struct Grid {
  int64_t factor, height, width, blocks, pitch;
  int64_t last_rows;           // pixel rows of the last sample row
  std::vector<float> inverse;  // 1 / pixel columns of each sample

  Grid(int64_t f, int64_t image_height, int64_t image_width)
      : factor(f), height(divide_up(image_height, f)), width(divide_up(image_width, f)), blocks(divide_up(width, kBlock)),
        pitch(blocks * kBlock + 2 * kLanes), last_rows(image_height - (height - 1) * f), inverse(blocks * kBlock, 1.0f / f) {
    inverse[width - 1] = 1.0f / (image_width - (width - 1) * f);
  }
  int64_t rows_of(int64_t u) const { return u == height - 1 ? last_rows : factor; }
  int64_t columns(int64_t block) const { return std::min(kBlock, width - block * kBlock); }
};

// Bilinear interpolation of one axis, align_corners=False: output i is low_weight * source[low] + high_weight * source[high].
struct Source {
  int64_t low, high;
  float low_weight, high_weight;

  Source(int64_t i, int64_t in, int64_t out) {
    const double at = std::max(0.0, (i + 0.5) * in / out - 0.5);
    low = std::min(static_cast<int64_t>(at), in - 1);
    high = std::min(low + 1, in - 1);
    high_weight = in == out ? 0.0f : static_cast<float>(at - low);
    low_weight = 1.0f - high_weight;
  }
};

// The same along a row, in vectors: the sources of kLanes outputs lie in the kLanes samples from `base`.
struct ColumnMap {
  struct Window {
    int64_t base;
    VecU low, high;
    VecF low_weight, high_weight;
  };
  struct Tap {
    VecU lane;
    VecF weight;
  };
  std::vector<Window> windows;
  int64_t taps = 0;
  std::vector<Tap> adjoint;  // [window][tap]: what each of the kLanes samples from `base` receives

  ColumnMap(const Grid& low, const Grid& full) : windows(full.blocks * kVectors, Window{}) {
    std::vector<std::vector<std::pair<int64_t, float>>> received(windows.size() * kLanes);
    for (int64_t j = 0; j < full.width; ++j) {
      const Source s(j, low.width, full.width);
      Window& window = windows[j / kLanes];
      const int64_t lane = j % kLanes;
      if (lane == 0) window.base = s.low;
      window.low[lane] = s.low - window.base;
      window.high[lane] = s.high - window.base;
      window.low_weight[lane] = s.low_weight;
      window.high_weight[lane] = s.high_weight;
      auto* targets = received.data() + j / kLanes * kLanes - window.base;
      targets[s.low].push_back({lane, s.low_weight});
      targets[s.high].push_back({lane, s.high_weight});
    }
    for (const auto& list : received) taps = std::max<int64_t>(taps, list.size());
    adjoint.assign(windows.size() * taps, Tap{});
    for (size_t i = 0; i < received.size(); ++i)
      for (size_t tap = 0; tap < received[i].size(); ++tap) {
        Tap& t = adjoint[i / kLanes * taps + tap];
        t.lane[i % kLanes] = received[i][tap].first;
        t.weight[i % kLanes] = received[i][tap].second;
      }
  }
};

// The left factor of a matrix product with blocks.
struct Matrix {
  int64_t rows = 0, depth = 0;
  std::vector<float> panels;

  Matrix() = default;
  template <class At>
  Matrix(int64_t r, int64_t d, At&& at) : rows(r), depth(d), panels(gemm::packed_size(r, d)) {
    gemm::pack(rows, depth, panels.data(), at);
  }
  // use(row, column, vector) for every vector of the product with `block`.
  template <class Use>
  void times(const float* block, int64_t columns, Use&& use) const {
    gemm::multiply(
        rows, columns, depth, panels.data(), depth * gemm::kRows, gemm::kRows, block, kBlock,
        [&](int64_t row, int64_t column, auto& sum) __attribute__((always_inline)) {
          constexpr int n = sizeof(sum[0]) / sizeof(sum[0][0]);
#pragma GCC unroll 8
          for (int i = 0; i < gemm::kRows; ++i) {
            if (row + i >= rows) break;
#pragma GCC unroll 3
            for (int v = 0; v < n; ++v) use(row + i, column + v * kLanes, sum[i][v]);
          }
        });
  }
};

// The network: sizes, interpolation, weights in the forms that the products take.
struct Net {
  int64_t batch, in, mid, out, height, width;
  std::vector<Grid> grid;
  std::vector<std::vector<Source>> row_source;
  std::vector<ColumnMap> column_map;  // of the scales 2 and 4: [scale - 1]
  Matrix in_weight[kScales], out_weight;
  std::vector<float> in_bias, taps[kScales], dw_bias[kScales], out_bias;
  // For the backward pass.
  Matrix in_transposed[kScales], out_transposed[kScales];
  std::vector<float> flipped[kScales];

  Net(const Tensor& x, const Tensor& in_w, const Tensor& in_b, const std::array<Tensor, 2 * kScales>& dw, const Tensor& out_w,
      const Tensor& out_b, bool backward)
      : batch(x.size(0)), in(x.size(1)), mid(in_w.size(0) / kScales), out(out_w.size(0)), height(x.size(2)), width(x.size(3)),
        in_bias(tensor::read<float>(in_b)), out_bias(tensor::read<float>(out_b)) {
    const auto first = tensor::read<float>(in_w), last = tensor::read<float>(out_w);
    const int64_t wide = kScales * mid;
    out_weight = Matrix(out, wide, [&](int64_t i, int64_t j) { return last[i * wide + j]; });
    for (int s = 0; s < kScales; ++s) {
      grid.emplace_back(kFactor[s], height, width);
      taps[s] = tensor::read<float>(dw[2 * s]);
      dw_bias[s] = tensor::read<float>(dw[2 * s + 1]);
      in_weight[s] = Matrix(mid, in, [&](int64_t i, int64_t j) { return first[(s * mid + i) * in + j]; });
      row_source.emplace_back();
      for (int64_t i = 0; i < height; ++i) row_source[s].emplace_back(i, grid[s].height, height);
      if (s > 0) column_map.emplace_back(grid[s], grid[0]);
      if (!backward) continue;
      in_transposed[s] = Matrix(in, mid, [&](int64_t i, int64_t j) { return first[(s * mid + j) * in + i]; });
      out_transposed[s] = Matrix(mid, out, [&](int64_t i, int64_t j) { return last[j * wide + s * mid + i]; });
      flipped[s].resize(taps[s].size());
      for (size_t i = 0; i < flipped[s].size(); ++i) flipped[s][i] = taps[s][i / kTaps * kTaps + kTaps - 1 - i % kTaps];
    }
  }
  // Strips start at multiples of the largest factor.
  int64_t rows_per_strip() const {
    return gemm::round_up(divide_up(height, divide_up(height, kRowsPerTask)), kFactor[kScales - 1]);
  }
  int64_t strips() const { return divide_up(height, rows_per_strip()); }
};

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

template <class T>
void pack_row(const Image<const T>& x, int64_t i, float* blocks) {
  const T* row = x.row(i);
  if (x.dense()) {
    for (int64_t c = 0; c < x.channels; ++c)
      for (int64_t j = 0; j < x.width; j += kLanes)
        simd::store(
            blocks + (j / kBlock * x.channels + c) * kBlock + j % kBlock, load_part(row + c * x.strides.c + j, x.width - j));
    return;
  }
  for (int64_t j = 0; j < gemm::round_up(x.width, kLanes); ++j)
    for (int64_t c = 0; c < x.channels; ++c)
      blocks[(j / kBlock * x.channels + c) * kBlock + j % kBlock] =
          j < x.width ? static_cast<float>(row[c * x.strides.c + j * x.strides.w]) : 0.0f;
}

inline VecF add_pairs(VecF a, VecF b) {
  VecF even, odd;
  simd::deinterleave(a, b, even, odd);
  return even + odd;
}

// Row u of the pooled image as blocks. `line` holds factor * blocks * kBlock floats, zero from the width rounded up to kLanes on.
template <class T>
void pool_row(const Image<const T>& x, const Grid& grid, int64_t u, float* line, float* blocks) {
  const int64_t rows = grid.rows_of(u);
  const VecF inverse_rows = simd::broadcast(1.0f / rows);
  for (int64_t c = 0; c < x.channels; ++c) {
    const T* row = x.row(u * grid.factor) + c * x.strides.c;
    if (x.dense()) {
      for (int64_t j = 0; j < x.width; j += kLanes) {
        VecF sum = load_part(row + j, x.width - j);
        for (int64_t r = 1; r < rows; ++r) sum += load_part(row + r * x.strides.h + j, x.width - j);
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
      if (grid.factor == 4) sum = add_pairs(sum, add_pairs(simd::load(from + 2 * kLanes), simd::load(from + 3 * kLanes)));
      simd::store(
          blocks + (j / kBlock * x.channels + c) * kBlock + j % kBlock,
          sum * simd::load(grid.inverse.data() + j) * inverse_rows);
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
        store_part(
            row + c * y.strides.c + j, add ? value + load_part(added + c * add->strides.c + j, y.width - j) : value, y.width - j);
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
      : slots(slots_), channels(channels_), pitch(grid.pitch), data(frame.zeros<float>(slots_ * channels_ * grid.pitch)) {}
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
      use(c, v, window.low_weight * simd::permute(blend, window.low) + window.high_weight * simd::permute(blend, window.high));
    }
  }
}

// Rows of the (pooled) image and of the first 1x1 convolution, made in order as they are asked for.
template <class T>
class Hidden {
 public:
  Hidden(Frame& frame, const Net& net, int scale, const Image<const T>& x, int64_t first, int64_t row_slots, int64_t pack_slots)
      : rows(frame, row_slots, net.mid, net.grid[scale]), net_(net), scale_(scale), x_(x), next_(std::max<int64_t>(0, first)),
        pack_slots_(pack_slots), pack_size_(net.grid[scale].blocks * kBlock * net.in),
        packs_(frame.take<float>(pack_slots * pack_size_ + kLanes * kBlock)),
        line_(frame.zeros<float>(net.grid[scale].blocks * kBlock * kFactor[scale])) {}

  float* blocks(int64_t i) const { return packs_ + i % pack_slots_ * pack_size_; }

  void advance(int64_t last) {
    const Grid& grid = net_.grid[scale_];
    const float* bias = net_.in_bias.data() + scale_ * net_.mid;
    for (; next_ <= std::min(last, grid.height - 1); ++next_) {
      float* block = blocks(next_);
      float* row = rows[next_];
      if (scale_ == 0)
        pack_row(x_, next_, block);
      else
        pool_row(x_, grid, next_, line_, block);
      for (int64_t b = 0; b < grid.blocks; ++b, block += net_.in * kBlock, row += kBlock)
        net_.in_weight[scale_].times(block, grid.columns(b), [&](int64_t c, int64_t j, VecF v) __attribute__((always_inline)) {
          simd::store(row + c * grid.pitch + j, v + bias[c]);
        });
      if (grid.width % kLanes)
        for (int64_t c = 0; c < net_.mid; ++c)
          std::fill_n(rows[next_] + c * grid.pitch + grid.width, kLanes - grid.width % kLanes, 0.0f);
    }
  }

  const Rows rows;

 private:
  const Net& net_;
  const int scale_;
  const Image<const T> x_;
  int64_t next_;
  const int64_t pack_slots_, pack_size_;
  float* const packs_;
  float* const line_;
};

// Rows of the depthwise convolution at scale 2 or 4, made in order as they are asked for.
template <class T>
class Mixed {
 public:
  Mixed(Frame& frame, const Net& net, int scale, const Image<const T>& x, int64_t first)
      : rows(frame, 2, net.mid, net.grid[scale]), net_(net), scale_(scale), hidden_(frame, net, scale, x, first - 1, 3, 1),
        zeros_(zero_row(frame, net.grid[scale])), next_(first) {}

  void advance(int64_t last) {
    const Grid& grid = net_.grid[scale_];
    const float* bias = net_.dw_bias[scale_].data();
    for (; next_ <= last; ++next_) {
      hidden_.advance(next_ + 1);
      const Neighbours near(hidden_.rows, next_, grid.height, zeros_);
      for (int64_t b = 0; b < grid.blocks; ++b) {
        float* row = rows[next_] + b * kBlock;
        depthwise(near, net_.taps[scale_].data(), net_.mid, b * kBlock, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
          simd::store(row + c * grid.pitch + v * kLanes, z + bias[c]);
        });
      }
    }
  }

  const Rows rows;

 private:
  const Net& net_;
  const int scale_;
  Hidden<T> hidden_;
  const float* const zeros_;
  int64_t next_;
};

// use(channel of the concatenation, vector, value) for what enters the GELU at block b of row i; full resolution only, or all scales.
template <class T, class Use>
inline void before_gelu(
    const Net& net, const Neighbours& near, const Mixed<T>& half, const Mixed<T>& quarter, int64_t i, int64_t b, bool all, Use&& use) {
  depthwise(near, net.taps[0].data(), net.mid, b * kBlock, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
    use(c, v, z + net.dw_bias[0][c]);
  });
  if (!all) return;
  upsample(half.rows, net.row_source[1][i], net.column_map[0], b, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
    use(net.mid + c, v, z);
  });
  upsample(quarter.rows, net.row_source[2][i], net.column_map[1], b, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
    use(2 * net.mid + c, v, z);
  });
}

template <class T>
void forward_strip(
    const Net& net, const Image<const T>& x, const Image<const T>* residual, const Image<T>& y, int64_t begin, int64_t end) {
  Frame frame;
  const Grid& full = net.grid[0];
  const float* zeros = zero_row(frame, full);
  Hidden<T> hidden(frame, net, 0, x, begin - 1, 3, 1);
  Mixed<T> half(frame, net, 1, x, net.row_source[1][begin].low), quarter(frame, net, 2, x, net.row_source[2][begin].low);
  float* activated = frame.take<float>(kScales * net.mid * kBlock);
  const Rows result(frame, 1, net.out, full);
  for (int64_t i = begin; i < end; ++i) {
    hidden.advance(i + 1);
    half.advance(net.row_source[1][i].high);
    quarter.advance(net.row_source[2][i].high);
    const Neighbours near(hidden.rows, i, full.height, zeros);
    for (int64_t b = 0; b < full.blocks; ++b) {
      before_gelu(net, near, half, quarter, i, b, true, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
        simd::store(activated + c * kBlock + v * kLanes, simd::gelu(z));
      });
      float* row = result[i] + b * kBlock;
      net.out_weight.times(activated, full.columns(b), [&](int64_t c, int64_t j, VecF v) __attribute__((always_inline)) {
        simd::store(row + c * full.pitch + j, v + net.out_bias[c]);
      });
    }
    store_row(result[i], full.pitch, y, i, residual);
  }
}

Tensor multiscale_ffn(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& dw_weight1, const Tensor& dw_bias1,
    const Tensor& dw_weight2, const Tensor& dw_bias2, const Tensor& dw_weight4, const Tensor& dw_bias4, const Tensor& out_weight,
    const Tensor& out_bias, const std::optional<Tensor>& residual) {
  Tensor y = tensor::empty(x, {x.size(0), out_weight.size(0), x.size(2), x.size(3)}, tensor::is_channels_last(x));
  if (x.size(0) == 0) return y;
  const Net net(
      x, in_weight, in_bias, {dw_weight1, dw_bias1, dw_weight2, dw_bias2, dw_weight4, dw_bias4}, out_weight, out_bias, false);
  dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t strips = net.strips(), rows = net.rows_per_strip();
    torch::stable::parallel_for(0, net.batch * strips, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task % strips * rows, b = task / strips;
        std::optional<Image<const T>> add;
        if (residual) add = input<T>(*residual, b);
        forward_strip(net, input<T>(x, b), add ? &*add : nullptr, output<T>(y, b), begin, std::min(net.height, begin + rows));
      }
    });
  });
  return y;
}

// Where the sums of each parameter's gradient lie in the floats of one task; the first pass has those before `second`.
struct Layout {
  int64_t in_weight[kScales], in_bias[kScales], dw[kScales], out_weight, out_bias, second, size;
  int64_t in_pitch, out_pitch;  // of the weights' rows, whole vectors

  explicit Layout(const Net& net)
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

// A row of pixels [pixel][channel], for products that sum over the pixels.
struct PixelMajor {
  int64_t channels, pitch;
  float* data;

  PixelMajor(Frame& frame, int64_t channels_, const Grid& grid)
      : channels(channels_), pitch(gemm::round_up(channels_, kLanes) + kLanes),  // no power of two
        data(frame.take<float>(grid.blocks * kBlock * pitch)) {}

  // `block` is read up to a whole vector of channels.
  void set(int64_t b, const float* block) const {
    gemm::transpose(channels, kBlock, block, kBlock, data + b * kBlock * pitch, pitch);
  }
};

// sum[i][j] += a[p][i] b[p][j] over the pixels p of a row.
inline void add_product(const PixelMajor& a, const PixelMajor& b, int64_t pixels, float* sum, int64_t pitch) {
  gemm::multiply(
      a.channels, b.channels, pixels, a.data, gemm::kRows, a.pitch, b.data, b.pitch, gemm::into<true>(sum, pitch, a.channels));
}

// Sums kept in vectors until a task ends.
struct VectorSums {
  int64_t count;
  VecF* sums;

  VectorSums(Frame& frame, int64_t n) : count(n), sums(frame.zeros<VecF>(n)) {}
  void finish(float* out) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t lane = 0; lane < kLanes; ++lane) out[i] += sums[i][lane];
  }
};

inline float* take_block(Frame& frame, int64_t channels) {
  return frame.take<float>(gemm::round_up(channels, kLanes) * kBlock);
}

// From the gradient after the depthwise convolution of one scale to those of its taps, of the first 1x1 convolution and of its input.
class ScaleBackward {
 public:
  ScaleBackward(Frame& frame, const Net& net, const Layout& layout, int scale, bool need_x, float* sums)
      : net_(net), layout_(layout), scale_(scale), need_x_(need_x), sums_(sums), zeros_(zero_row(frame, net.grid[scale])),
        block_(take_block(frame, net.mid)), grad_pixels_(frame, net.mid, net.grid[scale]), x_pixels_(frame, net.in, net.grid[scale]),
        tap_sums_(frame, net.mid * (kTaps + 1)), bias_sums_(frame, net.mid) {}

  // Row i: `hidden` and `grad` hold its neighbours, `x` its blocks; grad_x is a planar row.
  void row(const Rows& hidden, const Rows& grad, int64_t i, const float* x, float* grad_x) {
    const Grid& grid = net_.grid[scale_];
    if (sums_) add_taps(Neighbours(hidden, i, grid.height, zeros_), grad[i]);
    const Neighbours near(grad, i, grid.height, zeros_);
    const VecF inverse_rows = simd::broadcast(1.0f / grid.rows_of(i));
    for (int64_t b = 0; b < grid.blocks; ++b) {
      VecU inside[kVectors];
      for (int v = 0; v < kVectors; ++v) inside[v] = first_lanes(grid.width - b * kBlock - v * kLanes);
      depthwise(near, net_.flipped[scale_].data(), net_.mid, b * kBlock, [&](int64_t c, int v, VecF g) __attribute__((always_inline)) {
        g = keep(inside[v], g);
        simd::store(block_ + c * kBlock + v * kLanes, g);
        if (sums_) bias_sums_.sums[c] += g;
      });
      if (need_x_) {
        const float* inverse = grid.inverse.data() + b * kBlock;
        net_.in_transposed[scale_].times(block_, grid.columns(b), [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
          simd::store(grad_x + c * grid.pitch + b * kBlock + j, g * simd::load(inverse + j) * inverse_rows);
        });
      }
      if (sums_) {
        grad_pixels_.set(b, block_);
        x_pixels_.set(b, x + b * net_.in * kBlock);
      }
    }
    if (sums_) add_product(grad_pixels_, x_pixels_, grid.width, sums_ + layout_.in_weight[scale_], layout_.in_pitch);
  }

  void finish() {
    if (!sums_) return;
    tap_sums_.finish(sums_ + layout_.dw[scale_]);
    bias_sums_.finish(sums_ + layout_.in_bias[scale_]);
  }

 private:
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

  const Net& net_;
  const Layout& layout_;
  const int scale_;
  const bool need_x_;
  float* const sums_;  // null where no parameter needs a gradient
  const float* const zeros_;
  float* const block_;
  const PixelMajor grad_pixels_, x_pixels_;
  const VectorSums tap_sums_, bias_sums_;
};

// Gradients of the low-resolution maps, by image, strip and row: a strip holds what its own pixels add to the rows it touches.
struct LowGradients {
  const Net& net;
  int scale;
  int64_t strips, rows, capacity, row_size;
  float* data;

  LowGradients(Frame& frame, const Net& n, int s, int64_t images)
      : net(n), scale(s), strips(n.strips()), rows(n.rows_per_strip()), capacity(capacity_of(n, s)),
        row_size(n.mid * n.grid[s].pitch), data(frame.take<float>(images * strips * capacity * row_size)) {}

  static int64_t capacity_of(const Net& n, int s) {
    return n.rows_per_strip() * n.grid[s].height / n.height + 4;
  }
  int64_t first(int64_t strip) const { return net.row_source[scale][strip * rows].low; }
  int64_t last(int64_t strip) const { return net.row_source[scale][std::min(net.height, (strip + 1) * rows) - 1].high; }
  float* row(int64_t image, int64_t strip, int64_t u) const {
    return data + ((image * strips + strip) * capacity + u - first(strip)) * row_size;
  }

  // Row u of all strips together into the planar row `sum`.
  void gather(int64_t image, int64_t u, float* sum) const {
    bool found = false;
    for (int64_t strip = 0; strip < strips; ++strip) {
      if (u < first(strip) || u > last(strip)) continue;
      const float* part = row(image, strip, u);
      for (int64_t j = 0; j < row_size; ++j) sum[j] = found ? sum[j] + part[j] : part[j];
      found = true;
    }
    if (!found) std::fill_n(sum, row_size, 0.0f);
  }
};

// The transpose of `upsample`, row by row of the full resolution: gradients gather in full-width rows, one for each open row of the
// low resolution, and are summed along the row when it closes.
class Downsample {
 public:
  Downsample(Frame& frame, const Net& net, const LowGradients& low, int64_t image, int64_t strip)
      : net_(net), low_(low), image_(image), strip_(strip), open_(frame, 2, net.mid, net.grid[0]), next_open_(low.first(strip)),
        next_closed_(next_open_) {}

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
      for (int64_t c = 0; c < net_.mid; ++c, from += open_.pitch, to += pitch) {
        const VecF grad = simd::load(from);
        VecF sum = simd::load(to);
        for (int64_t t = 0; t < map.taps; ++t) sum += taps[t].weight * simd::permute(grad, taps[t].lane);
        simd::store(to, sum);
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

// First pass over a strip. `grad_x` gets what comes through the first scale; `sums` is null where no parameter needs a gradient.
template <class T>
void backward_strip(
    const Net& net, const Layout& layout, const Image<const T>& x, const Image<const T>& grad, const Image<T>* grad_x,
    const LowGradients& half_grad, const LowGradients& quarter_grad, int64_t image, int64_t strip, float* sums) {
  Frame frame;
  const Grid& full = net.grid[0];
  const int64_t begin = strip * net.rows_per_strip(), end = std::min(net.height, begin + net.rows_per_strip());
  const int64_t mid = net.mid, wide = kScales * mid;
  const float* zeros = zero_row(frame, full);
  Hidden<T> hidden(frame, net, 0, x, begin - 2, 4, 3);
  Mixed<T> half(frame, net, 1, x, net.row_source[1][begin].low), quarter(frame, net, 2, x, net.row_source[2][begin].low);
  Downsample half_down(frame, net, half_grad, image, strip), quarter_down(frame, net, quarter_grad, image, strip);
  ScaleBackward scale(frame, net, layout, 0, grad_x != nullptr, sums);
  const Rows mixed_grad(frame, 3, mid, full), result(frame, 1, net.in, full);
  float* activated = take_block(frame, wide);
  float* slope = take_block(frame, wide);
  float* grad_blocks = frame.take<float>((full.blocks * net.out + kLanes) * kBlock);
  const PixelMajor activated_pixels(frame, wide, full), grad_pixels(frame, net.out, full);
  const VectorSums out_bias(frame, net.out);
  int64_t next = begin;
  for (int64_t i = std::max<int64_t>(0, begin - 1); i < std::min(net.height, end + 1); ++i) {
    const bool own = i >= begin && i < end;
    hidden.advance(i + 1);
    if (own) {
      half.advance(net.row_source[1][i].high);
      quarter.advance(net.row_source[2][i].high);
      half_down.begin(net.row_source[1][i]);
      quarter_down.begin(net.row_source[2][i]);
    }
    pack_row(grad, i, grad_blocks);
    const Neighbours near(hidden.rows, i, full.height, zeros);
    for (int64_t b = 0; b < full.blocks; ++b) {
      const float* block = grad_blocks + b * net.out * kBlock;
      before_gelu(net, near, half, quarter, i, b, own, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
        if (own && sums) simd::store(activated + c * kBlock + v * kLanes, simd::gelu(z));
        simd::store(slope + c * kBlock + v * kLanes, simd::gelu_derivative(z));
      });
      float* row = mixed_grad[i] + b * kBlock;
      VecU inside[kVectors];  // lanes past the width stay zero
      for (int v = 0; v < kVectors; ++v) inside[v] = first_lanes(net.width - b * kBlock - v * kLanes);
      net.out_transposed[0].times(block, full.columns(b), [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
        simd::store(row + c * full.pitch + j, keep(inside[j / kLanes], g * simd::load(slope + c * kBlock + j)));
      });
      if (!own) continue;
      net.out_transposed[1].times(block, full.columns(b), [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
        half_down.add(c, b * kBlock + j, g * simd::load(slope + (mid + c) * kBlock + j));
      });
      net.out_transposed[2].times(block, full.columns(b), [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
        quarter_down.add(c, b * kBlock + j, g * simd::load(slope + (2 * mid + c) * kBlock + j));
      });
      if (!sums) continue;
      activated_pixels.set(b, activated);
      grad_pixels.set(b, block);
      for (int64_t c = 0; c < net.out; ++c)
        for (int64_t j = 0; j < full.columns(b); j += kLanes) out_bias.sums[c] += simd::load(block + c * kBlock + j);
    }
    if (own && sums) add_product(grad_pixels, activated_pixels, net.width, sums + layout.out_weight, layout.out_pitch);
    for (; next < end && (next < i || i == net.height - 1); ++next) {
      scale.row(hidden.rows, mixed_grad, next, hidden.blocks(next), result[0]);
      if (grad_x) store_row(result[0], full.pitch, *grad_x, next);
    }
  }
  half_down.finish();
  quarter_down.finish();
  scale.finish();
  if (sums) out_bias.finish(sums + layout.out_bias);
}

// image[row i] += half + quarter, each sample for all its pixels.
template <class T>
void add_low_row(const Image<T>& image, int64_t i, const float* half, int64_t half_pitch, const float* quarter, int64_t quarter_pitch) {
  T* row = image.row(i);
  if (!image.dense()) {
    for (int64_t j = 0; j < image.width; ++j)
      for (int64_t c = 0; c < image.channels; ++c) {
        T& pixel = row[c * image.strides.c + j * image.strides.w];
        pixel = static_cast<T>(static_cast<float>(pixel) + half[c * half_pitch + j / 2] + quarter[c * quarter_pitch + j / 4]);
      }
    return;
  }
  VecU twice, four_times;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    twice[lane] = lane / 2;
    four_times[lane] = lane / 4;
  }
  for (int64_t c = 0; c < image.channels; ++c, row += image.strides.c, half += half_pitch, quarter += quarter_pitch)
    for (int64_t j = 0; j < image.width; j += kLanes) {
      const VecF low = simd::permute(simd::load(half + j / 2), twice) + simd::permute(simd::load(quarter + j / 4), four_times);
      store_part(row + j, load_part(row + j, image.width - j) + low, image.width - j);
    }
}

// Second pass over a strip: from the gradients of the low-resolution maps to the input and the parameters.
template <class T>
void backward_low_strip(
    const Net& net, const Layout& layout, const Image<const T>& x, const Image<T>* grad_x, const LowGradients& half_grad,
    const LowGradients& quarter_grad, int64_t image, int64_t strip, float* sums) {
  Frame frame;
  const int64_t begin = strip * net.rows_per_strip(), end = std::min(net.height, begin + net.rows_per_strip());
  struct Scale {
    const LowGradients& low;
    const int64_t factor, height;
    Hidden<T> hidden;
    const Rows grad, result;
    ScaleBackward backward;
    int64_t next, next_grad;

    Scale(Frame& frame, const Net& net, const Layout& layout, const Image<const T>& x, const LowGradients& gradients, bool need_x,
          int64_t begin, float* sums)
        : low(gradients), factor(kFactor[low.scale]), height(net.grid[low.scale].height),
          hidden(frame, net, low.scale, x, begin / factor - 1, 3, 3), grad(frame, 3, net.mid, net.grid[low.scale]),
          result(frame, 2, net.in, net.grid[low.scale]), backward(frame, net, layout, low.scale, need_x, sums), next(begin / factor),
          next_grad(std::max<int64_t>(0, next - 1)) {}

    void advance(int64_t image, int64_t last) {
      for (; next <= last; ++next) {
        hidden.advance(next + 1);
        for (; next_grad <= std::min(next + 1, height - 1); ++next_grad) low.gather(image, next_grad, grad[next_grad] - kLanes);
        backward.row(hidden.rows, grad, next, hidden.blocks(next), result[next]);
      }
    }
  };
  Scale half(frame, net, layout, x, half_grad, grad_x != nullptr, begin, sums);
  Scale quarter(frame, net, layout, x, quarter_grad, grad_x != nullptr, begin, sums);
  for (int64_t i = begin; i < end; ++i) {
    half.advance(image, i / half.factor);
    quarter.advance(image, i / quarter.factor);
    if (grad_x)
      add_low_row(
          *grad_x, i, half.result[i / half.factor], half.result.pitch, quarter.result[i / quarter.factor], quarter.result.pitch);
  }
  half.backward.finish();
  quarter.backward.finish();
}

// Runs work(task, sums) in parallel with `count` zeroed floats a task (none for count 0) and adds them to `totals` in task order.
template <class Work>
void sum_over_tasks(int64_t tasks, int64_t count, double* totals, Work&& work) {
  Frame frame;
  float* sums = frame.take<float>(tasks * count);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      std::fill_n(sums + task * count, count, 0.0f);
      work(task, count ? sums + task * count : nullptr);
    }
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < count; ++i) totals[i] += sums[task * count + i];
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients multiscale_ffn_backward(
    const Tensor& grad, const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& dw_weight1,
    const Tensor& dw_bias1, const Tensor& dw_weight2, const Tensor& dw_bias2, const Tensor& dw_weight4, const Tensor& dw_bias4,
    const Tensor& out_weight, const Tensor& out_bias, bool need_x, bool need_params) {
  const std::array<Tensor, 2 * kScales> dw = {dw_weight1, dw_bias1, dw_weight2, dw_bias2, dw_weight4, dw_bias4};
  const Net net(x, in_weight, in_bias, dw, out_weight, out_bias, true);
  const Layout layout(net);
  Tensor grad_x = need_x ? tensor::empty(x, {net.batch, net.in, net.height, net.width}, tensor::is_channels_last(x))
                         : tensor::empty(x, {0});
  std::vector<double> totals(layout.size);
  dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t strips = net.strips();
    int64_t image_bytes = 0;
    for (int s = 1; s < kScales; ++s)
      image_bytes += sizeof(float) * strips * LowGradients::capacity_of(net, s) * net.mid * net.grid[s].pitch;
    const int64_t group = std::max<int64_t>(1, kGroupBytes / image_bytes);
    for (int64_t start = 0; start < net.batch; start += group) {
      const int64_t images = std::min(group, net.batch - start);
      Frame frame;
      const LowGradients half(frame, net, 1, images), quarter(frame, net, 2, images);
      auto with_image = [&](int64_t task, auto&& work) {
        const int64_t b = start + task / strips;
        if (need_x) {
          const Image<T> image = output<T>(grad_x, b);
          work(input<T>(x, b), &image, b);
        } else {
          work(input<T>(x, b), static_cast<const Image<T>*>(nullptr), b);
        }
      };
      sum_over_tasks(images * strips, need_params ? layout.second : 0, totals.data(), [&](int64_t task, float* sums) {
        with_image(task, [&](const Image<const T>& image, const Image<T>* grad_image, int64_t b) {
          backward_strip(
              net, layout, image, input<T>(grad, b), grad_image, half, quarter, task / strips, task % strips, sums);
        });
      });
      sum_over_tasks(
          images * strips, need_params ? layout.size - layout.second : 0, totals.data() + layout.second,
          [&](int64_t task, float* sums) {
            with_image(task, [&](const Image<const T>& image, const Image<T>* grad_image, int64_t) {
              backward_low_strip(
                  net, layout, image, grad_image, half, quarter, task / strips, task % strips, sums ? sums - layout.second : sums);
            });
          });
    }
  });
  if (!need_params) {
    auto none = [](const Tensor& t) { return tensor::empty(t, {0}); };
    return {grad_x,     none(in_weight), none(in_bias), none(dw[0]),      none(dw[1]),    none(dw[2]),
            none(dw[3]), none(dw[4]),     none(dw[5]),   none(out_weight), none(out_bias)};
  }
  std::vector<double> in_w, in_b, out_w, taps[kScales], biases[kScales];
  for (int s = 0; s < kScales; ++s)
    for (int64_t c = 0; c < net.mid; ++c) {
      const double* row = totals.data() + layout.in_weight[s] + c * layout.in_pitch;
      in_w.insert(in_w.end(), row, row + net.in);
      in_b.push_back(totals[layout.in_bias[s] + c]);
      const double* sums = totals.data() + layout.dw[s] + c * (kTaps + 1);
      taps[s].insert(taps[s].end(), sums, sums + kTaps);
      biases[s].push_back(sums[kTaps]);
    }
  for (int64_t e = 0; e < net.out; ++e) {
    const double* row = totals.data() + layout.out_weight + e * layout.out_pitch;
    out_w.insert(out_w.end(), row, row + kScales * net.mid);
  }
  auto dw_grad = [&](int i) { return tensor::write(dw[i], (i % 2 ? biases : taps)[i / 2].data()); };
  return {grad_x,
          tensor::write(in_weight, in_w.data()),
          tensor::write(in_bias, in_b.data()),
          dw_grad(0),
          dw_grad(1),
          dw_grad(2),
          dw_grad(3),
          dw_grad(4),
          dw_grad(5),
          tensor::write(out_weight, out_w.data()),
          tensor::write(out_bias, totals.data() + layout.out_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def(
      "multiscale_ffn(Tensor x, Tensor in_weight, Tensor in_bias, Tensor dw_weight1, Tensor dw_bias1, Tensor dw_weight2, Tensor dw_bias2,"
      " Tensor dw_weight4, Tensor dw_bias4, Tensor out_weight, Tensor out_bias, Tensor? residual) -> Tensor");
  m.def(
      "multiscale_ffn_backward(Tensor grad, Tensor x, Tensor in_weight, Tensor in_bias, Tensor dw_weight1, Tensor dw_bias1,"
      " Tensor dw_weight2, Tensor dw_bias2, Tensor dw_weight4, Tensor dw_bias4, Tensor out_weight, Tensor out_bias, bool need_x,"
      " bool need_params) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("multiscale_ffn", TORCH_BOX(&multiscale_ffn));
  m.impl("multiscale_ffn_backward", TORCH_BOX(&multiscale_ffn_backward));
}
