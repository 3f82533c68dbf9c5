// What the autograd functions share.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "aten.h"
#include "ops.h"

namespace fastelbo::autograd {

using namespace ops;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

inline Tensor tensor(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
inline bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool wants_grad(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }

// Whether each of the first N saved inputs needs a gradient now; they are in the order of apply()'s tensor arguments,
// and undefined ones have no edge.
template <size_t N>
std::array<bool, N> needs(AutogradContext* ctx, at::TensorList inputs) {
  std::array<bool, N> result{};
  size_t edge = 0;
  for (size_t i = 0; i < std::min(N, inputs.size()); ++i) {
    if (inputs[i].defined()) result[i] = ctx->needs_input_grad(edge++);
  }
  return result;
}

// The backward ops dispatch to the device's kernel; where a graph of the gradient is being built they go through
// autograd, which there is the plain-PyTorch twin (fastelbo/_internal/ops.py).
class BelowAutogradUnlessGraph {
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;

 public:
  BelowAutogradUnlessGraph() {
    if (!at::GradMode::is_enabled()) guard_.emplace();
  }
};

// Saves the tensors that a backward may change or hand out, and notes whether hooks on saved tensors get them too.
inline void save(AutogradContext* ctx, variable_list tensors) {
  if (torch::autograd::Engine::get_default_engine().get_default_saved_variable_hooks())
    ctx->saved_data["hooked"] = true;
  ctx->save_for_backward(std::move(tensors));
}

// Whether saved tensors may be changed or handed out: the graph is freed after this backward, and no hook on saved
// tensors can have kept them. Otherwise a second backward, or a user's in-place change, would spoil them.
inline bool owns_saved(AutogradContext* ctx) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !ctx->saved_data.count("hooked");
}

// An upstream gradient on the CPU as a number.
inline double number(const Tensor& t) {
  const bool lies = t.scalar_type() == at::kFloat && !t.is_neg() && !t._is_zerotensor();
  return lies ? double(*t.const_data_ptr<float>()) : t.item<double>();
}

// A saved gradient of a scalar loss times the upstream gradient; undefined if that is. owned: owns_saved().
inline Tensor scaled(const Tensor& saved, const Tensor& grad_loss, bool owned) {
  if (!saved.defined()) return {};
  if (at::isTensorSubclassLike(grad_loss)) return saved * grad_loss;
  if (!owned) return grad_loss.is_cpu() ? saved * number(grad_loss) : saved * grad_loss;
  if (grad_loss.is_cuda()) {
    const Tensor result = saved.detach();
    ops::scale_(result, grad_loss);  // the factor is read on the device: nothing waits for it
    return result;
  }
  if (!grad_loss.is_cpu()) return saved * grad_loss;
  const double factor = number(grad_loss);
  return factor == 1 ? saved : saved.detach().mul_(factor);
}

inline Tensor from_list(const variable_list& outputs, Tensor*) { return outputs[0]; }
// What a loss returns beside its outputs, the gradients that its forward computed, is not for the caller: undefined.
template <class... T>
std::tuple<T...> from_list(const variable_list& outputs, std::tuple<T...>*) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::tuple<T...>{(i < outputs.size() ? outputs[i] : Tensor())...};
  }(std::index_sequence_for<T...>());
}

// Registers an autograd function whose forward takes the arguments of the op, in their order, or a struct of them.
template <class F, class TheOp>
struct Apply;
template <class F, Name name, class R, class... A>
struct Apply<F, const Op<name, R(A...)>> {
  static R call(A... arguments) {
    if (!at::GradMode::is_enabled()) {  // nothing is saved
      at::AutoDispatchBelowADInplaceOrView guard;
      return Op<name, R(A...)>{}(std::forward<A>(arguments)...);
    }
    return from_list(F::apply(std::forward<A>(arguments)...), static_cast<R*>(nullptr));
  }
};

}  // namespace fastelbo::autograd
