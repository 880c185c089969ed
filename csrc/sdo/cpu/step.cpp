// A sampler's update in one pass: guidance, the affine combination of the state, the model's output and further terms,
// and optionally the clipped predicted sample.
//   eps = uncond + guidance (cond - uncond)
//   out = a x + b eps + c clamp(pred_x x + pred_eps eps, -clip, clip) + sum_k scales[k] terms[k]
#include "elementwise.h"

namespace {

using sdo::Tensor;

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

  tensor::dispatch(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = simd::Acc<T>;
    const sdo::Update<A> update{A(a), A(b), A(c), A(pred_x), A(pred_eps), A(clip.value_or(0))};
    const A w = guidance;
    A scale[sdo::kMaxTerms];
    std::copy(scales.begin(), scales.end(), scale);
    sdo::with_flag(uncond.has_value(), [&](auto guided) {
      sdo::with_flag(clip.has_value(), [&](auto clipped) {
        sdo::for_each_vector<T>(operands, [=](const auto& load, const auto& store) {
          auto eps = load(2);
          if constexpr (guided.value) eps = sdo::guide(load(3), eps, w);
          auto next = update.template next<clipped.value>(load(1), eps);
          for (int k = 0; k < count; ++k) next += scale[k] * load((guided.value ? 4 : 3) + k);
          store(0, next);
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_sdo_fast, m) {
  m.def(
      "sampler_step(Tensor x, Tensor cond, Tensor? uncond, float guidance, float a, float b, Tensor[] terms, float[] "
      "scales,"
      " float c, float pred_x, float pred_eps, float? clip, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(_sdo_fast, CPU, m) { m.impl("sampler_step", TORCH_BOX(&sampler_step)); }
