// 1x1 convolution of up to three maps, as a matrix product over tiles of pixels. Planes are often a power of two apart, where they
// evict each other from the caches: so the rows of a tile are gathered into a scratch that stays in cache, plane by plane in long
// runs, and so leaves the result. The concatenation of the maps never exists.
#include <optional>

#include "gemm.h"
#include "tensor.h"
#include "workspace.h"

namespace {

using simd::Acc;
using tensor::Tensor;

constexpr int64_t kTile = 240;                      // pixels: runs of so many are read and written
constexpr int64_t kScratchBytes = int64_t{1} << 18;  // of a tile's input, where the channels are many
constexpr int64_t kAhead = 1;                        // planes that a read goes ahead

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

// n elements from `in` to every `stride`th strip of `width`. Also asks for those at `ahead`, which will be read soon: the planes
// are too many for the processor to see it.
template <class T, class A>
inline void gather(const T* in, const T* ahead, int64_t n, A* out, int64_t width, int64_t stride) {
  constexpr int lanes = simd::kLanes<A>;
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += line) __builtin_prefetch(ahead + i);
  for (int64_t first = 0; first < n; first += width, out += stride) {
    const int64_t end = std::min(width, n - first);
    int64_t i = 0;
    for (; i + lanes <= end; i += lanes) simd::store(out + i, simd::load(in + first + i));
    for (; i < end; ++i) out[i] = static_cast<A>(in[first + i]);
  }
}

// The other way, plus `offset` and, where there is one, `add`.
template <class T, class A>
inline void scatter(const A* in, int64_t n, int64_t width, int64_t stride, A offset, const T* add, T* out) {
  constexpr int lanes = simd::kLanes<A>;
  for (int64_t first = 0; first < n; first += width, in += stride) {
    const int64_t end = std::min(width, n - first);
    int64_t i = 0;
    for (; i + lanes <= end; i += lanes) {
      const simd::Vec<A> value = simd::load(in + i) + offset;
      simd::store(out + first + i, add ? value + simd::load(add + first + i) : value);
    }
    for (; i < end; ++i) out[first + i] = static_cast<T>(in[i] + offset + (add ? static_cast<A>(add[first + i]) : A(0)));
  }
}

// Where row e of the result lies, over one or more output tensors.
template <class T>
struct Rows {
  struct Row {
    T* data;
    int64_t batch_stride;
  };
  std::vector<Row> rows;
  explicit Rows(const std::vector<Tensor>& parts) {
    for (const Tensor& part : parts) {
      const int64_t pixels = part.size(2) * part.size(3);
      for (int64_t e = 0; e < part.size(1); ++e)
        rows.push_back({static_cast<T*>(part.mutable_data_ptr()) + e * pixels, part.size(1) * pixels});
    }
  }
};

// out[b, e] = sum over c of at(b, e, c) in[b, c] + bias[b * bias_stride + e] + residual[b, e], over the rows e of the outputs.
template <class T, class At>
void product(
    const std::vector<Tensor>& parts, At&& at, const Acc<T>* bias, int64_t bias_stride, const T* residual,
    const std::vector<Tensor>& outputs) {
  using A = Acc<T>;
  constexpr int64_t strip = gemm::kVectors * simd::kLanes<A>;
  const Rows<T> out(outputs);
  const int64_t batch = parts[0].size(0), pixels = parts[0].size(2) * parts[0].size(3), m = out.rows.size();
  std::vector<const T*> planes;  // of the first image; those of the next are `image` further
  std::vector<int64_t> image;
  for (const Tensor& part : parts)
    for (int64_t c = 0; c < part.size(1); ++c) {
      planes.push_back(static_cast<const T*>(part.const_data_ptr()) + c * pixels);
      image.push_back(part.size(1) * pixels);
    }
  const int64_t channels = planes.size(), most = kScratchBytes / (channels * strip * static_cast<int64_t>(sizeof(A)));
  const int64_t tile = std::clamp<int64_t>(most * strip, strip, gemm::round_up(kTile, strip));
  const int64_t tiles = (pixels + tile - 1) / tile, panel = gemm::packed_size(m, channels);
  std::vector<A> packed(batch * panel);
  for (int64_t b = 0; b < batch; ++b)
    gemm::pack(m, channels, packed.data() + b * panel, [&](int64_t e, int64_t c) { return at(b, e, c); });

  torch::stable::parallel_for(0, batch * tiles, 4, [&](int64_t begin, int64_t end) {
    workspace::Frame frame;
    A* inputs = frame.take<A>(channels * tile);
    A* products = frame.take<A>(m * tile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, first = task % tiles * tile, n = std::min(tile, pixels - first);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t next = c + kAhead < channels ? c + kAhead : c;
        gather(planes[c] + b * image[c] + first, planes[next] + b * image[next] + first, n, inputs + c * strip, strip, channels * strip);
      }
      for (int64_t column = 0; column < n; column += strip)
        gemm::multiply(
            m, std::min(strip, n - column), channels, packed.data() + b * panel, channels * gemm::kRows, int64_t{gemm::kRows},
            inputs + column * channels, strip, gemm::into<false>(products + column * m, strip, m));
      for (int64_t e = 0; e < m; ++e)
        scatter(
            products + e * strip, n, strip, m * strip, bias ? bias[b * bias_stride + e] : A(0),
            residual ? residual + (b * m + e) * pixels + first : nullptr, out.rows[e].data + b * out.rows[e].batch_stride + first);
    }
  });
}

Tensor pointwise(
    const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& residual) {
  const Maps maps(x0, x1, x2);
  Tensor out = tensor::empty(x0, {x0.size(0), weight.size(1), x0.size(2), x0.size(3)});
  if (out.numel() == 0) return out;
  tensor::dispatch(x0.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Weight<Acc<T>> w(weight);
    const auto b = tensor::read<Acc<T>>(bias);
    std::optional<Tensor> dense;
    if (residual) dense = torch::stable::contiguous(*residual);
    const T* add = dense ? static_cast<const T*>(dense->const_data_ptr()) : nullptr;
    product<T>(
        maps.parts, [&](int64_t i, int64_t e, int64_t c) { return w.at(i, e, c); }, b.data(), bias.dim() == 2 ? weight.size(1) : 0, add,
        {out});
  });
  return out;
}

// Sums over pixels, a plane at a time in short float runs added up in double; over the images, in order, unless `each_image`.
template <class T>
std::vector<double> channel_sums(const Tensor& x, bool each_image) {
  using A = Acc<T>;
  constexpr int lanes = simd::kLanes<A>;
  constexpr int64_t run = 32 * lanes;
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const T* data = static_cast<const T*>(x.const_data_ptr());
  std::vector<double> planes(batch * channels), sums(channels);
  torch::stable::parallel_for(0, batch * channels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const T* p = data + plane * pixels;
      double total = 0;
      int64_t i = 0;
      while (i + lanes <= pixels) {
        simd::Vec<A> sum{};
        for (const int64_t stop = std::min(i + run, pixels - lanes + 1); i < stop; i += lanes) sum += simd::load(p + i);
        for (int l = 0; l < lanes; ++l) total += sum[l];
      }
      for (; i < pixels; ++i) total += static_cast<A>(p[i]);
      planes[plane] = total;
    }
  });
  if (each_image) return planes;
  for (int64_t plane = 0; plane < batch * channels; ++plane) sums[plane % channels] += planes[plane];
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pointwise_backward(
    const Tensor& grad, const Tensor& x0, const std::optional<Tensor>& x1, const std::optional<Tensor>& x2, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& residual, bool need_x, bool need_params, bool need_residual) {
  const Maps maps(x0, x1, x2);
  const Tensor dense = torch::stable::contiguous(grad);
  const int64_t batch = x0.size(0), outputs = weight.size(1), pixels = x0.size(2) * x0.size(3);
  std::vector<Tensor> grads;
  for (const Tensor& part : maps.parts)
    grads.push_back(need_x ? tensor::empty(part, {batch, part.size(1), part.size(2), part.size(3)}) : tensor::empty(part, {0}));
  Tensor grad_weight = tensor::empty(weight, {0}), grad_bias = tensor::empty(bias, {0});
  tensor::dispatch(x0.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (need_x && dense.numel()) {
      const Weight<Acc<T>> w(weight);
      product<T>(
          {dense}, [&](int64_t i, int64_t c, int64_t e) { return w.at(i, e, c); }, nullptr, 0, nullptr, grads);
    }
    if (need_params) {
      const auto sums = channel_sums<T>(dense, bias.dim() == 2);
      grad_bias = tensor::write(bias, sums.data());
    }
  });
  if (need_params) {
    std::vector<double> sums(weight.numel());
    int64_t first = 0;
    for (const Tensor& part : maps.parts) {
      const int64_t channels = part.size(1);
      const Tensor columns = torch::stable::transpose(torch::stable::reshape(part, {batch, channels, pixels}), 1, 2);
      const Tensor product = torch::stable::matmul(torch::stable::reshape(dense, {batch, outputs, pixels}), columns);
      const auto values = tensor::read<double>(product);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t e = 0; e < outputs; ++e)
          for (int64_t c = 0; c < channels; ++c)
            sums[(std::min(b, weight.size(0) - 1) * outputs + e) * maps.channels + first + c] +=
                values[(b * outputs + e) * channels + c];
      first += channels;
    }
    grad_weight = tensor::write(weight, sums.data());
  }
  while (grads.size() < 3) grads.push_back(tensor::empty(grad, {0}));
  Tensor grad_residual = need_residual && residual ? torch::stable::clone(dense) : tensor::empty(grad, {0});
  return {grads[0], grads[1], grads[2], grad_weight, grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("pointwise(Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, Tensor? residual) -> Tensor");
  m.def(
      "pointwise_backward(Tensor grad, Tensor x0, Tensor? x1, Tensor? x2, Tensor weight, Tensor bias, Tensor? residual, bool need_x,"
      " bool need_params, bool need_residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("pointwise", TORCH_BOX(&pointwise));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward));
}
