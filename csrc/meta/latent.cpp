// The latent ops for meta tensors and tracing: their outputs alone.
#include "prepare/latent.h"

#include <torch/library.h>

#include "prepare/implement.h"

namespace fastelbo {

TORCH_LIBRARY_IMPL(fastelbo, Meta, m) {
  m.impl("rsample", implement_meta<prepare::rsample>);
  m.impl("_rsample_backward", implement_meta<prepare::rsample_backward>);
  m.impl("_rsample_kept", implement_meta<prepare::rsample_kept>);
  m.impl("_rsample_kept_backward", implement_meta<prepare::rsample_kept_backward>);
  m.impl("gaussian_kl", implement_meta<prepare::gaussian_kl>);
  m.impl("_gaussian_kl_backward", implement_meta<prepare::gaussian_kl_backward>);
}

}  // namespace fastelbo
