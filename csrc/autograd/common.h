// What the autograd functions share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include "ops.h"

namespace fastelbo::autograd {

using namespace ops;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline Tensor tensor(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
inline bool wants_grad(const Tensor& t) { return t.requires_grad(); }
inline bool wants_grad(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }

// Whether a gradient that is computed in the forward and multiplied by the upstream one in the backward is as good as
// one computed in the backward. float16 loses by it: what is too small for it is gone before a gradient scaler's 2^16,
// which exists to save just that. bfloat16 has the range of float, and a scaler's power of two multiplies exactly.
inline bool keeps_precision(const Tensor& t) { return !t.requires_grad() || t.scalar_type() != at::kHalf; }
inline bool keeps_precision(const OptionalTensor& t) { return !t.has_value() || keeps_precision(*t); }

// Whether each of these saved inputs needs a gradient now; the list is in the order of apply()'s tensor arguments, and
// undefined ones have no edge.
template <size_t N>
std::array<bool, N> needs(AutogradContext* ctx, const std::array<Tensor, N>& inputs) {
  std::array<bool, N> result{};
  size_t edge = 0;
  for (size_t i = 0; i < N; ++i) {
    if (inputs[i].defined()) result[i] = ctx->needs_input_grad(edge++);
  }
  return result;
}

// The backward ops dispatch to the device's kernel; where a graph of the gradient is being built they go through
// autograd, which there is the plain-PyTorch twin (fastelbo/_ops.py).
class BelowAutogradUnlessGraph {
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;

 public:
  BelowAutogradUnlessGraph() {
    if (!at::GradMode::is_enabled()) guard_.emplace();
  }
};

// Hands out the gradients that a backward op returned to the inputs that asked for them.
template <size_t N>
variable_list spread(Tensors grads, const std::array<bool, N>& needed) {
  variable_list result(N);
  size_t next = 0;
  for (size_t i = 0; i < N; ++i) {
    if (needed[i]) result[i] = std::move(grads[next++]);
  }
  return result;
}

// Per-datum upstream gradients [B] of a reduced loss.
inline Tensor per_datum(const Tensor& grad_loss, std::string_view reduction, c10::SymInt B) {
  if (reduction == "none") return grad_loss;
  const Tensor g = reduction == "mean" ? grad_loss.div(at::Scalar(B)) : grad_loss;
  return g.expand_symint({B});
}

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

// The saved gradients of a scalar loss times the upstream gradient, into the places that `wanted` (a bit per place)
// names.
template <size_t N>
void scale_saved(const variable_list& saved, size_t first, const Tensor& grad_loss, int64_t wanted, bool owned,
                 const int (&places)[N], variable_list& result) {
  const bool real = !at::isTensorSubclassLike(grad_loss), plain = real && grad_loss.is_cpu();
  const double factor = plain ? number(grad_loss) : 1;
  for (size_t i = 0; i < N; ++i) {
    if (!(wanted >> i & 1)) continue;
    const Tensor& g = saved[first++];
    Tensor& to = result[places[i]];
    if (real && owned && grad_loss.is_cuda()) {
      to = g.detach();
      ops::scale_(to, grad_loss);  // the factor is read on the device: nothing waits for it
    } else if (!plain) {
      to = g * grad_loss;
    } else if (!owned) {
      to = g * factor;
    } else {
      to = factor == 1 ? g : g.detach().mul_(factor);
    }
  }
}

}  // namespace fastelbo::autograd
