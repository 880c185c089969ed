// The two-dimensional Haar transform with learnable filters, and its gradients.
#include "haar_walk.h"

namespace {

using haar::Filters;
using haar::Out;
using simd::Acc;
using tensor::Tensor;

Tensor haar_dwt2d(const Tensor& x, const Tensor& dec_lo, const Tensor& dec_hi) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last);
  Tensor y = tensor::empty(x, {x.size(0), 4 * x.size(1), (x.size(2) + 1) / 2, (x.size(3) + 1) / 2}, channels_last);
  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    haar::Walk<T> g{x.size(0), x.size(1), x.size(2), x.size(3)};
    g.pixels = static_cast<const T*>(dense.const_data_ptr());
    g.pixel_strides = tensor::strides_of(dense);
    g.out = static_cast<T*>(y.mutable_data_ptr());
    g.out_strides = tensor::strides_of(y);
    haar::walk_layout<true, Out::kBands, false>(channels_last, g, Filters<Acc<T>>(dec_lo, dec_hi), nullptr);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> haar_dwt2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& dec_lo, const Tensor& dec_hi, bool need_images,
    bool need_parameters) {
  const bool channels_last = tensor::is_channels_last(x);
  return haar::backward<true, Out::kPixels>(
      tensor::with_format(x, channels_last), tensor::with_format(grad, channels_last), x, dec_lo, dec_hi, channels_last,
      need_images, need_parameters);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("haar_dwt2d(Tensor x, Tensor dec_lo, Tensor dec_hi) -> Tensor");
  m.def(
      "haar_dwt2d_backward(Tensor grad, Tensor x, Tensor dec_lo, Tensor dec_hi, bool need_images, bool need_parameters)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("haar_dwt2d", TORCH_BOX(&haar_dwt2d));
  m.impl("haar_dwt2d_backward", TORCH_BOX(&haar_dwt2d_backward));
}
