#include <optional>

#include "../ops.h"
#include "gelu.h"
#include "pairs.h"
#include "rows.h"
#include "tasks.h"

namespace multiscale_ffn {
namespace {

template <class T, class M>
void forward_strip(
    const NetOf<M>& net, const Image<const T>& x, const Image<const T>* residual, const Image<T>& y, int64_t begin,
    int64_t end) {
  Frame frame;
  const Grid& full = net.grid[0];
  const float* zeros = zero_row(frame, full);
  Hidden<T, M> hidden(frame, net, 0, x, begin - 1, 3, 1);
  Mixed<T, M> half(frame, net, 1, x, net.row_source[1][begin].low),
      quarter(frame, net, 2, x, net.row_source[2][begin].low);
  M* activated = frame.take<M>(net.out_weight.depth * kBlock);
  const Rows result(frame, 1, net.out, full);
  for (int64_t i = begin; i < end; ++i) {
    hidden.advance(i + 1);
    half.advance(net.row_source[1][i].high);
    quarter.advance(net.row_source[2][i].high);
    const Neighbours near(hidden.rows, i, full.height, zeros);
    for (int64_t b = 0; b < full.blocks; ++b) {
      before_gelu(net, near, half, quarter, i, b, true, [&](int64_t c, int v, VecF z) __attribute__((always_inline)) {
        gemm::set_channel(c, simd::gelu_of<T>(z), activated + v * kLanes, kBlock);
      });
      float* row = result[i] + b * kBlock;
      net.out_weight.times(
          full.columns(b), activated, kBlock, [&](int64_t c, int64_t j, VecF v) __attribute__((always_inline)) {
            simd::store(row + c * full.pitch + j, v + net.out_bias[c]);
          });
    }
    store_row(result[i], full.pitch, y, i, residual);
  }
}

}  // namespace
}  // namespace multiscale_ffn

using tensor::Tensor;

Tensor swformer::multiscale_ffn(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& dw_weight1, const Tensor& dw_bias1,
    const Tensor& dw_weight2, const Tensor& dw_bias2, const Tensor& dw_weight4, const Tensor& dw_bias4,
    const Tensor& out_weight, const Tensor& out_bias, const std::optional<Tensor>& residual) {
  using namespace ::multiscale_ffn;
  Tensor y = tensor::empty(x, {x.size(0), out_weight.size(0), x.size(2), x.size(3)}, tensor::is_channels_last(x));
  if (x.size(0) == 0) return y;
  dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    pairs::choose<T>(x.size(1), [&](auto element) {
      const NetOf<decltype(element)> net(
          Net(x, in_weight, in_bias, {dw_weight1, dw_bias1, dw_weight2, dw_bias2, dw_weight4, dw_bias4}, out_weight,
              out_bias),
          in_weight, out_weight, false);
      const int64_t strips = net.strips(), rows = net.rows_per_strip();
      tasks::parallel(net.batch * strips, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t begin = task % strips * rows, b = task / strips;
          std::optional<Image<const T>> add;
          if (residual) add = input<T>(*residual, b);
          forward_strip(
              net, input<T>(x, b), add ? &*add : nullptr, output<T>(y, b), begin, std::min(net.height, begin + rows));
        }
      });
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def(
      "multiscale_ffn(Tensor x, Tensor in_weight, Tensor in_bias, Tensor dw_weight1, Tensor dw_bias1, Tensor "
      "dw_weight2, Tensor dw_bias2,"
      " Tensor dw_weight4, Tensor dw_bias4, Tensor out_weight, Tensor out_bias, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) { m.impl("multiscale_ffn", TORCH_BOX(&swformer::multiscale_ffn)); }
