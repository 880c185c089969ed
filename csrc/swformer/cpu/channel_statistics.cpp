// Mean and variance of each channel: runs of pixels are centred on their own means while they are in the first-level
// cache, and the runs are put together in double, so that a large mean costs no accuracy.
#include <cmath>

#include "tasks.h"
#include "tensor.h"

namespace {

using simd::Acc;
using tensor::Tensor;

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of the differences from the mean

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * other.count / total;
    squares += other.squares + delta * delta * count * other.count / total;
    count = total;
  }
};

// Of up to 64 vectors, the last of which may be partial.
template <class T>
Moments run_moments(const T* x, int64_t count) {
  using A = Acc<T>;
  constexpr int64_t lanes = simd::kLanes<A>;
  const int64_t in_vectors = count / lanes * lanes;
  simd::Vec<A> sum[2] = {}, squares[2] = {};
  auto pairs = [&](auto&& use) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + 2 * lanes <= in_vectors; i += 2 * lanes) {
      use(0, simd::load(x + i));
      use(1, simd::load(x + i + lanes));
    }
    if (i < in_vectors) use(0, simd::load(x + i));
  };
  pairs([&](int k, simd::Vec<A> v) __attribute__((always_inline)) { sum[k] += v; });
  double total = simd::sum_of_lanes(sum[0] + sum[1]);
  for (int64_t i = in_vectors; i < count; ++i) total += static_cast<A>(x[i]);
  const A mean = static_cast<A>(total / count);
  simd::Vec<A> differences[2] = {};  // sums of the differences: of numbers far from zero the first sum is a rough one
  pairs([&](int k, simd::Vec<A> v) __attribute__((always_inline)) {
    const simd::Vec<A> difference = v - mean;
    differences[k] += difference;
    squares[k] += difference * difference;
  });
  double off = simd::sum_of_lanes(differences[0] + differences[1]),
         centred = simd::sum_of_lanes(squares[0] + squares[1]);
  for (int64_t i = in_vectors; i < count; ++i) {
    const A difference = static_cast<A>(x[i]) - mean;
    off += difference;
    centred += difference * difference;
  }
  off /= static_cast<double>(count);
  return {static_cast<double>(count), mean + off, std::max(0.0, centred - static_cast<double>(count) * off * off)};
}

std::tuple<Tensor, Tensor> channel_statistics(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Tensor dense = tensor::as_contiguous(x);
  const auto dtype = tensor::dtype_of_sums(x.scalar_type());
  Tensor statistics = tensor::empty(x, {2, channels}, false, dtype),
         means = tensor::empty(x, {channels}, false, tensor::ScalarType::Double);
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Acc<T>;
    constexpr int64_t run = 64 * simd::kLanes<A>;
    const T* data = static_cast<const T*>(dense.const_data_ptr());
    std::vector<Moments> planes(batch * channels);
    tasks::parallel(batch * channels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane)
        for (int64_t i = 0; i < pixels; i += run)
          planes[plane].add(run_moments(data + plane * pixels + i, std::min(run, pixels - i)));
    });
    double* mean = static_cast<double*>(means.mutable_data_ptr());
    A* both = static_cast<A*>(statistics.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      Moments all;
      for (int64_t b = 0; b < batch; ++b) all.add(planes[b * channels + c]);
      mean[c] = all.count ? all.mean : std::nan("");
      both[c] = static_cast<A>(mean[c]);
      both[channels + c] = static_cast<A>(all.squares / all.count);
    }
  });
  return {statistics, means};
}

Tensor channel_statistics_backward(const Tensor& grad, const Tensor& mean, const Tensor& x, bool need_images) {
  if (!need_images) return tensor::empty(x, {0});
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Tensor dense = tensor::as_contiguous(x);
  Tensor grad_x = tensor::empty(x, {batch, channels, x.size(2), x.size(3)});
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = Acc<T>;
    constexpr int64_t lanes = simd::kLanes<A>;
    const auto upstream = tensor::read<double>(grad), means = tensor::read<double>(mean);
    const double count = static_cast<double>(batch * pixels);
    const T* data = static_cast<const T*>(dense.const_data_ptr());
    T* out = static_cast<T*>(grad_x.mutable_data_ptr());
    tasks::parallel(batch * channels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t c = plane % channels;
        const A slope = static_cast<A>(2 * upstream[channels + c] / count);
        // The mean in two parts: of a mean much larger than the differences from it, a rounded one would be felt in
        // them.
        const A center = static_cast<A>(means[c]), remainder = static_cast<A>(means[c] - center);
        const A offset = static_cast<A>(upstream[c] / count) - slope * remainder;
        const T* in = data + plane * pixels;
        T* to = out + plane * pixels;
        int64_t i = 0;
        for (; i + lanes <= pixels; i += lanes) simd::store(to + i, (simd::load(in + i) - center) * slope + offset);
        for (; i < pixels; ++i) to[i] = static_cast<T>((static_cast<A>(in[i]) - center) * slope + offset);
      }
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("channel_statistics(Tensor x) -> (Tensor, Tensor)");
  m.def("channel_statistics_backward(Tensor grad, Tensor mean, Tensor x, bool need_images) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&channel_statistics));
  m.impl("channel_statistics_backward", TORCH_BOX(&channel_statistics_backward));
}
