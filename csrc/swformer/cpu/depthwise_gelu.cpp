// Depthwise k x k convolution and GELU in one pass over the rows, and their gradients, with nothing saved but the input.
#include "depthwise_gelu.h"

namespace {

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
  const Tasks tasks(g.batch, g.channels, g.height, F::kStep);
  std::vector<double> partial(kSums ? tasks.size() * F::kStep : 0);
  torch::stable::parallel_for(0, tasks.size(), Tasks::grain(g.height * g.width * F::kStep), [&](int64_t begin, int64_t end) {
    Acc<T>* memory = stencil::workspace<Acc<T>>(F::size(g.width));
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks[index];
      F(memory, g, task).template run<kSums>(
          g, p, task, task.begin, task.end, std::min(g.height, task.end + k / 2), kSums ? &partial[index * F::kStep] : nullptr);
    }
  });
  return kSums ? tasks.by_plane(partial) : std::vector<double>();
}

// z is the convolution's output; grad_z = grad GELU'(z), whose rows pass through a ring of their own.
template <class T, bool kChannelsLast, int k>
void backward(
    const Problem<T>& g, const std::vector<Acc<T>>& weight, const std::vector<Acc<T>>& bias, bool need_params,
    std::vector<double>& grad_weight, std::vector<double>& grad_bias) {
  using A = Acc<T>;
  using Lines = Line<T, kChannelsLast>;
  constexpr int64_t kStep = Lines::kGroup, kDepthX = 8, kDepthZ = k == 3 ? 4 : 8, kCount = k * k + 1;
  const Tasks tasks(g.batch, g.channels, g.height, Lines::kGroup);
  const Padding<A> padding(Lines{g.width, 0, 0}.vectors(), kStep, k);
  const int64_t stride = padding.stride();
  std::vector<double> partial(need_params ? tasks.size() * kStep * kCount : 0);

  torch::stable::parallel_for(0, tasks.size(), Tasks::grain(g.height * g.width * kStep), [&](int64_t begin, int64_t end) {
    A* memory = stencil::workspace<A>(padding.size(kDepthX + kDepthZ + 1)) + padding.margin;
    const A* zero = memory + (kDepthX + kDepthZ) * stride;
    const Ring<A, kDepthX> x_rows{memory, zero, stride, g.height};
    const Ring<A, kDepthZ> z_rows{memory + kDepthX * stride, zero, stride, g.height};
    for (int64_t index = begin; index < end; ++index) {
      const Task task = tasks[index];
      const Lines x_line{g.width, g.x_strides.w, task.lanes}, grad_line{g.width, g.grad_strides.w, task.lanes};
      const Lines out_line{g.width, g.out_strides.w, task.lanes};
      const T* x = start(g.x, g.x_strides, task);
      const T* grad = start(g.grad, g.grad_strides, task);
      T* grad_x = start(g.out, g.out_strides, task);
      Vec<A> w[k * k], flipped[k * k];
      for (int t = 0; t < k * k; ++t) w[t] = stencil::per_channel<kChannelsLast>(weight, task, k * k, t);
      std::reverse_copy(w, w + k * k, flipped);
      const Vec<A> b = stencil::per_channel<kChannelsLast>(bias, task, 1, 0);
      const Vec<A> of_sums = stencil::per_plane<kChannelsLast>(g.grad_sums, task, g.channels);
      stencil::Sums<A, kCount> sums;
      int64_t x_next = std::max<int64_t>(0, task.begin - k / 2 * 2), z_next = std::max<int64_t>(0, task.begin - k / 2);

      auto differentiate = [&](auto count, int64_t i) {
        constexpr int kRows = count;
        for (; x_next < std::min(g.height, i + kRows + k / 2); ++x_next)
          stencil::load_row(x_line, x + x_next * g.x_strides.h, x_rows.slot(x_next));
        const A* around[kRows + k - 1];
        for (int r = 0; r < kRows + k - 1; ++r) around[r] = x_rows.row(i + r - k / 2);
        stencil::convolve<k, kRows, kStep>(
            around, w, b, grad_line.whole(), grad_line.vectors(),
            [&](int64_t v, auto& z, auto whole) __attribute__((always_inline)) {
              for (int o = 0; o < kRows; ++o) {
                const Vec<A> upstream = grad_line.load(grad + (i + o) * g.grad_strides.h, v, whole) + of_sums;
                Vec<A> grad_z = simd::gelu_derivative(z[o]) * upstream;
                if (!whole) grad_z = stencil::first_lanes<A>(grad_z, grad_line.count(v));
                simd::store(z_rows.slot(i + o) + v * simd::kLanes<A>, grad_z);
              }
            });
      };
      stencil::by_pairs(task.begin, task.end, [&](auto count, int64_t i) {
        constexpr int kRows = count;
        const int64_t z_end = std::min(g.height, i + kRows + k / 2);
        stencil::by_pairs(z_next, z_end, differentiate);
        z_next = z_end;
        if (need_params) {
          const A* around[kRows + k - 1];
          const A* grad_z[kRows];
          for (int r = 0; r < kRows + k - 1; ++r) around[r] = x_rows.row(i + r - k / 2);
          for (int o = 0; o < kRows; ++o) grad_z[o] = z_rows.row(i + o);
          stencil::correlate<false, k, kRows, kStep>(
              around, grad_z, sums.run, x_line.vectors(), x_line.last_lanes(), w, b, [](auto&&...) {});
          sums.count(x_line.vectors() * kRows);
        }
        if (grad_x) {
          const A* around[kRows + k - 1];
          for (int r = 0; r < kRows + k - 1; ++r) around[r] = z_rows.row(i + r - k / 2);
          stencil::convolve<k, kRows, kStep>(
              around, flipped, Vec<A>{}, out_line.whole(), out_line.vectors(),
              [&](int64_t v, auto& value, auto whole) __attribute__((always_inline)) {
                for (int o = 0; o < kRows; ++o) out_line.store(grad_x + (i + o) * g.out_strides.h, v, value[o], whole);
              });
        }
      });
      if (need_params) {
        sums.flush();
        for (int lane = 0; lane < task.lanes; ++lane)
          for (int t = 0; t < kCount; ++t)
            partial[(index * kStep + lane) * kCount + t] = kChannelsLast ? sums.lane(t, lane) : sums.sum(t);
      }
    }
  });
  if (!need_params) return;
  for (int64_t index = 0; index < tasks.size(); ++index) {
    const Task task = tasks[index];
    for (int lane = 0; lane < task.lanes; ++lane) {
      const double* sums = &partial[(index * kStep + lane) * kCount];
      for (int t = 0; t < k * k; ++t) grad_weight[(task.channel + lane) * k * k + t] += sums[t];
      grad_bias[task.channel + lane] += sums[k * k];
    }
  }
}

std::tuple<Tensor, Tensor> depthwise_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, bool need_sums) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last);
  Tensor y = tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last);
  std::vector<double> sums;
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g{x.size(0), x.size(1), x.size(2), x.size(3), static_cast<const T*>(dense.const_data_ptr()), tensor::strides_of(dense)};
    g.out = static_cast<T*>(y.mutable_data_ptr());
    g.out_strides = tensor::strides_of(y);
    const Parameters<Acc<T>> p{tensor::read<Acc<T>>(weight), tensor::read<Acc<T>>(bias)};
    sums = need_sums ? forward<T, layout, k, true>(g, p) : forward<T, layout, k, false>(g, p);
  });
  return {y, stencil::plane_sums(x, need_sums, sums)};
}

std::tuple<Tensor, Tensor, Tensor> depthwise_gelu_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_sums, const Tensor& x, const Tensor& weight, const Tensor& bias, bool need_x,
    bool need_params) {
  const bool channels_last = tensor::is_channels_last(x);
  const Tensor dense = tensor::with_format(x, channels_last), upstream = tensor::with_format(grad, channels_last);
  Tensor grad_x =
      need_x ? tensor::empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last) : tensor::empty(x, {0});
  std::vector<double> grad_weight(weight.numel()), grad_bias(bias.numel());
  stencil::specialise(x, channels_last, weight.size(3), [&](auto* tag, auto layout, auto k) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Problem<T> g{x.size(0), x.size(1), x.size(2), x.size(3), static_cast<const T*>(dense.const_data_ptr()), tensor::strides_of(dense)};
    g.grad = static_cast<const T*>(upstream.const_data_ptr());
    g.grad_strides = tensor::strides_of(upstream);
    g.grad_sums = stencil::read_plane_sums<Acc<T>>(x, grad_sums);
    if (need_x) {
      g.out = static_cast<T*>(grad_x.mutable_data_ptr());
      g.out_strides = tensor::strides_of(grad_x);
    }
    backward<T, layout, k>(
        g, tensor::read<Acc<T>>(weight), tensor::read<Acc<T>>(bias), need_params, grad_weight, grad_bias);
  });
  if (!need_params) return {grad_x, tensor::empty(weight, {0}), tensor::empty(bias, {0})};
  return {grad_x, tensor::write(weight, grad_weight.data()), tensor::write(bias, grad_bias.data())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("depthwise_gelu(Tensor x, Tensor weight, Tensor bias, bool need_sums) -> (Tensor, Tensor)");
  m.def(
      "depthwise_gelu_backward(Tensor grad, Tensor? grad_sums, Tensor x, Tensor weight, Tensor bias, bool need_x,"
      " bool need_params) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) {
  m.impl("depthwise_gelu", TORCH_BOX(&depthwise_gelu));
  m.impl("depthwise_gelu_backward", TORCH_BOX(&depthwise_gelu_backward));
}
