// The likelihood ops for meta tensors and tracing: their outputs alone.
#include "prepare/likelihood.h"

#include <torch/library.h>

#include "prepare/implement.h"

namespace fastelbo {

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("log_prob", implement_meta<prepare::log_prob>);
  m.impl("_log_prob_backward", implement_meta<prepare::log_prob_backward>);
}

}  // namespace fastelbo
