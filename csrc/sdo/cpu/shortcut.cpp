// The gradient shortcut in one pass: from the cotangent of the sampler's (or of one step's) result, the latents' direct
// gradient and the cotangents of the model's two halves. m is 1 where the predicted sample was not clipped, else 0.
//   grad_x = (a + c pred_x m) grad;  grad_eps = (b + c pred_eps m) grad
//   grad_cond = guidance grad_eps;  grad_uncond = (1 - guidance) grad_eps
#include "elementwise.h"

namespace {

using sdo::Tensor;

void shortcut_backward(
    const Tensor& grad, double a, double b, double guidance, const std::optional<Tensor>& x,
    const std::optional<Tensor>& cond, const std::optional<Tensor>& uncond, double c, double pred_x, double pred_eps,
    std::optional<double> clip, const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_cond,
    const std::optional<Tensor>& grad_uncond) {
  STD_TORCH_CHECK(!clip || (x && cond), "clip needs x and cond");
  sdo::Operands operands;
  const int at_grad = operands.add(grad);
  const int to_x = operands.add(grad_x, true), to_cond = operands.add(grad_cond, true);
  const int to_uncond = operands.add(grad_uncond, true);
  const int at_x = clip ? operands.add(x) : -1, at_cond = clip ? operands.add(cond) : -1;
  const int at_uncond = clip ? operands.add(uncond) : -1;

  tensor::dispatch(grad.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = simd::Acc<T>;
    const sdo::Update<A> update{A(a), A(b), A(c), A(pred_x), A(pred_eps), A(clip.value_or(0))};
    const A w = guidance, complement = 1 - guidance;
    sdo::with_flag(clip.has_value(), [&](auto clipped) {
      sdo::for_each_vector<T>(operands, [=](const auto& load, const auto& store) {
        const auto g = load(at_grad);
        auto state = g, eps = g, direct = g, through = g;
        if constexpr (clipped.value) {
          state = load(at_x);
          eps = load(at_cond);
          if (at_uncond >= 0) eps = sdo::guide(load(at_uncond), eps, w);
        }
        update.template backward<clipped.value>(g, state, eps, direct, through);
        if (to_x >= 0) store(to_x, direct);
        if (to_cond >= 0) store(to_cond, w * through);
        if (to_uncond >= 0) store(to_uncond, complement * through);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_sdo_fast, m) {
  m.def(
      "shortcut_backward(Tensor grad, float a, float b, float guidance, Tensor? x, Tensor? cond, Tensor? uncond, float "
      "c,"
      " float pred_x, float pred_eps, float? clip, Tensor(a!)? grad_x, Tensor(b!)? grad_cond, Tensor(c!)? grad_uncond) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(_sdo_fast, CPU, m) { m.impl("shortcut_backward", TORCH_BOX(&shortcut_backward)); }
