// The gradient shortcut in one kernel; the formulas stand in ../cpu/shortcut.cpp.
#include "elementwise.cuh"

namespace {

using sdo::Tensor;

template <class T, bool kClipped>
struct Shortcut {
  using Element = T;
  using A = sdo::Acc<T>;
  sdo::Update<A> update;
  A guidance, complement;
  int to_x, to_cond, to_uncond, at_x, at_cond, at_uncond;  // places among the operands, -1 for none

  template <int kWidth, class Cursor>
  __device__ void operator()(const Cursor& cursor) const {
    A grad[kWidth], x[kWidth] = {}, eps[kWidth] = {};
    cursor.load(0, grad);
    if constexpr (kClipped) {
      cursor.load(at_x, x);
      cursor.load(at_cond, eps);
      if (at_uncond >= 0) {
        A uncond[kWidth];
        cursor.load(at_uncond, uncond);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) eps[i] = sdo::guide(uncond[i], eps[i], guidance);
      }
    }
    A direct[kWidth], through[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) update.template backward<kClipped>(grad[i], x[i], eps[i], direct[i], through[i]);
    if (to_x >= 0) cursor.store(to_x, direct);
    if (to_cond >= 0) store_scaled<kWidth>(cursor, to_cond, through, guidance);
    if (to_uncond >= 0) store_scaled<kWidth>(cursor, to_uncond, through, complement);
  }

  template <int kWidth, class Cursor>
  __device__ static void store_scaled(const Cursor& cursor, int k, const A (&values)[kWidth], A factor) {
    A scaled[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) scaled[i] = factor * values[i];
    cursor.store(k, scaled);
  }
};

void shortcut_backward(
    const Tensor& grad, double a, double b, double guidance, const std::optional<Tensor>& x,
    const std::optional<Tensor>& cond, const std::optional<Tensor>& uncond, double c, double pred_x, double pred_eps,
    std::optional<double> clip, const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_cond,
    const std::optional<Tensor>& grad_uncond) {
  STD_TORCH_CHECK(!clip || (x && cond), "clip needs x and cond");
  sdo::Operands operands;
  operands.add(grad);
  const int to_x = operands.add(grad_x, true), to_cond = operands.add(grad_cond, true);
  const int to_uncond = operands.add(grad_uncond, true);
  const int at_x = clip ? operands.add(x) : -1, at_cond = clip ? operands.add(cond) : -1;
  const int at_uncond = clip ? operands.add(uncond) : -1;

  sdo::dispatch(grad.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = sdo::Acc<T>;
    sdo::with_flag(clip.has_value(), [&](auto clipped) {
      const Shortcut<T, clipped.value> body{
          {A(a), A(b), A(c), A(pred_x), A(pred_eps), A(clip.value_or(0))},
          A(guidance),
          A(1 - guidance),
          to_x,
          to_cond,
          to_uncond,
          at_x,
          at_cond,
          at_uncond};
      sdo::for_each_pack(operands, body);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_sdo_fast_cuda, m) {
  m.def(
      "shortcut_backward(Tensor grad, float a, float b, float guidance, Tensor? x, Tensor? cond, Tensor? uncond, float "
      "c,"
      " float pred_x, float pred_eps, float? clip, Tensor(a!)? grad_x, Tensor(b!)? grad_cond, Tensor(c!)? grad_uncond) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(_sdo_fast_cuda, CUDA, m) { m.impl("shortcut_backward", TORCH_BOX(&shortcut_backward)); }
