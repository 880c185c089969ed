// The Fourier branch between its two transforms. The work goes by tiles of frequencies (spectrum.h), held as rows of
// real parts and rows of imaginary parts.
//
// A tile's input rows are, for each part r (real, imaginary), the channels and one more row: 1 (r = 0), or 1 in the
// zero frequency and else 0 (r = 1). With s for such a column, `matrix` (2, 2, C, 2, D + 1) gives the pre-activations
// (gate, value) of all output parts and channels, y = sigmoid(matrix[0] s) gelu(matrix[1] s), and the output is
// out_weight y, or y where there is none.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "accumulate.h"
#include "gather.h"
#include "gelu.h"
#include "gemm.h"
#include "pairs.h"
#include "scratch.h"
#include "spectrum.h"
#include "stages.h"
#include "tasks.h"

namespace fourier {

namespace {

using gemm::kRows;
using scratch::Frame;
using simd::kFloats;
using simd::Pair;
using simd::VecF;

constexpr int64_t kTile = 192;
constexpr int64_t kTilesPerFlush = 4;  // float sums stay this short before they are added up in double
constexpr int64_t kFewestTiles = 3;    // of a task that sums
constexpr int kHalf = kRows / 2;
constexpr int64_t kGroup = std::max<int64_t>(kRows, kFloats);

using Matrix = gemm::Matrix<float>;

int64_t rows(int64_t count) { return gemm::round_up(count, kGroup) * kTile; }  // what `transpose` may read
int64_t vectors(int64_t count) { return gemm::round_up(count, kFloats); }

// The tiles of a batch of spectra of (height, width) images.
struct Spectra : spectrum::HalfSpectrum {
  int64_t batch;
  std::vector<spectrum::Tile> tiles;
  Spectra(const Tensor& spectra, int64_t height, int64_t width)
      : HalfSpectrum(height, width), batch(spectra.size(0)), tiles(HalfSpectrum::tiles(kTile)) {
    STD_TORCH_CHECK(
        spectra.size(2) == blocks, "a spectrum of ", height, " x ", width, " has ", blocks, " blocks, got ",
        spectra.size(2));
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
      : spectrum::Tile(g.tiles[index % g.tiles.size()]), image(index / g.tiles.size()), count(blocks * lanes),
        nyquist(first >= g.nyquist) {}
  bool zero_frequency() const { return first == 0; }
};

const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Real parts of the channels to rows from `tile`, imaginary parts to rows from `tile + part * kTile`; zeros up to a
// whole vector.
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
template <class A>
struct Gate {
  int64_t outputs, depth;  // rows of y (2 C), rows of a tile
  std::vector<A> panels;
  // Row `row` of the factors, element j of the tile: at(row, j), row < outputs of the gate, else of the value.
  template <class At>
  Gate(int64_t outputs, int64_t depth, At&& at)
      : outputs(outputs), depth(depth), panels((outputs + kHalf - 1) / kHalf * kRows * depth) {
    A* out = panels.data();
    for (int64_t first = 0; first < outputs; first += kHalf)
      for (int64_t j = 0; j < depth; ++j)
        for (int64_t i = 0; i < kRows; ++i, ++out) {
          const int64_t row = first + i % kHalf;
          *out = row < outputs ? at(i / kHalf * outputs + row, j) : A{};
        }
  }

  // use(row, column, gate, value): rows row ... row + kHalf - 1 of both pre-activations, in vectors from `column`.
  template <class Use>
  void blocks(int64_t count, const A* tile, Use&& use) const {
    gemm::multiply(
        (outputs + kHalf - 1) / kHalf * kRows, count, depth, panels.data(), kRows * depth, kRows, tile, kTile,
        [&](int64_t row, int64_t column, auto& sum)
            __attribute__((always_inline)) { use(row / 2, column, &sum[0], &sum[kHalf]); });
  }
  // use(offset, gate, value): a vector of the pre-activations, at `offset` of y's rows.
  template <class Use>
  void apply(int64_t count, const A* tile, Use&& use) const {
    blocks(count, tile, [&](int64_t row, int64_t column, auto* gate, auto* value) __attribute__((always_inline)) {
      constexpr int n = sizeof(gate[0]) / sizeof(VecF);
      for (int i = 0; i < kHalf && row + i < outputs; ++i)
        for (int v = 0; v < n; ++v) use((row + i) * kTile + column + v * kFloats, gate[i][v], value[i][v]);
    });
  }
};

// Its row r is row order(r) of y, which has the real parts and then the imaginary ones. A row of pairs of the tile
// holds both parts of a channel.
template <class A, class Order>
Gate<A> gate_of(const Tensor& matrix, Order&& order) {
  const int64_t outputs = matrix.size(0) / 2, inputs = matrix.size(1);
  const float* m = data(matrix);
  return Gate<A>(outputs, gemm::depth<A>(inputs), [&](int64_t row, int64_t j) {
    const float* of_row = m + (row / outputs * outputs + order(row % outputs)) * inputs;
    if constexpr (std::is_same_v<A, Pair>)
      return simd::pair(of_row[j], of_row[inputs / 2 + j]);
    else
      return of_row[j];
  });
}
template <class A>
Gate<A> gate_of(const Tensor& matrix) {
  return gate_of<A>(matrix, [](int64_t row) { return row; });
}

// One output of the gate in double.
struct Gated {
  double gate, value, derivative;  // sigmoid and GELU, and the derivative of this
  Gated(const double* pre, int64_t i, int64_t outputs) {
    const double v = pre[outputs + i];
    const double below = 0.5 * std::erfc(-v * std::numbers::sqrt2 / 2);
    gate = 1 / (1 + std::exp(-pre[i]));
    value = v * below;
    derivative = below + v * std::exp(-v * v / 2) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
  }
  double product() const { return gate * value; }
};

// sum += left right^T over the tile's columns; `right` comes transposed.
template <class A>
void accumulate_product(
    int64_t count, int64_t m, const float* left, int64_t n, const A* right, int64_t ldright, A* group, float* sum,
    int64_t ldsum) {
  for (int64_t i = 0; i < m; i += kGroup) {
    gemm::transpose(kGroup, count, left + i * kTile, kTile, group, kGroup);
    const int64_t left_over = std::min(kGroup, m - i);
    gemm::multiply(
        left_over, n, gemm::depth<A>(count), group, kRows, kGroup, right, ldright,
        gemm::into<true>(sum + i * ldsum, ldsum, left_over));
  }
}

// Runs task(first tile, last tile, totals) for stretches of tiles; the sum of their totals.
template <class Task>
std::vector<double> reduce(int64_t tiles, int64_t size, Task&& task) {
  const int64_t count = tasks::parts(1, tiles, kFewestTiles, size);
  Frame frame;
  const tasks::Partial<> partial(frame, count, size);
  tasks::parallel(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const tasks::Range range = tasks::part(i, count, tiles);
      task(range.begin, range.end, partial.start(i));
    }
  });
  std::vector<double> totals(size);
  partial.add_to(totals.data());
  return totals;
}

void flush_rows(int64_t rows, VecF* sums, double* totals, int64_t step) {
  for (int64_t row = 0; row < rows; ++row) accumulate::flush(sums[row], totals[row * step]);
}

// The tile's channels, both parts side by side, by frequency. Whole vectors are written, the second part's over the
// first's excess.
template <class A>
void transpose_parts(int64_t count, int64_t channels, const float* tile, A* out, int64_t ld) {
  for (int r = 0; r < 2; ++r)
    gemm::transpose(channels, count, tile + r * (channels + 1) * kTile, kTile, out + r * channels, ld);
}

// Rows i and `second + i` as row i of pairs, i < count.
inline void pair_rows(int64_t count, const float* rows, int64_t step, int64_t second, Pair* out) {
  for (int64_t row = 0; row < count; ++row, rows += step * kTile, out += kTile)
    for (int64_t i = 0; i < kTile; i += kFloats)
      simd::store(out + i, simd::pair(simd::load(rows + i), simd::load(rows + second * kTile + i)));
}

// The last convolution's weight (E, C), or empty.
std::vector<float> last_weight(const std::optional<Tensor>& out_weight) {
  return out_weight ? tensor::read<float>(*out_weight) : std::vector<float>();
}

}  // namespace

Tensor spectrum_mix(
    const Tensor& spectrum, const Tensor& matrix, const Rows<double>& of_zero, const std::optional<Tensor>& out_weight,
    int64_t height, int64_t width) {
  const Spectra g(spectrum, height, width);
  const bool has_last = out_weight.has_value();
  const int64_t d = spectrum.size(1), c = matrix.size(0) / 4, e = has_last ? out_weight->size(0) : c;
  const Gate<float> gate = gate_of<float>(matrix);
  const auto w = last_weight(out_weight);
  const Matrix last(has_last ? e : 0, c, [&](int64_t i, int64_t j) { return w[i * c + j]; });
  Tensor mixed = g.empty(spectrum, e);
  float* result = static_cast<float*>(mixed.mutable_data_ptr());
  tasks::parallel(g.count(), 1, [&](int64_t begin, int64_t end) {
    Frame frame;
    float *in = frame.take<float>(gate.depth * kTile), *y = frame.take<float>(gate.outputs * kTile);
    float* out = frame.take<float>(2 * e * kTile);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_mixed(g, t, data(spectrum), d, in);
      gate.apply(t.count, in, [&](int64_t at, VecF a, VecF v) __attribute__((always_inline)) {
        simd::store(y + at, simd::sigmoid(a) * simd::gelu(v));
      });
      for (int64_t i = 0; t.zero_frequency() && i < gate.outputs; ++i)
        y[i * kTile] = static_cast<float>(Gated(of_zero[t.image], i, gate.outputs).product());
      for (int r = 0; has_last && r < 2; ++r)
        last.blocks(t.count, y + r * c * kTile, kTile, gemm::into<false>(out + r * e * kTile, kTile, e));
      store(g, t, has_last ? out : y, e, result);
    }
  });
  return mixed;
}

Spectrum spectrum_mix_bf16(
    const Spectrum& spectrum, const Tensor& matrix, const Rows<double>& of_zero, int64_t height, int64_t width) {
  const Spectra g(spectrum.values, height, width);
  const int64_t d = spectrum.values.size(1), c = matrix.size(0) / 4;
  // Both parts of a channel side by side.
  const Gate<Pair> gate = gate_of<Pair>(matrix, [=](int64_t row) { return row % 2 * c + row / 2; });
  const std::vector<int64_t> size{g.batch, c, g.blocks, kFloats, 2};
  Spectrum mixed{tensor::empty(spectrum.values, size), Rows<double>(g.batch, c)};
  const Pair* from = static_cast<const Pair*>(spectrum.values.const_data_ptr());
  Pair* to = static_cast<Pair*>(mixed.values.mutable_data_ptr());
  tasks::parallel(g.count(), 1, [&](int64_t begin, int64_t end) {
    Frame frame;
    Pair *in = frame.take<Pair>((d + 1) * kTile), *y = frame.take<Pair>(gemm::round_up(c, kHalf / 2) * kTile);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      auto block = [&](auto* spectra, int64_t channels, int64_t channel) {
        return spectra + ((t.image * channels + channel) * g.blocks + t.first) * kFloats;
      };
      for (int64_t channel = 0; channel < d; ++channel) {
        const Pair* stored = block(from, d, channel);
        Pair* row = in + channel * kTile;
        gather::prefetch(stored + t.blocks * kFloats, t.blocks * kFloats);
        for (int64_t i = 0; i < t.count; i += t.lanes, stored += kFloats) simd::store(row + i, simd::load(stored));
        for (int64_t i = t.count; i < vectors(t.count); ++i) row[i] = {};
      }
      for (int64_t i = 0; i < kTile; ++i) in[d * kTile + i] = simd::pair(i < t.count, i == 0 && t.zero_frequency());
      auto gated = [](VecF gate, VecF value) __attribute__((always_inline)) {
        return simd::sigmoid_of<simd::BFloat16>(gate) * simd::gelu_of<simd::BFloat16>(value);
      };
      gate.blocks(t.count, in, [&](int64_t row, int64_t column, auto* a, auto* v) __attribute__((always_inline)) {
        constexpr int n = sizeof(a[0]) / sizeof(VecF);
#pragma GCC unroll 2
        for (int i = 0; i < kHalf; i += 2)
#pragma GCC unroll 3
          for (int u = 0; u < n; ++u)
            simd::store(
                y + (row + i) / 2 * kTile + column + u * kFloats,
                simd::pair(gated(a[i][u], v[i][u]), gated(a[i + 1][u], v[i + 1][u])));
      });
      for (int64_t channel = 0; channel < c; ++channel) {
        Pair* row = y + channel * kTile;
        if (t.zero_frequency()) {
          const double re = Gated(of_zero[t.image], channel, 2 * c).product();
          mixed.zero[t.image][channel] = re;
          row[0] = simd::pair(
              static_cast<float>(re), static_cast<float>(Gated(of_zero[t.image], c + channel, 2 * c).product()));
        }
        Pair* stored = block(to, c, channel);
        for (int64_t i = 0; i < t.count; i += t.lanes, stored += kFloats) simd::store(stored, simd::load(row + i));
      }
    }
  });
  return mixed;
}

namespace {

// The backward pass of the mixing: what is done with a tile, in the scratch of one thread. A: what the products take.
template <class A>
class MixBackward {
 public:
  struct Factors {
    int64_t d, c, e;  // channels of the spectrum, of y and of the output
    bool has_last;
    Gate<A> gate;
    gemm::Matrix<A> matrix_t;
    Matrix last_t;
    int64_t n() const { return 2 * d + 2; }

    Factors(const Tensor& spectrum, const Tensor& matrix, const std::optional<Tensor>& out_weight)
        : d(spectrum.size(1)), c(matrix.size(0) / 4), e(out_weight ? out_weight->size(0) : c),
          has_last(out_weight.has_value()), gate(gate_of<A>(matrix)) {
      const float* m = data(matrix);
      const auto w = last_weight(out_weight);
      matrix_t = gemm::Matrix<A>(2 * d, 4 * c, [&](int64_t i, int64_t j) { return m[j * n() + i + i / d]; });
      if (has_last) last_t = Matrix(c, e, [&](int64_t i, int64_t j) { return w[j * c + i]; });
    }
  };

  MixBackward(Frame& frame, const Factors& f)
      : f_(f), in(frame.take<float>(rows(f.n()) + kGroup * kTile)),
        grad(frame.take<float>(rows(2 * f.e) + kGroup * kTile)), y(frame.take<float>(rows(2 * f.c) + kGroup * kTile)),
        grad_y(frame.take<float>(2 * f.c * kTile)), grad_pre(frame.take<float>(rows(4 * f.c))),
        grad_in(frame.take<float>(2 * f.d * kTile)), in_t(frame.take<A>(kTile * ld_in())),
        y_t(frame.take<A>(kTile * vectors(f.c))), group(frame.take<A>(kTile * kGroup)),
        factor(kPairs ? frame.take<A>(std::max(f.d + 1, 2 * f.c) * kTile) : nullptr), alpha(frame.take<float>(kTile)),
        inverse(frame.take<float>(kTile)), matrix(frame.zeros<float>(4 * f.c * ld())),
        out_weight(frame.zeros<float>(f.e * vectors(f.c))), constants(frame.zeros<VecF>(4 * f.c)) {}

  // The tile's input, and the gradients of y and of what the gate takes.
  void differentiate(
      const Spectra& g, const Tile& t, const float* spectrum, const float* upstream,
      const Rows<double>& of_zero) const {
    load_mixed(g, t, spectrum, f_.d, in);
    load(g, t, upstream, f_.e, f_.e, grad);
    multiplicity(g, t, alpha, inverse);
    for (int64_t row = 0; row < 2 * f_.e; ++row)
      for (int64_t i = 0; i < kTile; i += kFloats) {
        float* p = grad + row * kTile + i;
        simd::store(p, simd::load(p) * simd::load(alpha + i));
      }
    for (int r = 0; f_.has_last && r < 2; ++r)
      f_.last_t.blocks(
          t.count, grad + r * f_.e * kTile, kTile, gemm::into<false>(grad_y + r * f_.c * kTile, kTile, f_.c));
    const float* const grad_product = f_.has_last ? grad_y : grad;
    float* const grad_value = grad_pre + 2 * f_.c * kTile;
    f_.gate.apply(t.count, factor_of_gate(), [&](int64_t at, VecF a, VecF v) __attribute__((always_inline)) {
      const VecF s = simd::sigmoid(a), u = simd::gelu(v), upstream_y = simd::load(grad_product + at);
      simd::store(y + at, s * u);
      simd::store(grad_pre + at, upstream_y * u * (s * (1.0f - s)));
      simd::store(grad_value + at, upstream_y * s * simd::gelu_derivative(v));
    });
    for (int64_t i = 0; t.zero_frequency() && i < 2 * f_.c; ++i) {
      const Gated at(of_zero[t.image], i, 2 * f_.c);
      const double upstream_y = grad_product[i * kTile];
      y[i * kTile] = static_cast<float>(at.product());
      grad_pre[i * kTile] = static_cast<float>(upstream_y * at.value * at.gate * (1 - at.gate));
      grad_value[i * kTile] = static_cast<float>(upstream_y * at.gate * at.derivative);
    }
  }

  void store_spectrum(const Spectra& g, const Tile& t, float* result) const {
    f_.matrix_t.times(
        t.count, factor_of_gradient(), kTile, [&](int64_t row, int64_t at, VecF sum) __attribute__((always_inline)) {
          simd::store(grad_in + row * kTile + at, sum * simd::load(inverse + at));
        });
    store(g, t, grad_in, f_.d, result);
  }

  // Adds to the sums, and what belongs to the zero frequency, far larger than the others, to `total`: matrix, then
  // out_weight.
  void add(const Tile& t, double* total) const {
    const int64_t d = f_.d, c = f_.c, e = f_.e, n = f_.n();
    transpose_parts(t.count, d, in, in_t, ld_in());
    for (int64_t row = 0; t.zero_frequency() && row < 4 * c; ++row) {
      const double of_zero = std::exchange(grad_pre[row * kTile], 0.0f);
      for (int64_t j = 0; j < d; ++j) total[row * n + j] += of_zero * in[j * kTile];
      total[row * n + d] += of_zero;
      total[row * n + n - 1] += of_zero;
    }
    accumulate_product(t.count, 4 * c, grad_pre, 2 * d, in_t, ld_in(), group, matrix, ld());
    accumulate::add_rows(4 * c, t.count, grad_pre, kTile, constants);
    for (int r = 0; f_.has_last && r < 2; ++r) {
      gemm::transpose(c, t.count, y + r * c * kTile, kTile, y_t, vectors(c));
      accumulate_product(t.count, e, grad + r * e * kTile, c, y_t, vectors(c), group, out_weight, vectors(c));
    }
  }

  void flush(double* total) const {
    const int64_t d = f_.d, c = f_.c, n = f_.n();
    for (int r = 0; r < 2; ++r) accumulate::flush(4 * c, d, matrix + r * d, ld(), total + r * (d + 1), n);
    flush_rows(4 * c, constants, total + d, n);
    accumulate::flush(f_.e, c, out_weight, vectors(c), total + 4 * c * n, c);
  }

 private:
  static constexpr bool kPairs = std::is_same_v<A, Pair>;
  int64_t ld() const { return vectors(2 * f_.d); }
  int64_t ld_in() const { return ld() + kFloats; }

  // The tile, and the gradient of what the gate takes, as right factors.
  const A* factor_of_gate() const {
    if constexpr (!kPairs)
      return in;
    else
      return pair_rows(f_.d + 1, in, 1, f_.d + 1, factor), factor;
  }
  const A* factor_of_gradient() const {
    if constexpr (!kPairs)
      return grad_pre;
    else
      return pair_rows(2 * f_.c, grad_pre, 2, 1, factor), factor;
  }

  const Factors& f_;
  float *const in, *const grad, *const y, *const grad_y, *const grad_pre, *const grad_in;
  A *const in_t, *const y_t, *const group, *const factor;
  float *const alpha, *const inverse, *const matrix, *const out_weight;
  VecF* const constants;
};

}  // namespace

MixGradients spectrum_mix_backward(
    const Tensor& grad, const Tensor& spectrum, const Tensor& matrix, const Rows<double>& of_zero,
    const std::optional<Tensor>& out_weight, int64_t height, int64_t width, bool need_spectrum, bool need_parameters,
    bool in_pairs) {
  const Spectra g(spectrum, height, width);
  const int64_t d = spectrum.size(1), c = matrix.size(0) / 4, e = grad.size(1), of_matrix = 4 * c * (2 * d + 2);
  Tensor grad_spectrum = need_spectrum ? g.empty(spectrum, d) : tensor::empty(spectrum, {0});
  float* result = static_cast<float*>(grad_spectrum.mutable_data_ptr());
  std::vector<double> totals;
  auto run = [&](auto element) {
    using Backward = MixBackward<decltype(element)>;
    const typename Backward::Factors f(spectrum, matrix, out_weight);
    totals = reduce(g.count(), of_matrix + e * c, [&](int64_t begin, int64_t end, double* total) {
      Frame frame;
      const Backward tile(frame, f);
      for (int64_t index = begin; index < end; ++index) {
        const Tile t(g, index);
        tile.differentiate(g, t, data(spectrum), data(grad), of_zero);
        if (need_spectrum) tile.store_spectrum(g, t, result);
        if (!need_parameters) continue;
        tile.add(t, total);
        if (index + 1 == end || (index - begin) % kTilesPerFlush == kTilesPerFlush - 1) tile.flush(total);
      }
    });
  };
  in_pairs ? pairs::choose<simd::BFloat16>(d, run) : run(float{});
  return {grad_spectrum, {totals.begin(), totals.begin() + of_matrix}, {totals.begin() + of_matrix, totals.end()}};
}

Tensor spectrum_moments(const Tensor& spectrum, int64_t height, int64_t width) {
  const Spectra g(spectrum, height, width);
  const int64_t d = spectrum.size(1), n = d + 1, ld = vectors(d), ld_in = vectors(2 * d) + kFloats;
  const auto totals = reduce(g.count(), 2 * d * n, [&](int64_t begin, int64_t end, double* total) {
    Frame frame;
    float *in = frame.take<float>(rows(2 * d + 2) + kGroup * kTile), *in_t = frame.take<float>(kTile * ld_in);
    float *group = frame.take<float>(kTile * kGroup), *products = frame.zeros<float>(2 * d * ld);
    VecF* sums = frame.zeros<VecF>(2 * d);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_centred(g, t, data(spectrum), d, in);
      transpose_parts(t.count, d, in, in_t, ld_in);
      for (int r = 0; r < 2; ++r) {
        const float* part = in + r * n * kTile;
        accumulate_product(t.count, d, part, d, in_t + r * d, ld_in, group, products + r * d * ld, ld);
        accumulate::add_rows(d, t.count, part, kTile, sums + r * d);
      }
      if (index + 1 == end || (index - begin) % kTilesPerFlush == kTilesPerFlush - 1) {
        accumulate::flush(2 * d, d, products, ld, total, n);
        flush_rows(2 * d, sums, total + d, n);
      }
    }
  });
  return tensor::write(spectrum, {2, d, n}, tensor::ScalarType::Double, totals.data());
}

void spectrum_moments_backward(
    Tensor& grad, const Tensor& spectrum, const std::vector<double>& grad_moments, int64_t height, int64_t width) {
  const Spectra g(spectrum, height, width);
  const int64_t d = spectrum.size(1), n = d + 1;
  std::vector<Matrix> parts;
  for (int r = 0; r < 2; ++r)
    parts.emplace_back(d, n, [&](int64_t i, int64_t j) {
      const double* part = &grad_moments[r * d * n];
      return static_cast<float>(part[i * n + j] + (j < d ? part[j * n + i] : 0.0));
    });
  float* result = static_cast<float*>(grad.mutable_data_ptr());
  tasks::parallel(g.count(), 1, [&](int64_t begin, int64_t end) {
    Frame frame;
    float *in = frame.take<float>(2 * n * kTile), *out = frame.take<float>(2 * d * kTile);
    float *alpha = frame.take<float>(kTile), *inverse = frame.take<float>(kTile);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t(g, index);
      load_centred(g, t, data(spectrum), d, in);
      load(g, t, result, d, d, out);
      multiplicity(g, t, alpha, inverse);
      for (int r = 0; r < 2; ++r)
        parts[r].times(
            t.count, in + r * n * kTile, kTile, [&](int64_t row, int64_t at, VecF sum) __attribute__((always_inline)) {
              float* p = out + (r * d + row) * kTile + at;
              simd::store(p, simd::load(p) + sum * simd::load(inverse + at));
            });
      store(g, t, out, d, result);
    }
  });
}

}  // namespace fourier
