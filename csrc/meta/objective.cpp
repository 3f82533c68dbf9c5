// The objective ops for meta tensors and tracing: their outputs alone.
#include "prepare/objective.h"

#include <torch/library.h>

#include "prepare/implement.h"

namespace fastelbo {

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("log_mean_exp", implement_meta<prepare::log_mean_exp>);
  m.impl("_log_mean_exp_backward", implement_meta<prepare::log_mean_exp_backward>);
  m.impl("_elbo_loss_forward", implement_meta<prepare::elbo_loss_forward>);
  m.impl("_multi_sample_loss_forward", implement_meta<prepare::multi_sample_loss_forward>);
  m.impl("_multi_sample_weights", implement_meta<prepare::multi_sample_weights>);
}

}  // namespace fastelbo
