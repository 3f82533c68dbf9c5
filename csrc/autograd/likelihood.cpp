// Autograd of the likelihood ops: the inputs are saved, the backward computes the gradient from them.
#include <torch/library.h>

#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct LogProb : public Function<LogProb> {
  static Tensor forward(AutogradContext* ctx, const Tensor& recon, const Tensor& x, const OptionalTensor& scale,
                        const OptionalTensor& mask, std::string_view likelihood) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({recon, x, tensor(scale), tensor(mask)});
    ctx->saved_data["likelihood"] = std::string(likelihood);
    return ops::log_prob(recon, x, scale, mask, likelihood);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needed = needs<3>(ctx, {saved[0], saved[1], saved[2]});
    BelowAutogradUnlessGraph guard;
    auto result = spread(ops::log_prob_backward(grads[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]),
                                                ctx->saved_data["likelihood"].toStringView(), needed),
                         needed);
    result.resize(5);
    return result;
  }
};

Tensor log_prob_autograd(const Tensor& recon, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& mask,
                         std::string_view likelihood) {
  return LogProb::apply(recon, x, scale, mask, likelihood);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) { m.impl("log_prob", log_prob_autograd); }

}  // namespace fastelbo::autograd
