// The memory that is kept for large results, seen from Python.
#include "tensor.h"

namespace {

void empty_cache() { pool::instance().clear(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(_swformer_fast, m) { m.def("empty_cache() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(_swformer_fast, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}
