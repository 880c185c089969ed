// What the kernels take from this processor beyond their instruction set.
#include "pairs.h"
#include "tensor.h"

namespace {

// Whether bf16 is multiplied in pairs; `enable` says whether from now on, where the processor can.
bool multiply_in_pairs(std::optional<bool> enable) {
  if (enable) pairs::enabled() = *enable && pairs::supported();
  return pairs::enabled();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) { m.def("multiply_in_pairs(bool? enable=None) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CompositeExplicitAutograd, m) {
  m.impl("multiply_in_pairs", TORCH_BOX(&multiply_in_pairs));
}
