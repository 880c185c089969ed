// Depthwise k x k convolution and GELU in one pass over the rows, and their gradients, with nothing saved but the
// input.
#include "depthwise_gelu.h"
#include "tasks.h"

namespace {

using scratch::Frame;
using simd::Acc;
using simd::Vec;
using spatial::Parameters;
using stencil::Line;
using stencil::Padding;
using stencil::Problem;
using stencil::Ring;
using stencil::start;
using stencil::Task;
using stencil::Tasks;
using tensor::Tensor;

// Returns, with kSums, the sums of the output over the pixels, (B, C).
template <class T, bool kChannelsLast, int k, bool kSums>
std::vector<double> forward(const Problem<T>& g, const Parameters<Acc<T>>& p) {
  using F = spatial::Forward<T, kChannelsLast, k>;
  const Tasks cut(g.batch, g.channels, g.height, F::kStep);
  Frame frame;
  const tasks::Partial<> partial(frame, cut.size(), kSums ? F::kStep : 0);
  tasks::parallel(cut.size(), tasks::grain(g.height * g.width * F::kStep), [&](int64_t begin, int64_t end) {
    Frame frame;
    Acc<T>* memory = frame.zeros<Acc<T>>(F::size(g.width));
    for (int64_t index = begin; index < end; ++index) {
      const Task task = cut[index];
      F(memory, g, task)
          .template run<kSums>(
              g, p, task, task.begin, task.end, std::min(g.height, task.end + k / 2), partial.start(index));
    }
  });
  return cut.by_plane(partial);
}

// One task of the backward pass: z is the convolution's output; grad_z = grad GELU'(z), whose rows pass through a ring
// of their own.
template <class T, bool kChannelsLast, int k>
class Backward {
 public:
  using A = Acc<T>;
  using Lines = Line<T, kChannelsLast>;
  using RowsZ = stencil::WindowRing<A, k>;
  using RowsX =
      Ring<A, stencil::kMostRows + 3 * (k / 2)>;  // grad_z is k / 2 rows ahead, and as many rows of x ahead of it
  static constexpr int kStep = Lines::kGroup, kSums = k * k + 1;

  static Padding<A> padding(int64_t width) { return Padding<A>(Lines{width, 0, 0}.vectors(), kStep, k); }
  // Elements of the memory of the rings, which must hold zeros.
  static int64_t size(int64_t width) { return padding(width).size(RowsX::kDepth + RowsZ::kDepth + 1); }

  Backward(A* memory, const Problem<T>& g, const Parameters<A>& p, const Task& task)
      : g_(g), task_(task), x_line_{g.width, g.x_strides.w, task.lanes},
        grad_line_{g.width, g.grad_strides.w, task.lanes}, out_line_{g.width, g.out_strides.w, task.lanes},
        bias_(stencil::per_channel<kChannelsLast>(p.bias, task, 1, 0)),
        grad_sums_(stencil::per_plane<kChannelsLast>(g.grad_sums, task, g.channels)), x_(start(g.x, g.x_strides, task)),
        grad_(start(g.grad, g.grad_strides, task)), out_(start(g.out, g.out_strides, task)),
        x_next_(std::max<int64_t>(0, task.begin - k / 2 * 2)), z_next_(std::max<int64_t>(0, task.begin - k / 2)) {
    const Padding<A> rows = padding(g.width);
    A* const slots = memory + rows.margin;
    const A* zero = slots + (RowsX::kDepth + RowsZ::kDepth) * rows.stride();
    x_rows_ = {slots, zero, rows.stride(), g.height};
    z_rows_ = {slots + RowsX::kDepth * rows.stride(), zero, rows.stride(), g.height};
    for (int t = 0; t < k * k; ++t) weight_[t] = stencil::per_channel<kChannelsLast>(p.weight, task, k * k, t);
    std::reverse_copy(weight_, weight_ + k * k, flipped_);
  }

  // Writes the sums of each of the task's channels to `totals`, where it is given: for the taps, and for the bias.
  void run(double* totals) {
    accumulate::Sums<A, kSums> sums;
    stencil::by_pairs(task_.begin, task_.end, [&](auto count, int64_t i) {
      constexpr int kRows = count;
      static_assert(
          RowsX::kDepth >= kRows + 3 * (k / 2), "the rows of x from i - k / 2, when those for grad_z's last are there");
      const int64_t z_end = std::min(g_.height, i + kRows + k / 2);
      stencil::by_pairs(z_next_, z_end, [&](auto rows, int64_t z) { differentiate<rows>(z); });
      z_next_ = z_end;
      if (totals) {
        const A *around[kRows + k - 1], *grad_z[kRows];
        x_rows_.rows_from(i - k / 2, around);
        z_rows_.rows_from(i, grad_z);
        stencil::correlate<false, k, kRows, kStep>(
            around, grad_z, sums.run, x_line_.vectors(), x_line_.last_lanes(), weight_, bias_, stencil::Ignore{});
        sums.count(x_line_.vectors() * kRows);
      }
      if (out_) convolve_back<kRows>(i);
    });
    if (!totals) return;
    sums.flush();
    for (int lane = 0; lane < task_.lanes; ++lane)
      for (int t = 0; t < kSums; ++t) *totals++ = kChannelsLast ? sums.lane(t, lane) : sums.sum(t);
  }

 private:
  // Rows i, ... of grad_z.
  template <int kRows>
  void differentiate(int64_t i) {
    const RowsX x_rows = x_rows_;  // local copies that no store can alias stay in registers
    const RowsZ z_rows = z_rows_;
    const Lines in = x_line_, line = grad_line_;
    const Vec<A> grad_sums = grad_sums_;
    const int64_t stride = g_.grad_strides.h, x_stride = g_.x_strides.h, x_end = std::min(g_.height, i + kRows + k / 2);
    const T *x = x_, *grad = grad_ + i * stride;
    int64_t next = x_next_;
    for (; next < x_end; ++next) stencil::load_row(in, x + next * x_stride, x_rows.slot(next));
    x_next_ = next;
    const A* around[kRows + k - 1];
    x_rows.rows_from(i - k / 2, around);
    A* to[kRows];
    for (int o = 0; o < kRows; ++o) to[o] = z_rows.slot(i + o);
    stencil::convolve<k, kRows, kStep>(
        around, weight_, bias_, line.full(), line.vectors(),
        [=](int64_t v, auto& z, auto full) __attribute__((always_inline)) {
          for (int o = 0; o < kRows; ++o) {
            const Vec<A> upstream = line.load(grad + o * stride, v, full) + grad_sums;
            Vec<A> grad_z = simd::gelu_derivative(z[o]) * upstream;
            if (!full) grad_z = stencil::first_lanes<A>(grad_z, line.count(v));
            simd::store(to[o] + v * simd::kLanes<A>, grad_z);
          }
        });
  }

  // Rows i, ... of the gradient of x.
  template <int kRows>
  void convolve_back(int64_t i) const {
    const Lines line = out_line_;
    const int64_t stride = g_.out_strides.h;
    T* out = out_ + i * stride;
    const A* around[kRows + k - 1];
    z_rows_.rows_from(i - k / 2, around);
    stencil::convolve<k, kRows, kStep>(
        around, flipped_, Vec<A>{}, line.full(), line.vectors(),
        [=](int64_t v, auto& value, auto full) __attribute__((always_inline)) {
          for (int o = 0; o < kRows; ++o) line.store(out + o * stride, v, value[o], full);
        });
  }

  const Problem<T>& g_;
  const Task task_;
  const Lines x_line_, grad_line_, out_line_;
  RowsX x_rows_;
  RowsZ z_rows_;
  Vec<A> weight_[k * k], flipped_[k * k];
  const Vec<A> bias_, grad_sums_;
  const T *const x_, *const grad_;
  T* const out_;
  int64_t x_next_, z_next_;
};

template <class T, bool kChannelsLast, int k>
void backward(
    const Problem<T>& g, const Parameters<Acc<T>>& p, bool need_parameters, std::vector<double>& grad_weight,
    std::vector<double>& grad_bias) {
  using B = Backward<T, kChannelsLast, k>;
  const Tasks cut(g.batch, g.channels, g.height, B::kStep);
  Frame frame;
  const tasks::Partial<> partial(frame, cut.size(), need_parameters ? B::kStep * B::kSums : 0);
  tasks::parallel(cut.size(), tasks::grain(g.height * g.width * B::kStep), [&](int64_t begin, int64_t end) {
    Frame frame;
    Acc<T>* memory = frame.zeros<Acc<T>>(B::size(g.width));
    for (int64_t index = begin; index < end; ++index) B(memory, g, p, cut[index]).run(partial.start(index));
  });
  partial.each([&](int64_t index, const double* sums) {
    const Task task = cut[index];
    for (int64_t channel = task.channel; channel < task.channel + task.lanes; ++channel) {
      for (int t = 0; t < k * k; ++t) grad_weight[channel * k * k + t] += *sums++;
      grad_bias[channel] += *sums++;
    }
  });
}

std::tuple<Tensor, Tensor> depthwise_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, bool need_sums) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last);
  Tensor y = tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last);
  std::vector<double> sums;
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g{x.size(0),
                 x.size(1),
                 x.size(2),
                 x.size(3),
                 static_cast<const T*>(dense.const_data_ptr()),
                 tensor::strides_of(dense)};
    g.out = static_cast<T*>(y.mutable_data_ptr());
    g.out_strides = tensor::strides_of(y);
    const Parameters<Acc<T>> p{tensor::read<Acc<T>>(weight), tensor::read<Acc<T>>(bias)};
    sums = need_sums ? forward<T, layout, k, true>(g, p) : forward<T, layout, k, false>(g, p);
  });
  return {y, stencil::plane_sums(x, need_sums, sums)};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_gelu_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_sums, const Tensor& x, const Tensor& weight,
    const Tensor& bias, bool need_images, bool need_parameters) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last), upstream = tensor::with_format(grad, channels_last);
  Tensor grad_x = need_images ? tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last)
                              : tensor::empty(x, {0});
  std::vector<double> grad_weight(weight.numel()), grad_bias(bias.numel());
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g{x.size(0),
                 x.size(1),
                 x.size(2),
                 x.size(3),
                 static_cast<const T*>(dense.const_data_ptr()),
                 tensor::strides_of(dense)};
    g.grad = static_cast<const T*>(upstream.const_data_ptr());
    g.grad_strides = tensor::strides_of(upstream);
    g.grad_sums = stencil::read_plane_sums<Acc<T>>(x, grad_sums);
    if (need_images) {
      g.out = static_cast<T*>(grad_x.mutable_data_ptr());
      g.out_strides = tensor::strides_of(grad_x);
    }
    const Parameters<Acc<T>> p{tensor::read<Acc<T>>(weight), tensor::read<Acc<T>>(bias)};
    backward<T, layout, k>(g, p, need_parameters, grad_weight, grad_bias);
  });
  if (!need_parameters) return {grad_x, tensor::empty(weight, {0}), tensor::empty(bias, {0})};
  return {grad_x, tensor::write(weight, grad_weight.data()), tensor::write(bias, grad_bias.data())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("depthwise_gelu(Tensor x, Tensor weight, Tensor bias, bool need_sums) -> (Tensor, Tensor)");
  m.def(
      "depthwise_gelu_backward(Tensor grad, Tensor? grad_sums, Tensor x, Tensor weight, Tensor bias, bool need_images,"
      " bool need_parameters) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("depthwise_gelu", TORCH_BOX(&depthwise_gelu));
  m.impl("depthwise_gelu_backward", TORCH_BOX(&depthwise_gelu_backward));
}
