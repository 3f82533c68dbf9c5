// Autograd of the likelihood ops: the inputs are saved, the backward computes the gradient from them.
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct LogProb : public Function<LogProb> {
  enum { kRecon, kX, kSecond, kThird, kMask, kLikelihood, kArguments };

  static variable_list forward(AutogradContext* ctx, const Tensor& recon, const Tensor& x, const OptionalTensor& second,
                               const OptionalTensor& third, const OptionalTensor& mask, std::string_view likelihood) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({recon, x, tensor(second), tensor(third), tensor(mask)});
    ctx->saved_data["likelihood"] = std::string(likelihood);
    return {ops::log_prob(recon, x, second, third, mask, likelihood)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &recon = saved[kRecon], &x = saved[kX], &second = saved[kSecond], &third = saved[kThird];
    variable_list result(kArguments);
    BelowAutogradUnlessGraph guard;
    std::tie(result[kRecon], result[kX], result[kSecond], result[kThird]) =
        ops::log_prob_backward(grads[0], recon, x, optional(second), optional(third), optional(saved[kMask]),
                               ctx->saved_data["likelihood"].toStringView(), needs<4>(ctx, {recon, x, second, third}));
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) { m.impl("log_prob", Apply<LogProb, decltype(ops::log_prob)>::call); }

}  // namespace fastelbo::autograd
