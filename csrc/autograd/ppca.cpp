// Autograd of probabilistic PCA. The residual is computed again by the backward: [N, M] is kept, not [N, D].
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

struct PpcaLogProb : public Function<PpcaLogProb> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& W, const Tensor& b,
                               const Tensor& log_sigma2) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [log_prob, coords, rest, basis, triangle, whiten] = ops::ppca_log_prob_forward(x, W, b, log_sigma2);
    ctx->save_for_backward({x, W, b, log_sigma2, coords, rest, basis, triangle, whiten});
    return {log_prob};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needed = needs<4>(ctx, {saved[0], saved[1], saved[2], saved[3]});
    BelowAutogradUnlessGraph guard;
    const auto [x, W, b, log_sigma2] = ops::ppca_log_prob_backward(
        grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8], needed);
    return {x, W, b, log_sigma2};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("ppca_log_prob", Apply<PpcaLogProb, decltype(ops::ppca_log_prob)>::call);
}

}  // namespace fastelbo::autograd
