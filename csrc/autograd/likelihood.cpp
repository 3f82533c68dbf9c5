// Autograd of the likelihood ops: the inputs are saved, the backward computes the gradient from them.
#include "autograd/common.h"

namespace fastelbo::autograd {
namespace {

template <const auto& op, const auto& backward_op>
struct LogProb : public Function<LogProb<op, backward_op>> {
  static variable_list forward(AutogradContext* ctx, at::TensorList parameters, const Tensor& x,
                               const OptionalTensor& mask, std::string_view likelihood) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved(parameters.begin(), parameters.end());
    saved.push_back(x), saved.push_back(tensor(mask));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["likelihood"] = std::string(likelihood);
    return {op(parameters, x, mask, likelihood)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const size_t count = saved.size() - 2;
    const auto needed = needs<kMaxParameters + 1>(ctx, at::TensorList(saved).slice(0, count + 1));
    std::array<bool, kMaxParameters + 1> wanted{};
    for (size_t i = 0; i < count; ++i) wanted[i] = needed[i];
    wanted[kMaxParameters] = needed[count];
    BelowAutogradUnlessGraph guard;
    const auto found = backward_op(grads[0], at::TensorList(saved).slice(0, count), saved[count],
                                   optional(saved[count + 1]), ctx->saved_data["likelihood"].toStringView(), wanted);
    const std::array<Tensor, kMaxParameters> of = some_of<kMaxParameters>(found);
    variable_list result(of.begin(), of.begin() + count);
    result.resize(count + 3);
    result[count] = std::get<kMaxParameters>(found);
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastelbo, Autograd, m) {
  m.impl("log_prob", Apply<LogProb<ops::log_prob, ops::log_prob_backward>, decltype(ops::log_prob)>::call);
  m.impl(
      "log_prob_elements",
      Apply<LogProb<ops::log_prob_elements, ops::log_prob_elements_backward>, decltype(ops::log_prob_elements)>::call);
}

}  // namespace fastelbo::autograd
