// The Fourier branch between its two transforms. The work goes by tiles of frequencies (spectrum.h), held as rows of real parts and
// rows of imaginary parts.
//
// A tile's input rows are, for each part r (real, imaginary), the channels and one more row: 1 (r = 0), or 1 in the zero frequency
// and else 0 (r = 1). With s for such a column, `matrix` (2, 2, C, 2, D + 1) gives the pre-activations (gate, value) of all output
// parts and channels, y = sigmoid(matrix[0] s) gelu(matrix[1] s), and the output is out_weight y, or y where that is empty.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "gelu.h"
#include "gemm.h"
#include "spectrum.h"
#include "tensor.h"

namespace {

using gemm::kRows;
using simd::kFloats;
using simd::VecF;
using tensor::Tensor;

constexpr int64_t kTile = 192;
constexpr int64_t kTilesPerFlush = 4;  // float sums stay this short before they are added up in double
constexpr int64_t kMaxTasks = 16, kMaxPartialBytes = int64_t{1} << 24;
constexpr int kHalf = kRows / 2;
constexpr int64_t kGroup = std::max<int64_t>(kRows, kFloats);

template <class T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  const int64_t bytes = gemm::round_up(count * sizeof(T), 64);
  if (bytes > capacity) {
    memory.reset();
    memory.reset(std::aligned_alloc(64, bytes));
    STD_TORCH_CHECK(memory != nullptr, "fourier_mix: out of memory for ", bytes, " bytes");
    capacity = bytes;
  }
  return static_cast<T*>(memory.get());
}

// Cuts a workspace into buffers: first with no memory to count, then with it.
struct Cutter {
  float* base = nullptr;
  int64_t used = 0;
  float* take(int64_t count) {
    float* p = base ? base + used : nullptr;
    used += gemm::round_up(count, 16);
    return p;
  }
};
template <class Buffers>
Buffers buffers(int64_t a, int64_t b = 0, int64_t c = 0) {
  Cutter cutter;
  Buffers(cutter, a, b, c);
  cutter = {scratch<float>(cutter.used)};
  return Buffers(cutter, a, b, c);
}
int64_t rows(int64_t count) { return gemm::round_up(count, kGroup) * kTile; }  // what `transpose` may read
int64_t vectors(int64_t count) { return gemm::round_up(count, kFloats); }

// The tiles of a batch of spectra of (height, width) images.
struct Spectra : spectrum::Layout {
  int64_t batch;
  std::vector<spectrum::Tile> tiles;
  Spectra(const Tensor& spectra, int64_t height, int64_t width) : Layout(height, width), batch(spectra.size(0)), tiles(Layout::tiles(kTile)) {
    STD_TORCH_CHECK(spectra.size(2) == blocks, "a spectrum of ", height, " x ", width, " has ", blocks, " blocks, got ", spectra.size(2));
  }
  int64_t count() const { return batch * static_cast<int64_t>(tiles.size()); }
  Tensor empty(const Tensor& like, int64_t channels) const {
    return tensor::empty(like, {batch, channels, blocks, 2, spectrum::kLanes});
  }
};

struct Tile : spectrum::Tile {
  int64_t image, count;
  bool nyquist;
  Tile(const Spectra& g, int64_t index)
      : spectrum::Tile(g.tiles[index % g.tiles.size()]), image(index / g.tiles.size()), count(blocks * lanes), nyquist(first >= g.nyquist) {}
  bool zero_frequency() const { return first == 0; }
};

const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Real parts of the channels to rows from `tile`, imaginary parts to rows from `tile + part * kTile`; zeros up to a whole vector.
void load(const Spectra& g, const Tile& t, const float* spectra, int64_t channels, int64_t part, float* tile) {
  for (int64_t c = 0; c < channels; ++c) {
    const float* in = spectra + ((t.image * channels + c) * g.blocks + t.first) * spectrum::kBlock;
    float *re = tile + c * kTile, *im = re + part * kTile;
    for (int64_t i = 0; i < t.count; i += t.lanes, in += spectrum::kBlock) {
      // The next tile's: the channels are too many for the processor to see that they will be read.
      __builtin_prefetch(in + 2 * kTile);
      __builtin_prefetch(in + 2 * kTile + kFloats);
      simd::store(re + i, simd::load(in));
      simd::store(im + i, simd::load(in + kFloats));
    }
    for (int64_t i = t.count; i < vectors(t.count); ++i) re[i] = im[i] = 0;
  }
}

void store(const Spectra& g, const Tile& t, const float* tile, int64_t channels, float* spectra) {
  for (int64_t c = 0; c < channels; ++c) {
    float* out = spectra + ((t.image * channels + c) * g.blocks + t.first) * spectrum::kBlock;
    const float *re = tile + c * kTile, *im = re + channels * kTile;
    for (int64_t i = 0; i < t.count; i += t.lanes, out += spectrum::kBlock) {
      simd::store(out, simd::load(re + i));
      simd::store(out + kFloats, simd::load(im + i));
    }
  }
}

// The tile's input rows with the constant row and the row of the zero frequency.
void load_mixed(const Spectra& g, const Tile& t, const float* spectra, int64_t channels, float* tile) {
  load(g, t, spectra, channels, channels + 1, tile);
  float *constant = tile + channels * kTile, *zero_frequency = constant + (channels + 1) * kTile;
  for (int64_t i = 0; i < kTile; ++i) {
    constant[i] = i < t.count;
    zero_frequency[i] = i == 0 && t.zero_frequency();
  }
}

// The tile's input rows without the zero frequency; both further rows are 1 elsewhere.
void load_centred(const Spectra& g, const Tile& t, const float* spectra, int64_t channels, float* tile) {
  load(g, t, spectra, channels, channels + 1, tile);
  for (int r = 0; r < 2; ++r) {
    float* part = tile + r * (channels + 1) * kTile;
    for (int64_t i = 0; i < kTile; ++i) part[channels * kTile + i] = i < t.count;
    if (t.zero_frequency())
      for (int64_t c = 0; c <= channels; ++c) part[c * kTile] = 0;
  }
}

// How often each frequency of the half spectrum counts in the whole one, and the inverse.
void multiplicity(const Spectra& g, const Tile& t, float* alpha, float* inverse) {
  std::fill(alpha, alpha + kTile, t.nyquist ? 1.0f : 2.0f);
  std::fill(inverse, inverse + kTile, t.nyquist ? 1.0f : 0.5f);
  for (int64_t i = 0; i < t.blocks && t.first + i < g.height; ++i) alpha[i * t.lanes] = inverse[i * t.lanes] = 1;
}

// The two factors of the gate share their register blocks: kHalf rows of the gate, then the same rows of the value.
struct Gate {
  int64_t outputs, inputs;  // rows of y (2 C), rows of a tile (2 (D + 1))
  std::vector<float> panels;
  explicit Gate(const Tensor& matrix)
      : outputs(matrix.size(0) / 2), inputs(matrix.size(1)), panels((outputs + kHalf - 1) / kHalf * kRows * inputs) {
    const float* m = data(matrix);
    float* out = panels.data();
    for (int64_t first = 0; first < outputs; first += kHalf)
      for (int64_t j = 0; j < inputs; ++j)
        for (int64_t i = 0; i < kRows; ++i, ++out) {
          const int64_t row = first + i % kHalf;
          *out = row < outputs ? m[(i / kHalf * outputs + row) * inputs + j] : 0;
        }
  }

  // use(offset, gate, value): a vector of the pre-activations, at `offset` of y's rows.
  template <class Use>
  void apply(int64_t count, const float* tile, Use&& use) const {
    gemm::multiply((outputs + kHalf - 1) / kHalf * kRows, count, inputs, panels.data(), kRows * inputs, kRows, tile, kTile,
                   [&](int64_t row, int64_t column, auto& sum) __attribute__((always_inline)) {
                     constexpr int n = sizeof(sum[0]) / sizeof(VecF);
                     for (int i = 0; i < kHalf && row / 2 + i < outputs; ++i)
                       for (int v = 0; v < n; ++v) use((row / 2 + i) * kTile + column + v * kFloats, sum[i][v], sum[kHalf + i][v]);
                   });
  }
};

// A matrix on tiles, applied to each part's rows or to all.
struct Linear {
  int64_t m, k;
  std::vector<float> panels;
  template <class At>
  Linear(int64_t m, int64_t k, At&& at) : m(m), k(k), panels(gemm::packed_size(m, k)) {
    gemm::pack(m, k, panels.data(), at);
  }
  template <class Use>
  void apply(int64_t count, const float* tile, Use&& use) const {
    gemm::multiply(m, count, k, panels.data(), kRows * k, kRows, tile, kTile, use);
  }
  void apply(int64_t count, const float* tile, float* out) const { apply(count, tile, gemm::into<false>(out, kTile, m)); }
};

// sum += left right^T over the tile's columns; `right` comes transposed.
void accumulate(
    int64_t count, int64_t m, const float* left, int64_t n, const float* right, int64_t ldright, float* group, float* sum, int64_t ldsum) {
  for (int64_t i = 0; i < m; i += kGroup) {
    gemm::transpose(kGroup, count, left + i * kTile, kTile, group, kGroup);
    const int64_t left_over = std::min(kGroup, m - i);
    gemm::multiply(left_over, n, count, group, kRows, kGroup, right, ldright, gemm::into<true>(sum + i * ldsum, ldsum, left_over));
  }
}

// Runs task(first tile, last tile, totals) for stretches of tiles that depend on the shape only; the sum of their totals in order.
template <class Task>
std::vector<double> reduce(int64_t tiles, int64_t size, Task&& task) {
  const int64_t most = std::clamp<int64_t>(kMaxPartialBytes / (size * 8), 1, kMaxTasks);
  const int64_t tasks = std::clamp<int64_t>((tiles + kTilesPerFlush - 1) / kTilesPerFlush, 1, most);
  std::vector<double> partial(tasks * size);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i * tiles / tasks, (i + 1) * tiles / tasks, partial.data() + i * size);
  });
  for (int64_t i = 1; i < tasks; ++i)
    for (int64_t j = 0; j < size; ++j) partial[j] += partial[i * size + j];
  partial.resize(size);
  return partial;
}

// totals += sums (m x n in rows of ld), and sums = 0.
void flush(int64_t m, int64_t n, float* sums, int64_t ld, double* totals, int64_t ldtotals) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      totals[i * ldtotals + j] += sums[i * ld + j];
      sums[i * ld + j] = 0;
    }
}

// sums[i * kFloats ...] += the tile's rows, vector by vector; `flush_rows` adds up the lanes.
void add_rows(int64_t count, int64_t m, const float* tile, float* sums) {
  for (int64_t row = 0; row < m; ++row) {
    VecF sum = simd::load(sums + row * kFloats);
    for (int64_t i = 0; i < count; i += kFloats) sum += simd::load(tile + row * kTile + i);
    simd::store(sums + row * kFloats, sum);
  }
}
void flush_rows(int64_t m, float* sums, double* totals, int64_t ldtotals) {
  for (int64_t row = 0; row < m; ++row)
    for (int64_t i = 0; i < kFloats; ++i) {
      totals[row * ldtotals] += sums[row * kFloats + i];
      sums[row * kFloats + i] = 0;
    }
}

// The tile's channels, both parts side by side, by frequency. Whole vectors are written, the second part's over the first's excess.
void transpose_parts(int64_t count, int64_t channels, const float* tile, float* out, int64_t ld) {
  for (int r = 0; r < 2; ++r)
    gemm::transpose(channels, count, tile + r * (channels + 1) * kTile, kTile, out + r * channels, ld);
}

Tensor to_tensor(const Tensor& like, std::initializer_list<int64_t> size, const double* values) {
  Tensor out = tensor::empty(like, size, false, tensor::ScalarType::Double);
  std::copy(values, values + out.numel(), static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

struct MixBuffers {
  float *in, *y, *out;
  MixBuffers(Cutter& c, int64_t inputs, int64_t outputs, int64_t channels)
      : in(c.take(inputs * kTile)), y(c.take(outputs * kTile)), out(c.take(2 * channels * kTile)) {}
};

Tensor spectrum_mix(const Tensor& spectrum, const Tensor& matrix, const Tensor& out_weight, int64_t height, int64_t width) {
  const Spectra g(spectrum, height, width);
  const bool has_last = out_weight.numel() > 0;
  const int64_t d = spectrum.size(1), c = matrix.size(0) / 4, e = has_last ? out_weight.size(0) : c;
  const Gate gate(matrix);
  const float* w = data(out_weight);
  const Linear last(has_last ? e : 0, c, [&](int64_t i, int64_t j) { return w[i * c + j]; });
  Tensor mixed = g.empty(spectrum, e);
  float* result = static_cast<float*>(mixed.mutable_data_ptr());
  torch::stable::parallel_for(0, g.count(), 1, [&](int64_t begin, int64_t end) {
    const auto m = buffers<MixBuffers>(gate.inputs, gate.outputs, has_last ? e : 0);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_mixed(g, t, data(spectrum), d, m.in);
      gate.apply(t.count, m.in, [&](int64_t at, VecF a, VecF v) __attribute__((always_inline)) {
        simd::store(m.y + at, simd::sigmoid(a) * simd::gelu(v));
      });
      if (has_last)
        for (int r = 0; r < 2; ++r) last.apply(t.count, m.y + r * c * kTile, m.out + r * e * kTile);
      store(g, t, has_last ? m.out : m.y, e, result);
    }
  });
  return mixed;
}

struct BackwardBuffers {
  float *in, *grad, *y, *grad_y, *grad_pre, *grad_in, *in_t, *y_t, *group, *alpha, *inverse, *matrix, *constants, *out_weight;
  BackwardBuffers(Cutter& k, int64_t d, int64_t c, int64_t e)
      : in(k.take(rows(2 * d + 2) + kGroup * kTile)), grad(k.take(rows(2 * e) + kGroup * kTile)), y(k.take(rows(2 * c) + kGroup * kTile)),
        grad_y(k.take(2 * c * kTile)), grad_pre(k.take(rows(4 * c))), grad_in(k.take(2 * d * kTile)),
        in_t(k.take(kTile * (vectors(2 * d) + kFloats))), y_t(k.take(kTile * vectors(c))), group(k.take(kTile * kGroup)),
        alpha(k.take(kTile)), inverse(k.take(kTile)), matrix(k.take(4 * c * vectors(2 * d))), constants(k.take(4 * c * kFloats)), out_weight(k.take(e * vectors(c))) {}
};

std::tuple<Tensor, Tensor, Tensor> spectrum_mix_backward(
    const Tensor& grad, const Tensor& spectrum, const Tensor& matrix, const Tensor& out_weight, int64_t height, int64_t width,
    bool need_spectrum, bool need_parameters) {
  const Spectra g(spectrum, height, width);
  const bool has_last = out_weight.numel() > 0;
  const int64_t d = spectrum.size(1), c = matrix.size(0) / 4, e = has_last ? out_weight.size(0) : c, n = 2 * d + 2;
  const Gate gate(matrix);
  const float *w = data(out_weight), *mx = data(matrix);
  const Linear last_t(has_last ? c : 0, e, [&](int64_t i, int64_t j) { return w[j * c + i]; });
  const Linear matrix_t(2 * d, 4 * c, [&](int64_t i, int64_t j) { return mx[j * n + i + i / d]; });
  Tensor grad_spectrum = need_spectrum ? g.empty(spectrum, d) : tensor::empty(spectrum, {0});
  float* result = static_cast<float*>(grad_spectrum.mutable_data_ptr());

  const auto totals = reduce(g.count(), 4 * c * n + e * c, [&](int64_t begin, int64_t end, double* total) {
    const auto m = buffers<BackwardBuffers>(d, c, e);
    const int64_t ld = vectors(2 * d), ld_in = ld + kFloats;
    std::fill(m.matrix, m.matrix + 4 * c * ld, 0.0f);
    std::fill(m.constants, m.constants + 4 * c * kFloats, 0.0f);
    std::fill(m.out_weight, m.out_weight + e * vectors(c), 0.0f);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_mixed(g, t, data(spectrum), d, m.in);
      load(g, t, data(grad), e, e, m.grad);
      multiplicity(g, t, m.alpha, m.inverse);
      for (int64_t row = 0; row < 2 * e; ++row)
        for (int64_t i = 0; i < kTile; i += kFloats) {
          float* p = m.grad + row * kTile + i;
          simd::store(p, simd::load(p) * simd::load(m.alpha + i));
        }
      if (has_last)
        for (int r = 0; r < 2; ++r) last_t.apply(t.count, m.grad + r * e * kTile, m.grad_y + r * c * kTile);
      const float* const grad_product = has_last ? m.grad_y : m.grad;
      float* const grad_value = m.grad_pre + 2 * c * kTile;
      gate.apply(t.count, m.in, [&](int64_t at, VecF a, VecF v) __attribute__((always_inline)) {
        const VecF s = simd::sigmoid(a), u = simd::gelu(v), grad_y = simd::load(grad_product + at);
        simd::store(m.y + at, s * u);
        simd::store(m.grad_pre + at, grad_y * u * (s * (1.0f - s)));
        simd::store(grad_value + at, grad_y * s * simd::gelu_derivative(v));
      });
      if (need_spectrum) {
        matrix_t.apply(t.count, m.grad_pre, [&](int64_t row, int64_t column, auto& sum) __attribute__((always_inline)) {
          constexpr int vs = sizeof(sum[0]) / sizeof(VecF);
          for (int i = 0; i < kRows && row + i < 2 * d; ++i)
            for (int v = 0; v < vs; ++v) {
              const int64_t at = column + v * kFloats;
              simd::store(m.grad_in + (row + i) * kTile + at, sum[i][v] * simd::load(m.inverse + at));
            }
        });
        store(g, t, m.grad_in, d, result);
      }
      if (need_parameters) {
        transpose_parts(t.count, d, m.in, m.in_t, ld_in);
        accumulate(t.count, 4 * c, m.grad_pre, 2 * d, m.in_t, ld_in, m.group, m.matrix, ld);
        add_rows(t.count, 4 * c, m.grad_pre, m.constants);
        if (t.zero_frequency())
          for (int64_t row = 0; row < 4 * c; ++row) total[row * n + n - 1] += m.grad_pre[row * kTile];
        for (int r = 0; has_last && r < 2; ++r) {
          gemm::transpose(c, t.count, m.y + r * c * kTile, kTile, m.y_t, vectors(c));
          accumulate(t.count, e, m.grad + r * e * kTile, c, m.y_t, vectors(c), m.group, m.out_weight, vectors(c));
        }
        if (index + 1 == end || (index - begin) % kTilesPerFlush == kTilesPerFlush - 1) {
          for (int r = 0; r < 2; ++r) flush(4 * c, d, m.matrix + r * d, ld, total + r * (d + 1), n);
          flush_rows(4 * c, m.constants, total + d, n);
          flush(e, c, m.out_weight, vectors(c), total + 4 * c * n, c);
        }
      }
    }
  });
  return {grad_spectrum, to_tensor(spectrum, {4 * c, n}, totals.data()),
          to_tensor(spectrum, {has_last ? e : 0, c}, totals.data() + 4 * c * n)};
}

struct MomentBuffers {
  float *in, *in_t, *group, *products, *sums;
  MomentBuffers(Cutter& k, int64_t d, int64_t, int64_t)
      : in(k.take(rows(2 * d + 2) + kGroup * kTile)), in_t(k.take(kTile * (vectors(2 * d) + kFloats))),
        group(k.take(kTile * kGroup)), products(k.take(2 * d * vectors(d))), sums(k.take(2 * d * kFloats)) {}
};

// Over all frequencies but zero: of each part, the channels' products with each other, and in the last column their sums.
Tensor spectrum_moments(const Tensor& spectrum, int64_t height, int64_t width) {
  const Spectra g(spectrum, height, width);
  const int64_t d = spectrum.size(1), n = d + 1, ld = vectors(d), ld_in = vectors(2 * d) + kFloats;
  const auto totals = reduce(g.count(), 2 * d * n, [&](int64_t begin, int64_t end, double* total) {
    const auto m = buffers<MomentBuffers>(d);
    std::fill(m.products, m.products + 2 * d * ld, 0.0f);
    std::fill(m.sums, m.sums + 2 * d * kFloats, 0.0f);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_centred(g, t, data(spectrum), d, m.in);
      transpose_parts(t.count, d, m.in, m.in_t, ld_in);
      for (int r = 0; r < 2; ++r) {
        const float* part = m.in + r * n * kTile;
        accumulate(t.count, d, part, d, m.in_t + r * d, ld_in, m.group, m.products + r * d * ld, ld);
        add_rows(t.count, d, part, m.sums + r * d * kFloats);
      }
      if (index + 1 == end || (index - begin) % kTilesPerFlush == kTilesPerFlush - 1) {
        flush(2 * d, d, m.products, ld, total, n);
        flush_rows(2 * d, m.sums, total + d, n);
      }
    }
  });
  return to_tensor(spectrum, {2, d, n}, totals.data());
}

struct MomentGradBuffers {
  float *in, *grad, *alpha, *inverse;
  MomentGradBuffers(Cutter& k, int64_t d, int64_t, int64_t)
      : in(k.take((2 * d + 2) * kTile)), grad(k.take(2 * d * kTile)), alpha(k.take(kTile)), inverse(k.take(kTile)) {}
};

// The spectrum's gradient `grad` plus what comes through its moments.
Tensor spectrum_moments_backward(const Tensor& grad, const Tensor& spectrum, const Tensor& grad_moments, int64_t height, int64_t width) {
  const Spectra g(spectrum, height, width);
  const int64_t d = spectrum.size(1), n = d + 1;
  const double* q = static_cast<const double*>(grad_moments.const_data_ptr());
  std::vector<Linear> parts;
  for (int r = 0; r < 2; ++r)
    parts.emplace_back(d, n, [&](int64_t i, int64_t j) {
      const double* part = q + r * d * n;
      return static_cast<float>(part[i * n + j] + (j < d ? part[j * n + i] : 0.0));
    });
  Tensor out = g.empty(spectrum, d);
  float* result = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, g.count(), 1, [&](int64_t begin, int64_t end) {
    const auto m = buffers<MomentGradBuffers>(d);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_centred(g, t, data(spectrum), d, m.in);
      load(g, t, data(grad), d, d, m.grad);
      multiplicity(g, t, m.alpha, m.inverse);
      for (int r = 0; r < 2; ++r)
        parts[r].apply(t.count, m.in + r * n * kTile, [&](int64_t row, int64_t column, auto& sum) __attribute__((always_inline)) {
          constexpr int vs = sizeof(sum[0]) / sizeof(VecF);
          for (int i = 0; i < kRows && row + i < d; ++i)
            for (int v = 0; v < vs; ++v) {
              const int64_t at = column + v * kFloats;
              float* p = m.grad + (r * d + row + i) * kTile + at;
              simd::store(p, simd::load(p) + sum[i][v] * simd::load(m.inverse + at));
            }
        });
      store(g, t, m.grad, d, result);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("spectrum_mix(Tensor spectrum, Tensor matrix, Tensor out_weight, int height, int width) -> Tensor");
  m.def(
      "spectrum_mix_backward(Tensor grad, Tensor spectrum, Tensor matrix, Tensor out_weight, int height, int width,"
      " bool need_spectrum, bool need_parameters) -> (Tensor, Tensor, Tensor)");
  m.def("spectrum_moments(Tensor spectrum, int height, int width) -> Tensor");
  m.def("spectrum_moments_backward(Tensor grad, Tensor spectrum, Tensor grad_moments, int height, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("spectrum_mix", TORCH_BOX(&spectrum_mix));
  m.impl("spectrum_mix_backward", TORCH_BOX(&spectrum_mix_backward));
  m.impl("spectrum_moments", TORCH_BOX(&spectrum_moments));
  m.impl("spectrum_moments_backward", TORCH_BOX(&spectrum_moments_backward));
}
