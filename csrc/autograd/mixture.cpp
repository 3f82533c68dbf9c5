// Autograd of mixtures. The responsibilities are computed again by the backward, from the log density.
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct MixtureLogProb : public Function<MixtureLogProb> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& log_weights, bool per_dimension) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor log_prob = ops::mixture_log_prob(z, mu, logvar, log_weights, per_dimension);
    ctx->save_for_backward({z, mu, logvar, tensor(log_weights), log_prob});
    ctx->saved_data["per_dimension"] = per_dimension;
    return {log_prob};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list result(5);
    const auto needed = needs<4>(ctx, saved);
    BelowAutogradUnlessGraph guard;
    std::tie(result[0], result[1], result[2], result[3]) =
        ops::mixture_log_prob_backward(grads[0], saved[0], saved[1], saved[2], optional(saved[3]),
                                       ctx->saved_data["per_dimension"].toBool(), saved[4], needed);
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("mixture_log_prob", Apply<MixtureLogProb, decltype(ops::mixture_log_prob)>::call);
}

}  // namespace fastelbo::autograd
