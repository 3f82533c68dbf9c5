// Probabilistic PCA for meta tensors and tracing: the outputs alone.
#include "prepare/ppca.h"

#include <torch/library.h>

#include "prepare/implement.h"

namespace fastelbo {

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("_ppca_factor", implement_meta<prepare::ppca_factor>);
  m.impl("_ppca_project", implement_meta<prepare::ppca_project>);
  m.impl("_ppca_rest", implement_meta<prepare::ppca_rest>);
  m.impl("_ppca_residual", implement_meta<prepare::ppca_residual>);
}

}  // namespace fastelbo
