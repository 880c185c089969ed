// How the spectra of real images lie in memory between the transforms: (B, C, blocks, 2, kFloats), blocks of kFloats
// frequencies, their real parts, then their imaginary parts; in bf16 (B, C, blocks, kFloats, 2), both parts side by
// side.
//
// The columns 0 ... (W + 1) / 2 - 1 of the half spectrum come in groups of kFloats: block (group * H + row) holds a
// row's. Then, for even W, come the blocks of Nyquist's column. What lies in lanes past the last column or row has no
// meaning.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace spectrum {

constexpr int64_t kLanes = simd::kFloats, kBlock = 2 * kLanes;  // floats of a block
// Elements of a block of floats or of pairs.
template <class S>
constexpr int64_t kElements = std::is_same_v<S, simd::Pair> ? kLanes : kBlock;

// Blocks in a row with the same number of lanes in use.
struct Tile {
  int64_t first, blocks, lanes;
  int64_t count() const { return blocks * lanes; }
};

struct HalfSpectrum {
  int64_t height, width, columns, groups, nyquist, blocks;  // columns in groups; the first block of Nyquist's column
  HalfSpectrum(int64_t height, int64_t width)
      : height(height), width(width), columns((width + 1) / 2), groups((columns + kLanes - 1) / kLanes),
        nyquist(groups * height), blocks(nyquist + (width % 2 ? 0 : (height + kLanes - 1) / kLanes)) {}

  // All blocks, by tiles of at most `most` frequencies, lanes past the last block's included.
  std::vector<Tile> tiles(int64_t most) const {
    std::vector<Tile> list;
    auto cut = [&](int64_t first, int64_t end, int64_t lanes) {
      if (lanes == 0) return;
      const int64_t step = (most - kLanes) / lanes + 1;
      for (; first < end; first += step) list.push_back({first, std::min(step, end - first), lanes});
    };
    const int64_t full = columns / kLanes * height;
    cut(0, full, kLanes);
    cut(full, nyquist, columns % kLanes);
    if (width % 2 == 0) {
      cut(nyquist, nyquist + height / kLanes, kLanes);
      cut(nyquist + height / kLanes, blocks, height % kLanes);
    }
    return list;
  }
};

}  // namespace spectrum
