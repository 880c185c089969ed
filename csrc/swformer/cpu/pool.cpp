// The memory that is kept for large results, seen from Python.
#include "tensor.h"

namespace {

void empty_cache() { pool::instance().clear(); }

// Uninitialised images like `like`, with another number of channels.
tensor::Tensor empty_images(const tensor::Tensor& like, int64_t channels) {
  return tensor::empty(like, {like.size(0), channels, like.size(2), like.size(3)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) {
  m.def("empty_cache() -> ()");
  m.def("empty_images(Tensor like, int channels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CompositeExplicitAutograd, m) { m.impl("empty_cache", TORCH_BOX(&empty_cache)); }

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CPU, m) { m.impl("empty_images", TORCH_BOX(&empty_images)); }
