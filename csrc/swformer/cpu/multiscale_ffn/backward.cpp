#include <array>
#include <optional>

#include "gelu.h"
#include "gradients.h"
#include "pairs.h"
#include "tasks.h"

namespace multiscale_ffn {
namespace {

constexpr int64_t kEqual = 32;  // of a mean's gradients, one number again and again, are summed in float
constexpr int64_t kGroupBytes = int64_t{32} << 20;  // of gradients between the two passes

// First pass over a strip. `grad_x` gets what comes through the first scale; `sums` is null where no parameter needs a
// gradient.
template <class T, class M>
class StripBackward {
 public:
  StripBackward(
      Frame& frame, const NetOf<M>& net, const SumPlaces& layout, const Image<const T>& x, const Image<const T>& grad,
      const Image<T>* grad_x, const LowGradients& half_grad, const LowGradients& quarter_grad, int64_t image,
      int64_t strip, float* sums)
      : net_(net), layout_(layout), full_(net.grid[0]), grad_(grad), grad_x_(grad_x), sums_(sums),
        begin_(strip * net.rows_per_strip()), end_(std::min(net.height, begin_ + net.rows_per_strip())),
        zeros_(zero_row(frame, full_)), hidden_(frame, net, 0, x, begin_ - 2, 4, 3),
        half_(frame, net, 1, x, net.row_source[1][begin_].low),
        quarter_(frame, net, 2, x, net.row_source[2][begin_].low), half_down_(frame, net, half_grad, image, strip),
        quarter_down_(frame, net, quarter_grad, image, strip), scale_(frame, net, layout, 0, grad_x != nullptr, sums),
        mixed_grad_(frame, 3, net.mid, full_), result_(frame, 1, net.in, full_),
        activated_(take_block(frame, kScales * net.mid)), slope_(take_block(frame, kScales * net.mid)),
        grad_blocks_(frame.take<M>((full_.blocks * gemm::depth<M>(net.out) + kLanes) * kBlock)),
        activated_pixels_(frame, kScales * net.mid, full_), grad_pixels_(frame, net.out, full_),
        out_bias_(frame, net.out, kEqual) {}

  void run() {
    int64_t next = begin_;
    for (int64_t i = std::max<int64_t>(0, begin_ - 1); i < std::min(net_.height, end_ + 1); ++i) {
      row(i);
      for (; next < end_ && (next < i || i == net_.height - 1); ++next) {
        scale_.row(hidden_.rows, mixed_grad_, next, hidden_.blocks(next), result_[0]);
        if (grad_x_) store_row(result_[0], full_.pitch, *grad_x_, next);
      }
    }
    half_down_.finish();
    quarter_down_.finish();
    scale_.finish();
    if (sums_) out_bias_.finish(sums_ + layout_.out_bias);
  }

 private:
  // Of the strip's of_task rows all scales, of its neighbours' the first.
  void row(int64_t i) {
    const bool of_task = i >= begin_ && i < end_;
    hidden_.advance(i + 1);
    if (of_task) {
      half_.advance(net_.row_source[1][i].high);
      quarter_.advance(net_.row_source[2][i].high);
      half_down_.begin(net_.row_source[1][i]);
      quarter_down_.begin(net_.row_source[2][i]);
    }
    pack_row(grad_, i, grad_blocks_);
    const Neighbours near(hidden_.rows, i, full_.height, zeros_);
    for (int64_t b = 0; b < full_.blocks; ++b) {
      float *const activated = of_task && sums_ ? activated_ : nullptr, *const slope = slope_;
      before_gelu(
          net_, near, half_, quarter_, i, b, of_task, [=](int64_t c, int v, VecF z) __attribute__((always_inline)) {
            if (activated) simd::store(activated + c * kBlock + v * kLanes, simd::gelu(z));
            simd::store(slope + c * kBlock + v * kLanes, simd::gelu_derivative(z));
          });
      propagate(i, b, of_task);
      if (of_task && sums_) collect(b);
    }
    if (of_task && sums_)
      add_product(grad_pixels_, activated_pixels_, net_.width, sums_ + layout_.out_weight, layout_.out_pitch);
  }

  // Block b of the gradient, through the last convolution and the GELU, to the maps of each scale.
  void propagate(int64_t i, int64_t b, bool of_task) const {
    const int64_t mid = net_.mid, columns = full_.columns(b), pitch = full_.pitch;
    const M* const block = grad_block(b);
    const float* const slope = slope_;
    float* row = mixed_grad_[i] + b * kBlock;
    VecU inside[kVectors];  // lanes past the width stay zero
    for (int v = 0; v < kVectors; ++v) inside[v] = first_lanes(net_.width - b * kBlock - v * kLanes);
    net_.out_transposed[0].times(
        columns, block, kBlock, [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
          simd::store(row + c * pitch + j, keep(inside[j / kLanes], g * simd::load(slope + c * kBlock + j)));
        });
    if (!of_task) return;
    net_.out_transposed[1].times(
        columns, block, kBlock, [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
          half_down_.add(c, b * kBlock + j, g * simd::load(slope + (mid + c) * kBlock + j));
        });
    net_.out_transposed[2].times(
        columns, block, kBlock, [&](int64_t c, int64_t j, VecF g) __attribute__((always_inline)) {
          quarter_down_.add(c, b * kBlock + j, g * simd::load(slope + (2 * mid + c) * kBlock + j));
        });
  }

  const M* grad_block(int64_t b) const { return grad_blocks_ + b * gemm::depth<M>(net_.out) * kBlock; }

  // For the gradients of the last convolution.
  void collect(int64_t b) {
    const M* block = grad_block(b);
    activated_pixels_.set(b, activated_);
    grad_pixels_.set(b, block);
    accumulate::add_rows(net_.out, full_.columns(b), block, kBlock, out_bias_.sums);
    out_bias_.added(kVectors);
  }

  const NetOf<M>& net_;
  const SumPlaces& layout_;
  const Grid& full_;
  const Image<const T>& grad_;
  const Image<T>* const grad_x_;
  float* const sums_;
  const int64_t begin_, end_;
  const float* const zeros_;
  Hidden<T, M> hidden_;
  Mixed<T, M> half_, quarter_;
  Downsample half_down_, quarter_down_;
  ScaleBackward<M> scale_;
  const Rows mixed_grad_, result_;
  float *const activated_, *const slope_;
  M* const grad_blocks_;
  const PixelMajor<M> activated_pixels_, grad_pixels_;
  VectorSums out_bias_;
};

// image[row i] += half + quarter, each sample for all its pixels.
template <class T>
void add_low_row(
    const Image<T>& image, int64_t i, const float* half, int64_t half_pitch, const float* quarter,
    int64_t quarter_pitch) {
  T* row = image.row(i);
  if (!image.dense()) {
    for (int64_t j = 0; j < image.width; ++j)
      for (int64_t c = 0; c < image.channels; ++c) {
        T& pixel = row[c * image.strides.c + j * image.strides.w];
        pixel = static_cast<T>(
            static_cast<float>(pixel) + half[c * half_pitch + j / 2] + quarter[c * quarter_pitch + j / 4]);
      }
    return;
  }
  VecU twice, four_times;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    twice[lane] = lane / 2;
    four_times[lane] = lane / 4;
  }
  for (int64_t c = 0; c < image.channels; ++c, row += image.strides.c, half += half_pitch, quarter += quarter_pitch)
    for (int64_t j = 0; j < image.width; j += kLanes) {
      const VecF low =
          simd::permute(simd::load(half + j / 2), twice) + simd::permute(simd::load(quarter + j / 4), four_times);
      gather::store(row + j, gather::load(row + j, image.width - j) + low, image.width - j);
    }
}

// Second pass over a strip: from the gradients of the low-resolution maps to the input and the parameters.
template <class T, class M>
void backward_low_strip(
    const NetOf<M>& net, const SumPlaces& layout, const Image<const T>& x, const Image<T>* grad_x,
    const LowGradients& half_grad, const LowGradients& quarter_grad, int64_t image, int64_t strip, float* sums) {
  Frame frame;
  const int64_t begin = strip * net.rows_per_strip(), end = std::min(net.height, begin + net.rows_per_strip());
  struct Scale {
    const LowGradients& low;
    const int64_t factor, height;
    Hidden<T, M> hidden;
    const Rows grad, result;
    ScaleBackward<M> backward;
    int64_t next, next_grad;

    Scale(
        Frame& frame, const NetOf<M>& net, const SumPlaces& layout, const Image<const T>& x,
        const LowGradients& gradients, bool need_images, int64_t begin, float* sums)
        : low(gradients), factor(kFactor[low.scale]), height(net.grid[low.scale].height),
          hidden(frame, net, low.scale, x, begin / factor - 1, 3, 3), grad(frame, 3, net.mid, net.grid[low.scale]),
          result(frame, 2, net.in, net.grid[low.scale]), backward(frame, net, layout, low.scale, need_images, sums),
          next(begin / factor), next_grad(std::max<int64_t>(0, next - 1)) {}

    void advance(int64_t image, int64_t last) {
      for (; next <= last; ++next) {
        hidden.advance(next + 1);
        for (; next_grad <= std::min(next + 1, height - 1); ++next_grad)
          low.gather(image, next_grad, grad[next_grad] - kLanes);
        backward.row(hidden.rows, grad, next, hidden.blocks(next), result[next]);
      }
    }
  };
  Scale half(frame, net, layout, x, half_grad, grad_x != nullptr, begin, sums);
  Scale quarter(frame, net, layout, x, quarter_grad, grad_x != nullptr, begin, sums);
  for (int64_t i = begin; i < end; ++i) {
    half.advance(image, i / half.factor);
    quarter.advance(image, i / quarter.factor);
    if (grad_x)
      add_low_row(
          *grad_x, i, half.result[i / half.factor], half.result.pitch, quarter.result[i / quarter.factor],
          quarter.result.pitch);
  }
  half.backward.finish();
  quarter.backward.finish();
}

// Runs work(task, sums) in parallel with `count` zeroed floats a task (null for none) and adds them to `totals` in task
// order.
template <class Work>
void sum_over_tasks(int64_t count, int64_t size, double* totals, Work&& work) {
  Frame frame;
  const tasks::Partial<float> partial(frame, count, size);
  tasks::parallel(count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) work(task, partial.start(task));
  });
  partial.add_to(totals);
}

// Into `grad_x`, where it is given, and with need_parameters into `totals`, as `layout` has them. By groups of images,
// so that the gradients between the two passes stay few.
template <class T, class M>
void backward(
    const NetOf<M>& net, const SumPlaces& layout, const Tensor& grad, const Tensor& x, Tensor* grad_x,
    bool need_parameters, double* totals) {
  const int64_t strips = net.strips();
  int64_t image_bytes = 1;
  for (int s = 1; s < kScales; ++s)
    image_bytes += sizeof(float) * strips * LowGradients::capacity_of(net, s) * net.mid * net.grid[s].pitch;
  const int64_t group = std::max<int64_t>(1, kGroupBytes / image_bytes);
  for (int64_t start = 0; start < net.batch; start += group) {
    const int64_t tasks = std::min(group, net.batch - start) * strips;
    Frame frame;
    const LowGradients half(frame, net, 1, tasks / strips), quarter(frame, net, 2, tasks / strips);
    auto gradient = [&](int64_t b) { return grad_x ? std::optional(output<T>(*grad_x, b)) : std::nullopt; };
    sum_over_tasks(tasks, need_parameters ? layout.second : 0, totals, [&](int64_t task, float* sums) {
      const int64_t b = start + task / strips;
      const auto image = input<T>(x, b), upstream = input<T>(grad, b);
      const auto to = gradient(b);
      Frame frame;
      StripBackward<T, M>(
          frame, net, layout, image, upstream, to ? &*to : nullptr, half, quarter, task / strips, task % strips, sums)
          .run();
    });
    sum_over_tasks(
        tasks, need_parameters ? layout.size - layout.second : 0, totals + layout.second,
        [&](int64_t task, float* sums) {
          const auto image = input<T>(x, start + task / strips);
          const auto to = gradient(start + task / strips);
          backward_low_strip(
              net, layout, image, to ? &*to : nullptr, half, quarter, task / strips, task % strips,
              sums ? sums - layout.second : sums);
        });
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Depthwise parameters at the places of their gradients: weight and bias of each scale.
using Depthwise = std::array<Tensor, 2 * kScales>;

Gradients from_totals(
    const Net& net, const SumPlaces& layout, const double* totals, const Tensor& grad_x, const Tensor& in_weight,
    const Tensor& in_bias, const Depthwise& dw, const Tensor& out_weight, const Tensor& out_bias) {
  std::vector<double> in_w, in_b, out_w;
  Depthwise dw_grad = dw;
  for (int s = 0; s < kScales; ++s) {
    std::vector<double> taps, biases;
    for (int64_t c = 0; c < net.mid; ++c) {
      const double* row = totals + layout.in_weight[s] + c * layout.in_pitch;
      in_w.insert(in_w.end(), row, row + net.in);
      in_b.push_back(totals[layout.in_bias[s] + c]);
      const double* sums = totals + layout.dw[s] + c * (kTaps + 1);
      taps.insert(taps.end(), sums, sums + kTaps);
      biases.push_back(sums[kTaps]);
    }
    dw_grad[2 * s] = tensor::write(dw[2 * s], taps.data());
    dw_grad[2 * s + 1] = tensor::write(dw[2 * s + 1], biases.data());
  }
  for (int64_t e = 0; e < net.out; ++e) {
    const double* row = totals + layout.out_weight + e * layout.out_pitch;
    out_w.insert(out_w.end(), row, row + kScales * net.mid);
  }
  return {
      grad_x,
      tensor::write(in_weight, in_w.data()),
      tensor::write(in_bias, in_b.data()),
      dw_grad[0],
      dw_grad[1],
      dw_grad[2],
      dw_grad[3],
      dw_grad[4],
      dw_grad[5],
      tensor::write(out_weight, out_w.data()),
      tensor::write(out_bias, totals + layout.out_bias)};
}

Gradients multiscale_ffn_backward(
    const Tensor& grad, const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& dw_weight1,
    const Tensor& dw_bias1, const Tensor& dw_weight2, const Tensor& dw_bias2, const Tensor& dw_weight4,
    const Tensor& dw_bias4, const Tensor& out_weight, const Tensor& out_bias, bool need_images, bool need_parameters) {
  const Depthwise dw = {dw_weight1, dw_bias1, dw_weight2, dw_bias2, dw_weight4, dw_bias4};
  const Net net(x, in_weight, in_bias, dw, out_weight, out_bias);
  const SumPlaces layout(net);
  Tensor grad_x = need_images
                      ? tensor::empty(x, {net.batch, net.in, net.height, net.width}, tensor::is_channels_last(x))
                      : tensor::empty(x, {0});
  std::vector<double> totals(layout.size);
  dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    pairs::choose<T>(x.size(1), [&](auto element) {
      const NetOf<decltype(element)> with_weights(net, in_weight, out_weight, true);
      backward<T>(with_weights, layout, grad, x, need_images ? &grad_x : nullptr, need_parameters, totals.data());
    });
  });
  if (need_parameters)
    return from_totals(net, layout, totals.data(), grad_x, in_weight, in_bias, dw, out_weight, out_bias);
  auto none = [](const Tensor& t) { return tensor::empty(t, {0}); };
  return {grad_x,      none(in_weight), none(in_bias), none(dw[0]),      none(dw[1]),   none(dw[2]),
          none(dw[3]), none(dw[4]),     none(dw[5]),   none(out_weight), none(out_bias)};
}

}  // namespace
}  // namespace multiscale_ffn

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def(
      "multiscale_ffn_backward(Tensor grad, Tensor x, Tensor in_weight, Tensor in_bias, Tensor dw_weight1, Tensor "
      "dw_bias1,"
      " Tensor dw_weight2, Tensor dw_bias2, Tensor dw_weight4, Tensor dw_bias4, Tensor out_weight, Tensor out_bias, "
      "bool need_images,"
      " bool need_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("multiscale_ffn_backward", TORCH_BOX(&multiscale_ffn::multiscale_ffn_backward));
}
