// Multi-scale feed-forward network, streamed by rows. Average pooling commutes with the first 1x1 convolution, so for
// the scales 2 and 4 the input is pooled and then convolved. A task owns a strip of rows; it keeps a few rows of each
// stage in rings and computes the rows that it shares with its neighbours' strips again. All arithmetic is float.
//
// Two layouts: "planar" rows [channel][pitch] with zeros before column 0 and after the last, for stencils; and "blocks"
// [block][channel][kBlock] of pixels, for matrix products.
//
// The backward pass recomputes the forward and takes two passes over the strips: the first has every full-resolution
// gradient and the gradient of each low-resolution map (strip by strip, boundary rows in parts); the second takes those
// to the input and the weights.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "gemm.h"
#include "tensor.h"

namespace multiscale_ffn {

using simd::VecF;
using simd::VecU;
using tensor::Tensor;

constexpr int64_t kLanes = simd::kFloats;
constexpr int kVectors = 2;
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int kScales = 3;
constexpr int64_t kFactor[kScales] = {1, 2, 4};
constexpr int64_t kRowsPerTask = 32;
constexpr int kTaps = 9;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
      : factor(f), height(divide_up(image_height, f)), width(divide_up(image_width, f)),
        blocks(divide_up(width, kBlock)), pitch(blocks * kBlock + 2 * kLanes),
        last_rows(image_height - (height - 1) * f), inverse(blocks * kBlock, 1.0f / f) {
    inverse[width - 1] = 1.0f / (image_width - (width - 1) * f);
  }
  int64_t rows_of(int64_t u) const { return u == height - 1 ? last_rows : factor; }
  int64_t columns(int64_t block) const { return std::min(kBlock, width - block * kBlock); }
};

// Bilinear interpolation of one axis, align_corners=False: output i is low_weight * source[low] + high_weight *
// source[high].
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
    VecU reached;  // which of the kLanes samples from `base` receive anything
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
    for (size_t i = 0; i < received.size(); ++i) {
      if (received[i].empty()) continue;
      windows[i / kLanes].reached[i % kLanes] = ~0u;
      for (int64_t tap = 0; tap < taps; ++tap) {
        // What is left over weighs nothing and reads a sample that counts anyway: NaN must not come from another.
        const bool counts = tap < static_cast<int64_t>(received[i].size());
        Tap& t = adjoint[i / kLanes * taps + tap];
        t.lane[i % kLanes] = received[i][counts ? tap : 0].first;
        t.weight[i % kLanes] = counts ? received[i][tap].second : 0.0f;
      }
    }
  }
};

// The network: sizes, interpolation, the weights of the stencils.
struct Net {
  int64_t batch, in, mid, out, height, width;
  std::vector<Grid> grid;
  std::vector<std::vector<Source>> row_source;
  std::vector<ColumnMap> column_map;  // of the scales 2 and 4: [scale - 1]
  std::vector<float> in_bias, taps[kScales], dw_bias[kScales], out_bias;
  std::vector<float> flipped[kScales];  // for the backward pass

  Net(const Tensor& x, const Tensor& in_w, const Tensor& in_b, const std::array<Tensor, 2 * kScales>& dw,
      const Tensor& out_w, const Tensor& out_b)
      : batch(x.size(0)), in(x.size(1)), mid(in_w.size(0) / kScales), out(out_w.size(0)), height(x.size(2)),
        width(x.size(3)), in_bias(tensor::read<float>(in_b)), out_bias(tensor::read<float>(out_b)) {
    for (int s = 0; s < kScales; ++s) {
      grid.emplace_back(kFactor[s], height, width);
      taps[s] = tensor::read<float>(dw[2 * s]);
      dw_bias[s] = tensor::read<float>(dw[2 * s + 1]);
      row_source.emplace_back();
      for (int64_t i = 0; i < height; ++i) row_source[s].emplace_back(i, grid[s].height, height);
      if (s > 0) column_map.emplace_back(grid[s], grid[0]);
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

// With the weights of the 1x1 convolutions, in the form M that products take; `backward`: their transposes too.
template <class M>
struct NetOf : Net {
  gemm::Matrix<M> in_weight[kScales], out_weight, in_transposed[kScales], out_transposed[kScales];

  NetOf(Net net, const Tensor& in_w, const Tensor& out_w, bool backward) : Net(std::move(net)) {
    using Matrix = gemm::Matrix<M>;
    const auto first = tensor::read<float>(in_w), last = tensor::read<float>(out_w);
    const int64_t hidden = kScales * mid;
    out_weight = Matrix(out, hidden, [&](int64_t i, int64_t j) { return last[i * hidden + j]; });
    for (int s = 0; s < kScales; ++s) {
      in_weight[s] = Matrix(mid, in, [&](int64_t i, int64_t j) { return first[(s * mid + i) * in + j]; });
      if (!backward) continue;
      in_transposed[s] = Matrix(in, mid, [&](int64_t i, int64_t j) { return first[(s * mid + j) * in + i]; });
      out_transposed[s] = Matrix(mid, out, [&](int64_t i, int64_t j) { return last[j * hidden + s * mid + i]; });
    }
  }
};

}  // namespace multiscale_ffn
