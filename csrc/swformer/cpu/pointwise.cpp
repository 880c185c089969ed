// 1x1 convolution of up to three maps, as a matrix product over tiles of pixels. Planes are often a power of two apart,
// where they evict each other from the caches: so the rows of a tile are gathered into a scratch that stays in cache,
// plane by plane in long runs, and so leaves the result. The concatenation of the maps never exists.
#include <optional>

#include "accumulate.h"
#include "gather.h"
#include "gemm.h"
#include "ops.h"
#include "pairs.h"
#include "scratch.h"
#include "tasks.h"
#include "tensor.h"

namespace {

using simd::Acc;
using simd::Pair;
using tensor::Tensor;

constexpr int64_t kTile = 240;                       // pixels: runs of so many are read and written
constexpr int64_t kScratchBytes = int64_t{1} << 18;  // of a tile's input, where the channels are many
constexpr int64_t kTilesPerFlush = 8;                // float sums stay this short before they are added up in double

struct Maps {
  std::vector<Tensor> parts;
  int64_t channels = 0;
  Maps(const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2) {
    parts.push_back(tensor::as_contiguous(x0));
    if (x1) parts.push_back(tensor::as_contiguous(*x1));
    if (x2) parts.push_back(tensor::as_contiguous(*x2));
    for (const Tensor& part : parts) channels += part.size(1);
  }
};

// The element of `weight` (1 or B, E, C) that output row e and input channel c need, in either orientation.
template <class A>
struct Weight {
  std::vector<A> values;
  int64_t batch, rows, columns;
  explicit Weight(const Tensor& weight)
      : values(tensor::read<A>(weight)), batch(weight.size(0)), rows(weight.size(1)), columns(weight.size(2)) {}
  A at(int64_t b, int64_t e, int64_t c) const { return values[(std::min(b, batch - 1) * rows + e) * columns + c]; }
};

// The planes of one or more (B, C, H, W) maps, one after the other.
template <class T>
struct Planes {
  struct Plane {
    T* data;        // of the first image
    int64_t image;  // elements to the next
  };
  std::vector<Plane> planes;
  explicit Planes(const std::vector<Tensor>& maps) {
    for (const Tensor& map : maps) {
      const int64_t pixels = map.size(2) * map.size(3);
      T* data;
      if constexpr (std::is_const_v<T>)
        data = static_cast<T*>(map.const_data_ptr());
      else
        data = static_cast<T*>(map.mutable_data_ptr());
      for (int64_t c = 0; c < map.size(1); ++c) planes.push_back({data + c * pixels, map.size(1) * pixels});
    }
  }
  int64_t count() const { return planes.size(); }
  T* at(int64_t image, int64_t plane, int64_t pixel) const {
    return planes[plane].data + image * planes[plane].image + pixel;
  }

  // Pixels [first, first + n) of an image, in rows `pitch` apart.
  template <class A>
  void gather_tile(int64_t image, int64_t first, int64_t n, A* rows, int64_t pitch) const {
    gather::tile(count(), n, [&](int64_t c) { return at(image, c, first); }, rows, pitch);
  }
  template <class A>
  void gather_lines(int64_t image, int64_t first, int64_t n, A* rows, int64_t pitch) const {
    gather::lines(count(), n, [&](int64_t c) { return at(image, c, first); }, rows, pitch);
  }
};

struct Tiles {
  int64_t pixels, size, count;
  template <class A>
  static Tiles of(const Tensor& map, int64_t channels, A) {
    constexpr int64_t unit = gemm::kVectors * simd::kLanes<A>;
    const int64_t pixels = map.size(2) * map.size(3),
                  most = kScratchBytes / (std::max<int64_t>(1, channels) * static_cast<int64_t>(sizeof(A)));
    const int64_t size = std::clamp(most / unit * unit, unit, gemm::round_up(kTile, unit));
    return {pixels, size, (pixels + size - 1) / size};
  }
  int64_t first(int64_t tile) const { return tile * size; }
  int64_t length(int64_t tile) const { return std::min(size, pixels - tile * size); }
};

// The matrix of each image, or the one for all: element (e, c) of number b is at(b, e, c).
template <class A>
struct Factors {
  std::vector<gemm::Matrix<A>> matrices;
  template <class At>
  Factors(int64_t count, int64_t rows, int64_t depth, At&& at) {
    for (int64_t b = 0; b < count; ++b)
      matrices.emplace_back(rows, depth, [&](int64_t e, int64_t c) { return at(b, e, c); });
  }
  // out = factor * in, n columns, in rows `pitch` apart.
  void multiply(int64_t image, int64_t n, const A* in, Acc<A>* out, int64_t pitch) const {
    const gemm::Matrix<A>& matrix = matrices[std::min<int64_t>(image, matrices.size() - 1)];
    matrix.blocks(n, in, pitch, gemm::into<false>(out, pitch, matrix.rows));
  }
};

// Sums over pixels of the products of rows with rows, and of the first rows themselves, in vectors. Rows are of
// numbers, or of pairs of neighbouring pixels.
template <class A>
class Correlation {
 public:
  using V = simd::Vec<Acc<A>>;
  static constexpr int kLeft = gemm::kRows, kRight = gemm::kVectors;
  static int64_t padded_left(int64_t rows) { return gemm::round_up(rows, kLeft); }
  static int64_t padded_right(int64_t rows) { return gemm::round_up(rows, kRight); }

  Correlation(scratch::Frame& frame, int64_t left, int64_t right)
      : left_(left), right_(right), products_(frame.zeros<V>(padded_left(left) * padded_right(right))),
        sums_(frame.zeros<V>(left)) {}

  // n elements a row, both of zeros past them up to a whole vector; the rows up to the padded numbers are read.
  void add(int64_t n, const A* left, const A* right, int64_t pitch) const {
    constexpr int lanes = simd::kLanes<A>;
    V* block = products_;
    for (int64_t e = 0; e < left_; e += kLeft)
      for (int64_t c = 0; c < right_; c += kRight, block += kLeft * kRight) {
        V sum[kLeft][kRight];
#pragma GCC unroll 8
        for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 3
          for (int j = 0; j < kRight; ++j) sum[i][j] = block[i * kRight + j];
        const A *a = left + e * pitch, *b = right + c * pitch;
        for (int64_t p = 0; p < n; p += lanes) {
          simd::Vec<A> row[kRight];
#pragma GCC unroll 3
          for (int j = 0; j < kRight; ++j) row[j] = simd::load(b + j * pitch + p);
#pragma GCC unroll 8
          for (int i = 0; i < kLeft; ++i) {
            const simd::Vec<A> element = simd::load(a + i * pitch + p);
#pragma GCC unroll 3
            for (int j = 0; j < kRight; ++j) gemm::add_product(sum[i][j], element, row[j]);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 3
          for (int j = 0; j < kRight; ++j) block[i * kRight + j] = sum[i][j];
      }
    if constexpr (std::is_same_v<A, Pair>) {
      const simd::VecU ones = simd::broadcast(simd::pair(1.0f, 1.0f));
      for (int64_t e = 0; e < left_; ++e)
        for (int64_t p = 0; p < n; p += lanes) gemm::add_product(sums_[e], simd::load(left + e * pitch + p), ones);
    } else {
      accumulate::add_rows(left_, n, left, pitch, sums_);
    }
  }

  // Adds the sums to products (left x right) and sums (left), and begins anew.
  void flush(double* products, double* sums) const {
    V* block = products_;
    for (int64_t e = 0; e < left_; e += kLeft)
      for (int64_t c = 0; c < right_; c += kRight)
        for (int i = 0; i < kLeft; ++i)
          for (int j = 0; j < kRight; ++j, ++block) {
            if (e + i < left_ && c + j < right_) accumulate::flush(*block, products[(e + i) * right_ + c + j]);
          }
    for (int64_t e = 0; e < left_; ++e) accumulate::flush(sums_[e], sums[e]);
  }

 private:
  int64_t left_, right_;
  V *products_, *sums_;
};

// out = weight * maps + bias + residual. A: what the products take.
template <class T, class A>
void forward(
    const Maps& maps, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual, Tensor& out) {
  const int64_t batch = out.size(0), outputs = out.size(1);
  const Weight<Acc<A>> w(weight);
  const Factors<A> factors(
      w.batch, outputs, maps.channels, [&](int64_t i, int64_t e, int64_t c) { return w.at(i, e, c); });
  const auto offset = tensor::read<Acc<A>>(bias);
  const int64_t offset_stride = bias.dim() == 2 ? outputs : 0;
  std::vector<Tensor> added;
  if (residual) added.push_back(tensor::as_contiguous(*residual));
  const Planes<const T> in(maps.parts), add(added);
  const Planes<T> to({out});
  const int64_t depth = gemm::depth<A>(maps.channels);
  const Tiles tiles = Tiles::of(out, depth, A());
  tasks::parallel(batch * tiles.count, 4, [&](int64_t begin, int64_t end) {
    scratch::Frame frame;
    A* inputs = frame.take<A>(depth * tiles.size);
    Acc<A>* products = frame.take<Acc<A>>(outputs * tiles.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles.count, first = tiles.first(task % tiles.count),
                    n = tiles.length(task % tiles.count);
      in.gather_tile(b, first, n, inputs, tiles.size);
      factors.multiply(b, n, inputs, products, tiles.size);
      for (int64_t e = 0; e < outputs; ++e)
        gather::scatter(
            products + e * tiles.size, n, offset[b * offset_stride + e], residual ? add.at(b, e, first) : nullptr,
            to.at(b, e, first));
    }
  });
}

}  // namespace

Tensor swformer::pointwise(
    const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& residual) {
  const Maps maps(x0, x1, x2);
  Tensor out = tensor::empty(x0, {x0.size(0), weight.size(1), x0.size(2), x0.size(3)});
  if (out.numel() == 0) return out;
  tensor::dispatch(x0.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    pairs::choose<T>(
        maps.channels, [&](auto element) { forward<T, decltype(element)>(maps, weight, bias, residual, out); });
  });
  return out;
}

namespace {

// Of each image, or of all where they share the parameter.
struct ParameterGradients {
  std::vector<double> weight, bias;
};

// Into `grads` the maps' gradients, where there are any, and with need_parameters into `sums` the parameters'. A: what
// the products take.
template <class T, class A>
void backward(
    const Maps& maps, const Tensor& grad, const Tensor& weight, const Tensor& bias, const std::vector<Tensor>& grads,
    bool need_parameters, ParameterGradients& sums) {
  constexpr bool kPairs = std::is_same_v<A, Pair>;  // of channels in a product, of pixels in a correlation
  const bool need_images = !grads.empty();
  const int64_t batch = grad.size(0), outputs = weight.size(1), channels = maps.channels;
  const Weight<Acc<A>> w(weight);
  const Factors<A> factors(
      need_images ? w.batch : 0, channels, outputs, [&](int64_t i, int64_t c, int64_t e) { return w.at(i, e, c); });
  const Planes<const T> upstream({grad}), in(maps.parts);
  const Planes<T> to(grads);
  const Tiles tiles = Tiles::of(grad, channels + outputs, Acc<A>());
  const int64_t size = need_parameters ? outputs * (channels + 1) : 0, cuts = tasks::parts(batch, tiles.count, 1, size);
  scratch::Frame frame;
  const tasks::Partial<> partial(frame, batch * cuts, size);
  tasks::parallel(batch * cuts, 1, [&](int64_t begin, int64_t end) {
    scratch::Frame frame;
    A* left = frame.take<A>(Correlation<A>::padded_left(outputs) * tiles.size);
    A* right = frame.take<A>(Correlation<A>::padded_right(channels) * tiles.size);
    A* factor = kPairs ? frame.take<A>(gemm::depth<A>(outputs) * tiles.size) : left;
    Acc<A>* result = frame.take<Acc<A>>(channels * tiles.size);
    const Correlation<A> correlation(frame, need_parameters ? outputs : 0, channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / cuts;
      const tasks::Range range = tasks::part(task % cuts, cuts, tiles.count);
      double* total = partial.start(task);
      for (int64_t tile = range.begin; tile < range.end; ++tile) {
        const int64_t first = tiles.first(tile), n = tiles.length(tile);
        if (need_parameters) {
          upstream.gather_lines(b, first, n, left, tiles.size);
          in.gather_lines(b, first, n, right, tiles.size);
          correlation.add(gemm::depth<A>(n), left, right, tiles.size);
          if (tile % kTilesPerFlush == 0 || tile + 1 == range.end) correlation.flush(total, total + outputs * channels);
        }
        if (!need_images) continue;
        if (kPairs || !need_parameters) upstream.gather_tile(b, first, n, factor, tiles.size);
        factors.multiply(b, n, factor, result, tiles.size);
        for (int64_t c = 0; c < channels; ++c)
          gather::scatter<T>(result + c * tiles.size, n, Acc<A>(0), nullptr, to.at(b, c, first));
      }
    }
  });
  partial.each([&](int64_t task, const double* total) {
    const int64_t b = task / cuts;
    double* to_weight = sums.weight.data() + std::min(b, weight.size(0) - 1) * outputs * channels;
    double* to_bias = sums.bias.data() + (bias.dim() == 2 ? b * outputs : 0);
    for (int64_t i = 0; i < outputs * channels; ++i) to_weight[i] += total[i];
    for (int64_t e = 0; e < outputs; ++e) to_bias[e] += total[outputs * channels + e];
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_backward(
    const Tensor& grad, const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2,
    const Tensor& weight, const Tensor& bias, bool need_images, bool need_parameters) {
  const Maps maps(x0, x1, x2);
  const Tensor dense = tensor::as_contiguous(grad);
  std::vector<Tensor> grads;
  for (const Tensor& part : maps.parts)
    if (need_images) grads.push_back(tensor::empty(part, {part.size(0), part.size(1), part.size(2), part.size(3)}));
  ParameterGradients sums{std::vector<double>(weight.numel()), std::vector<double>(bias.numel())};
  if (x0.size(0) && (need_images || need_parameters))
    tensor::dispatch(x0.scalar_type(), [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      pairs::choose<T>(maps.channels, [&](auto element) {
        backward<T, decltype(element)>(maps, dense, weight, bias, grads, need_parameters, sums);
      });
    });
  while (grads.size() < 3) grads.push_back(tensor::empty(grad, {0}));
  return {
      grads[0], grads[1], grads[2],
      need_parameters ? tensor::write(weight, sums.weight.data()) : tensor::empty(weight, {0}),
      need_parameters ? tensor::write(bias, sums.bias.data()) : tensor::empty(bias, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("pointwise(Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, Tensor? residual) -> Tensor");
  m.def(
      "pointwise_backward(Tensor grad, Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, bool "
      "need_images, bool need_parameters)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("pointwise", TORCH_BOX(&swformer::pointwise));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward));
}
