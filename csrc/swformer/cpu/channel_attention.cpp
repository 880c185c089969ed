// Channel attention, x times s with s = sigmoid(w2 relu(w1 mean + b1) + b2). Forward and backward each take two passes
// over planes: one that sums, one that scales. The small matrices in between are taken in double.
#include <algorithm>
#include <cmath>

#include "accumulate.h"
#include "tasks.h"
#include "tensor.h"

namespace {

using simd::Acc;
using simd::Vec;
using tensor::Tensor;

constexpr int64_t kElementsPerTask = 16384;

// One plane, as the fewest runs of neighbouring elements.
template <class T>
struct Plane {
  T* data;
  int64_t runs, length, stride;

  Plane(T* memory, const Tensor& t, int64_t plane) {
    const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
    data = memory + plane / channels * t.stride(0) + plane % channels * t.stride(1);
    const bool dense = height == 1 || t.stride(2) == width;
    runs = dense ? 1 : height;
    length = dense ? height * width : width;
    stride = t.stride(2);
  }
};
template <class T>
Plane<const T> input(const Tensor& t, int64_t plane) {
  return {static_cast<const T*>(t.const_data_ptr()), t, plane};
}
template <class T>
Plane<T> output(Tensor& t, int64_t plane) {
  return {static_cast<T*>(t.mutable_data_ptr()), t, plane};
}

template <class T, bool kVector>
inline auto at(const T* p, std::bool_constant<kVector>) {
  if constexpr (kVector)
    return simd::load(p);
  else
    return static_cast<Acc<T>>(*p);
}

template <class T>
double sum(const Plane<const T>& x) {
  double total = 0;
  for (int64_t r = 0; r < x.runs; ++r)
    total += accumulate::over<Acc<T>>(
        x.length, [p = x.data + r * x.stride](auto vector, int64_t i)
                      __attribute__((always_inline)) { return at(p + i, vector); });
  return total;
}

template <class T>
double sum_of_products(const Plane<const T>& x, const Plane<const T>& y) {
  double total = 0;
  const int64_t runs = std::max(x.runs, y.runs), length = x.runs == runs ? x.length : y.length;
  const int64_t x_step = x.runs == runs ? x.stride : length, y_step = y.runs == runs ? y.stride : length;
  for (int64_t r = 0; r < runs; ++r)
    total += accumulate::over<Acc<T>>(
        length, [p = x.data + r * x_step, q = y.data + r * y_step](auto vector, int64_t i)
                    __attribute__((always_inline)) { return at(p + i, vector) * at(q + i, vector); });
  return total;
}

// out = scale * in + shift, `out` being one run.
template <class T>
void affine(const Plane<const T>& in, Acc<T> scale, Acc<T> shift, const Plane<T>& out) {
  for (int64_t r = 0; r < in.runs; ++r) {
    const T* from = in.data + r * in.stride;
    T* to = out.data + r * in.length;
    int64_t i = 0;
    for (; i + simd::kLanes<Acc<T>> <= in.length; i += simd::kLanes<Acc<T>>)
      simd::store(to + i, scale * simd::load(from + i) + shift);
    for (; i < in.length; ++i) to[i] = static_cast<T>(scale * static_cast<Acc<T>>(from[i]) + shift);
  }
}

// The two small layers for every image: the values of each stage, in double.
struct Network {
  int64_t batch, channels, hidden;
  std::vector<double> w1, b1, w2, b2, mean, before_relu, scale;

  Network(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2)
      : batch(x.size(0)), channels(x.size(1)), hidden(weight1.size(0)), w1(tensor::read<double>(weight1)),
        b1(tensor::read<double>(bias1)), w2(tensor::read<double>(weight2)), b2(tensor::read<double>(bias2)),
        mean(batch * channels), before_relu(batch * hidden), scale(batch * channels) {}

  double relu(int64_t b, int64_t r) const {
    const double value = before_relu[b * hidden + r];
    return value < 0 ? 0.0 : value;  // NaN stays NaN
  }
  void run() {
    std::vector<double> after_relu(hidden);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < hidden; ++r) {
        before_relu[b * hidden + r] = b1[r] + dot(channels, w1.data() + r * channels, mean.data() + b * channels);
        after_relu[r] = relu(b, r);
      }
      for (int64_t c = 0; c < channels; ++c)
        scale[b * channels + c] = 1 / (1 + std::exp(-b2[c] - dot(hidden, w2.data() + c * hidden, after_relu.data())));
    }
  }

  static double dot(int64_t n, const double* p, const double* q) {
    return accumulate::over<double>(n, [=](auto vector, int64_t i) __attribute__((always_inline)) {
      return at(p + i, vector) * at(q + i, vector);
    });
  }
};

template <class Work>
void for_each_plane(const Tensor& x, Work&& work) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (x.size(2) * x.size(3)));
  tasks::parallel(x.size(0) * x.size(1), grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) work(plane);
  });
}

Tensor channel_attention(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const Tensor dense = tensor::with_dense_rows(x);
  Tensor y = tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  Network net(x, w1, b1, w2, b2);
  const double area = static_cast<double>(x.size(2) * x.size(3));
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_plane(x, [&](int64_t plane) { net.mean[plane] = sum(input<T>(dense, plane)) / area; });
    net.run();
    const int64_t last = x.size(0) * x.size(1) - 1;
    for_each_plane(x, [&](int64_t i) {
      const int64_t plane = last - i;  // those that were summed last are in the cache
      affine(input<T>(dense, plane), static_cast<Acc<T>>(net.scale[plane]), Acc<T>(0), output<T>(y, plane));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> channel_attention_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    bool need_images, bool need_parameters) {
  const Tensor dense = tensor::with_dense_rows(x), dense_grad = tensor::with_dense_rows(grad);
  Network net(x, w1, b1, w2, b2);
  const int64_t channels = net.channels, hidden = net.hidden;
  const double area = static_cast<double>(x.size(2) * x.size(3));
  Tensor grad_x = need_images ? tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}) : tensor::empty(x, {0});
  std::vector<double> products(net.mean.size()), grad_mean(net.mean.size());
  std::vector<double> grad_w1(net.w1.size()), grad_b1(hidden), grad_w2(net.w2.size()), grad_b2(channels);
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_plane(x, [&](int64_t plane) {
      net.mean[plane] = sum(input<T>(dense, plane)) / area;
      products[plane] = sum_of_products(input<T>(dense, plane), input<T>(dense_grad, plane));
    });
    net.run();
    for (int64_t b = 0; b < net.batch; ++b) {
      std::vector<double> grad_hidden(hidden);
      for (int64_t c = 0; c < channels; ++c) {
        const double s = net.scale[b * channels + c], g = products[b * channels + c] * s * (1 - s);
        grad_b2[c] += g;
        for (int64_t r = 0; r < hidden; ++r) {
          grad_w2[c * hidden + r] += g * net.relu(b, r);
          grad_hidden[r] += g * net.w2[c * hidden + r];
        }
      }
      for (int64_t r = 0; r < hidden; ++r) {
        if (net.before_relu[b * hidden + r] <= 0) continue;
        grad_b1[r] += grad_hidden[r];
        for (int64_t c = 0; c < channels; ++c) {
          grad_w1[r * channels + c] += grad_hidden[r] * net.mean[b * channels + c];
          grad_mean[b * channels + c] += grad_hidden[r] * net.w1[r * channels + c];
        }
      }
    }
    if (!need_images) return;
    const int64_t last = x.size(0) * channels - 1;
    for_each_plane(x, [&](int64_t i) {
      const int64_t plane = last - i;
      affine(
          input<T>(dense_grad, plane), static_cast<Acc<T>>(net.scale[plane]),
          static_cast<Acc<T>>(grad_mean[plane] / area), output<T>(grad_x, plane));
    });
  });
  if (!need_parameters)
    return {grad_x, tensor::empty(w1, {0}), tensor::empty(b1, {0}), tensor::empty(w2, {0}), tensor::empty(b2, {0})};
  return {
      grad_x, tensor::write(w1, grad_w1.data()), tensor::write(b1, grad_b1.data()), tensor::write(w2, grad_w2.data()),
      tensor::write(b2, grad_b2.data())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("channel_attention(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor");
  m.def(
      "channel_attention_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, bool need_images, "
      "bool need_parameters)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("channel_attention", TORCH_BOX(&channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&channel_attention_backward));
}
