// Channel attention, x times s with s = sigmoid(w2 relu(w1 mean + b1) + b2). Forward and backward each take two passes
// over planes: one that sums, one that scales. The small matrices in between are taken in double.
#include <algorithm>

#include "accumulate.h"
#include "attention.h"
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
  attention::Network net(x.size(0), w1, b1, w2, b2);
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
  attention::Network net(x.size(0), w1, b1, w2, b2);
  attention::Gradients g = net.no_gradients();
  const double area = static_cast<double>(x.size(2) * x.size(3));
  Tensor grad_x = need_images ? tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}) : tensor::empty(x, {0});
  std::vector<double> products(net.mean.size()), of_mean(net.mean.size());
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_each_plane(x, [&](int64_t plane) {
      net.mean[plane] = sum(input<T>(dense, plane)) / area;
      products[plane] = sum_of_products(input<T>(dense, plane), input<T>(dense_grad, plane));
    });
    net.run();
    for (int64_t b = 0; b < net.batch; ++b) {
      const auto of_image = net.backward(b, products.data() + b * net.channels, g);
      std::copy(of_image.begin(), of_image.end(), of_mean.begin() + b * net.channels);
    }
    if (!need_images) return;
    const int64_t last = x.size(0) * net.channels - 1;
    for_each_plane(x, [&](int64_t i) {
      const int64_t plane = last - i;
      affine(
          input<T>(dense_grad, plane), static_cast<Acc<T>>(net.scale[plane]),
          static_cast<Acc<T>>(of_mean[plane] / area), output<T>(grad_x, plane));
    });
  });
  const tensor::GradientWriter write{grad, need_parameters};
  return {grad_x, write(w1, g.w1), write(b1, g.b1), write(w2, g.w2), write(b2, g.b2)};
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
