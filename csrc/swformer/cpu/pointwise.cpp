// 1x1 convolution of up to three maps, as a matrix product over tiles of pixels. Planes are often a power of two apart, where they
// evict each other from the caches: so the rows of a tile are gathered into a scratch that stays in cache, plane by plane in long
// runs, and so leaves the result. The concatenation of the maps never exists.
#include <optional>

#include "gemm.h"
#include "scratch.h"
#include "tensor.h"

namespace {

using simd::Acc;
using tensor::Tensor;

constexpr int64_t kTile = 240;                      // pixels: runs of so many are read and written
constexpr int64_t kScratchBytes = int64_t{1} << 18;  // of a tile's input, where the channels are many
constexpr int64_t kAhead = 1;                        // planes that a read goes ahead
constexpr int64_t kTilesPerFlush = 8;                // float sums stay this short before they are added up in double
constexpr int64_t kTasks = 16, kPartialBytes = int64_t{1} << 24;

struct Maps {
  std::vector<Tensor> parts;
  int64_t channels = 0;
  Maps(const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2) {
    parts.push_back(torch::stable::contiguous(x0));
    if (x1) parts.push_back(torch::stable::contiguous(*x1));
    if (x2) parts.push_back(torch::stable::contiguous(*x2));
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

// n elements, and zeros up to a whole vector. Also asks for those at `ahead`, which will be read soon: the planes are too many for
// the processor to see it.
template <class T, class A>
inline void gather(const T* in, const T* ahead, int64_t n, A* out) {
  constexpr int lanes = simd::kLanes<A>;
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(ahead + i);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) simd::store(out + i, simd::load(in + i));
  for (; i < n; ++i) out[i] = static_cast<A>(in[i]);
  for (; i < gemm::round_up(n, lanes); ++i) out[i] = 0;
}

// out = in + offset + add, the last where there is one.
template <class T, class A>
inline void scatter(const A* in, int64_t n, A offset, const T* add, T* out) {
  constexpr int lanes = simd::kLanes<A>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const simd::Vec<A> value = simd::load(in + i) + offset;
    simd::store(out + i, add ? value + simd::load(add + i) : value);
  }
  for (; i < n; ++i) out[i] = static_cast<T>(in[i] + offset + (add ? static_cast<A>(add[i]) : A(0)));
}

// The planes of one or more (B, C, H, W) maps, one after the other.
template <class T>
struct Planes {
  struct Plane {
    T* data;  // of the first image
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
  T* at(int64_t image, int64_t plane, int64_t pixel) const { return planes[plane].data + image * planes[plane].image + pixel; }

  // Pixels [first, first + n) of an image, in rows `pitch` apart.
  template <class A>
  void gather_tile(int64_t image, int64_t first, int64_t n, A* rows, int64_t pitch) const {
    for (int64_t c = 0; c < count(); ++c)
      gather(at(image, c, first), at(image, std::min(c + kAhead, count() - 1), first), n, rows + c * pitch);
  }
};

struct Tiles {
  int64_t pixels, size, count;
  template <class A>
  static Tiles of(const Tensor& map, int64_t channels, A) {
    constexpr int64_t unit = gemm::kVectors * simd::kLanes<A>;
    const int64_t pixels = map.size(2) * map.size(3), most = kScratchBytes / (channels * static_cast<int64_t>(sizeof(A)));
    const int64_t size = std::clamp(most / unit * unit, unit, gemm::round_up(kTile, unit));
    return {pixels, size, (pixels + size - 1) / size};
  }
  int64_t first(int64_t tile) const { return tile * size; }
  int64_t length(int64_t tile) const { return std::min(size, pixels - tile * size); }
};

// Left factors of matrix products, one for each image or one for all: element (e, c) of number b is at(b, e, c).
template <class A>
struct Factors {
  int64_t rows, depth;
  std::vector<A> panels;
  template <class At>
  Factors(int64_t count, int64_t rows, int64_t depth, At&& at) : rows(rows), depth(depth), panels(count * gemm::packed_size(rows, depth)) {
    for (int64_t b = 0; b < count; ++b)
      gemm::pack(rows, depth, panels.data() + b * gemm::packed_size(rows, depth), [&](int64_t e, int64_t c) { return at(b, e, c); });
  }
  // out = factor * in, n columns, in rows `pitch` apart.
  void multiply(int64_t image, int64_t n, const A* in, A* out, int64_t pitch) const {
    const int64_t panel = gemm::packed_size(rows, depth), last = panels.size() / std::max<int64_t>(1, panel) - 1;
    gemm::multiply(
        rows, n, depth, panels.data() + std::min(image, last) * panel, depth * gemm::kRows, int64_t{gemm::kRows}, in, pitch,
        gemm::into<false>(out, pitch, rows));
  }
};

// Sums over pixels of the products of rows with rows, and of the first rows themselves, in vectors.
template <class A>
class Correlation {
 public:
  using V = simd::Vec<A>;
  static constexpr int kLeft = gemm::kRows, kRight = gemm::kVectors;
  static int64_t padded_left(int64_t rows) { return gemm::round_up(rows, kLeft); }
  static int64_t padded_right(int64_t rows) { return gemm::round_up(rows, kRight); }

  Correlation(scratch::Frame& frame, int64_t left, int64_t right)
      : left_(left), right_(right), products_(frame.zeros<V>(padded_left(left) * padded_right(right))), sums_(frame.zeros<V>(left)) {}

  // Both of zeros past column n up to a whole vector; the rows up to the padded numbers are read.
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
          V row[kRight];
#pragma GCC unroll 3
          for (int j = 0; j < kRight; ++j) row[j] = simd::load(b + j * pitch + p);
#pragma GCC unroll 8
          for (int i = 0; i < kLeft; ++i) {
            const V element = simd::load(a + i * pitch + p);
#pragma GCC unroll 3
            for (int j = 0; j < kRight; ++j) sum[i][j] += element * row[j];
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kLeft; ++i)
#pragma GCC unroll 3
          for (int j = 0; j < kRight; ++j) block[i * kRight + j] = sum[i][j];
      }
    for (int64_t e = 0; e < left_; ++e)
      for (int64_t p = 0; p < n; p += lanes) sums_[e] += simd::load(left + e * pitch + p);
  }

  // Adds the sums to products (left x right) and sums (left), and begins anew.
  void flush(double* products, double* sums) const {
    V* block = products_;
    for (int64_t e = 0; e < left_; e += kLeft)
      for (int64_t c = 0; c < right_; c += kRight)
        for (int i = 0; i < kLeft; ++i)
          for (int j = 0; j < kRight; ++j, ++block) {
            if (e + i < left_ && c + j < right_) products[(e + i) * right_ + c + j] += simd::sum_of_lanes(*block);
            *block = V{};
          }
    for (int64_t e = 0; e < left_; ++e) {
      sums[e] += simd::sum_of_lanes(sums_[e]);
      sums_[e] = V{};
    }
  }

 private:
  int64_t left_, right_;
  V *products_, *sums_;
};

Tensor pointwise(
    const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& residual) {
  const Maps maps(x0, x1, x2);
  const int64_t batch = x0.size(0), outputs = weight.size(1);
  Tensor out = tensor::empty(x0, {batch, outputs, x0.size(2), x0.size(3)});
  if (out.numel() == 0) return out;
  tensor::dispatch(x0.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Acc<T>;
    const Weight<A> w(weight);
    const Factors<A> factors(w.batch, outputs, maps.channels, [&](int64_t i, int64_t e, int64_t c) { return w.at(i, e, c); });
    const auto offset = tensor::read<A>(bias);
    const int64_t offset_stride = bias.dim() == 2 ? outputs : 0;
    std::vector<Tensor> added;
    if (residual) added.push_back(torch::stable::contiguous(*residual));
    const Planes<const T> in(maps.parts), add(added);
    const Planes<T> to({out});
    const Tiles tiles = Tiles::of(x0, maps.channels, A());
    torch::stable::parallel_for(0, batch * tiles.count, 4, [&](int64_t begin, int64_t end) {
      scratch::Frame frame;
      A* inputs = frame.take<A>(maps.channels * tiles.size);
      A* products = frame.take<A>(outputs * tiles.size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / tiles.count, first = tiles.first(task % tiles.count), n = tiles.length(task % tiles.count);
        in.gather_tile(b, first, n, inputs, tiles.size);
        factors.multiply(b, n, inputs, products, tiles.size);
        for (int64_t e = 0; e < outputs; ++e)
          scatter(
              products + e * tiles.size, n, offset[b * offset_stride + e], residual ? add.at(b, e, first) : nullptr, to.at(b, e, first));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_backward(
    const Tensor& grad, const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2, const Tensor& weight,
    const Tensor& bias, bool need_x, bool need_params) {
  const Maps maps(x0, x1, x2);
  const Tensor dense = torch::stable::contiguous(grad);
  const int64_t batch = x0.size(0), outputs = weight.size(1), channels = maps.channels;
  std::vector<Tensor> grads;
  for (const Tensor& part : maps.parts)
    grads.push_back(need_x ? tensor::empty(part, {batch, part.size(1), part.size(2), part.size(3)}) : tensor::empty(part, {0}));
  // Of each image, or of all where they share the parameter.
  std::vector<double> weight_sums(weight.numel()), bias_sums(bias.numel());
  if (dense.numel() && (need_x || need_params)) {
    tensor::dispatch(x0.scalar_type(), [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      using A = Acc<T>;
      using Sums = Correlation<A>;
      const Weight<A> w(weight);
      const Factors<A> factors(
          need_x ? w.batch : 0, channels, outputs, [&](int64_t i, int64_t c, int64_t e) { return w.at(i, e, c); });
      const Planes<const T> upstream({dense}), in(maps.parts);
      const Planes<T> to(need_x ? grads : std::vector<Tensor>());
      const Tiles tiles = Tiles::of(x0, channels + outputs, A());
      // Every image is cut by the shapes alone, so that the sums are the same for every number of threads.
      const int64_t size = need_params ? outputs * (channels + 1) : 0;
      const int64_t most = std::clamp<int64_t>(kPartialBytes / (8 * batch * std::max<int64_t>(1, size)), 1, (kTasks + batch - 1) / batch);
      const int64_t cuts = std::min(most, tiles.count);
      std::vector<double> partial(batch * cuts * size);
      torch::stable::parallel_for(0, batch * cuts, 1, [&](int64_t begin, int64_t end) {
        scratch::Frame frame;
        A* left = frame.take<A>(Sums::padded_left(outputs) * tiles.size);
        A* right = frame.take<A>(Sums::padded_right(channels) * tiles.size);  // the input, then its gradient
        const Sums sums(frame, need_params ? outputs : 0, channels);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / cuts, cut = task % cuts, last = (cut + 1) * tiles.count / cuts;
          double* total = partial.data() + task * size;
          for (int64_t tile = cut * tiles.count / cuts; tile < last; ++tile) {
            const int64_t first = tiles.first(tile), n = tiles.length(tile);
            upstream.gather_tile(b, first, n, left, tiles.size);
            if (need_params) {
              in.gather_tile(b, first, n, right, tiles.size);
              sums.add(n, left, right, tiles.size);
              if (tile % kTilesPerFlush == 0 || tile + 1 == last) sums.flush(total, total + outputs * channels);
            }
            if (!need_x) continue;
            factors.multiply(b, n, left, right, tiles.size);
            for (int64_t c = 0; c < channels; ++c) scatter<T>(right + c * tiles.size, n, A(0), nullptr, to.at(b, c, first));
          }
        }
      });
      for (int64_t task = 0; size && task < batch * cuts; ++task) {
        const int64_t b = task / cuts;
        const double* total = partial.data() + task * size;
        double* to_weight = weight_sums.data() + std::min(b, weight.size(0) - 1) * outputs * channels;
        double* to_bias = bias_sums.data() + (bias.dim() == 2 ? b * outputs : 0);
        for (int64_t i = 0; i < outputs * channels; ++i) to_weight[i] += total[i];
        for (int64_t e = 0; e < outputs; ++e) to_bias[e] += total[outputs * channels + e];
      }
    });
  }
  while (grads.size() < 3) grads.push_back(tensor::empty(grad, {0}));
  return {
      grads[0],
      grads[1],
      grads[2],
      need_params ? tensor::write(weight, weight_sums.data()) : tensor::empty(weight, {0}),
      need_params ? tensor::write(bias, bias_sums.data()) : tensor::empty(bias, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("pointwise(Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, Tensor? residual) -> Tensor");
  m.def(
      "pointwise_backward(Tensor grad, Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, bool need_x, bool need_params)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("pointwise", TORCH_BOX(&pointwise));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward));
}
