// The inverse of the two-dimensional Haar transform with learnable filters, and its gradients.
#include "haar_walk.h"

namespace {

using haar::Filters;
using haar::Out;
using simd::Acc;
using tensor::Tensor;

Tensor haar_idwt2d(const Tensor& y, const Tensor& rec_lo, const Tensor& rec_hi, int64_t height, int64_t width) {
  const bool channels_last = tensor::is_channels_last(y);
  const Tensor dense = tensor::with_format(y, channels_last);
  Tensor x = tensor::empty(y, {y.size(0), y.size(1) / 4, height, width}, channels_last);
  tensor::dispatch(y.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    haar::Walk<T> g{y.size(0), y.size(1) / 4, height, width};
    g.bands = static_cast<const T*>(dense.const_data_ptr());
    g.band_strides = tensor::strides_of(dense);
    g.out = static_cast<T*>(x.mutable_data_ptr());
    g.out_strides = tensor::strides_of(x);
    haar::walk_layout<false, Out::kPixels, false>(channels_last, g, Filters<Acc<T>>(rec_lo, rec_hi), nullptr);
  });
  return x;
}

std::tuple<Tensor, Tensor, Tensor> haar_idwt2d_backward(
    const Tensor& grad, const Tensor& y, const Tensor& rec_lo, const Tensor& rec_hi, int64_t, int64_t, bool need_images,
    bool need_parameters) {
  const bool channels_last = tensor::is_channels_last(y);
  return haar::backward<false, Out::kBands>(
      tensor::with_format(grad, channels_last), tensor::with_format(y, channels_last), y, rec_lo, rec_hi, channels_last,
      need_images, need_parameters);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("haar_idwt2d(Tensor y, Tensor rec_lo, Tensor rec_hi, int height, int width) -> Tensor");
  m.def(
      "haar_idwt2d_backward(Tensor grad, Tensor y, Tensor rec_lo, Tensor rec_hi, int height, int width, bool "
      "need_images,"
      " bool need_parameters) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("haar_idwt2d", TORCH_BOX(&haar_idwt2d));
  m.impl("haar_idwt2d_backward", TORCH_BOX(&haar_idwt2d_backward));
}
