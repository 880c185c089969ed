// A sampler's update in one kernel; the formula stands in ../cpu/step.cpp.
#include "elementwise.cuh"

namespace {

using sdo::Tensor;

template <class T, bool kGuided, bool kClipped>
struct Step {
  using Element = T;
  using A = sdo::Acc<T>;
  sdo::Update<A> update;
  A guidance;
  int count;  // of the terms, which are the last operands
  A scale[sdo::kMaxTerms];

  template <int kWidth, class Cursor>
  __device__ void operator()(const Cursor& cursor) const {
    A x[kWidth], eps[kWidth], other[kWidth];
    cursor.load(1, x);
    cursor.load(2, eps);
    if constexpr (kGuided) {
      cursor.load(3, other);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) eps[i] = sdo::guide(other[i], eps[i], guidance);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = update.template next<kClipped>(x[i], eps[i]);
    for (int k = 0; k < count; ++k) {
      cursor.load((kGuided ? 4 : 3) + k, other);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] += scale[k] * other[i];
    }
    cursor.store(0, x);
  }
};

void sampler_step(
    const Tensor& x, const Tensor& cond, const std::optional<Tensor>& uncond, double guidance, double a, double b,
    const std::vector<Tensor>& terms, const std::vector<double>& scales, double c, double pred_x, double pred_eps,
    std::optional<double> clip, const Tensor& out) {
  const int count = static_cast<int>(terms.size());
  STD_TORCH_CHECK(count <= sdo::kMaxTerms, "expected at most ", sdo::kMaxTerms, " terms, got ", count);
  STD_TORCH_CHECK(scales.size() == terms.size(), "expected ", count, " scales, got ", scales.size());
  sdo::Operands operands;
  operands.add(out, true);
  operands.add(x);
  operands.add(cond);
  operands.add(uncond);
  for (const Tensor& term : terms) operands.add(term);

  sdo::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = sdo::Acc<T>;
    sdo::with_flag(uncond.has_value(), [&](auto guided) {
      sdo::with_flag(clip.has_value(), [&](auto clipped) {
        Step<T, guided.value, clipped.value> body{
            {A(a), A(b), A(c), A(pred_x), A(pred_eps), A(clip.value_or(0))}, A(guidance), count, {}};
        std::copy(scales.begin(), scales.end(), body.scale);
        sdo::for_each_pack(operands, body);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_sdo_fast_cuda, m) {
  m.def(
      "sampler_step(Tensor x, Tensor cond, Tensor? uncond, float guidance, float a, float b, Tensor[] terms, float[] "
      "scales,"
      " float c, float pred_x, float pred_eps, float? clip, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(_sdo_fast_cuda, CUDA, m) { m.impl("sampler_step", TORCH_BOX(&sampler_step)); }
