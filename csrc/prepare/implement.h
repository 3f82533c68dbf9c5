// From an op's prepare step and a device's way of running it to the function that the dispatcher calls.
//
// A prepare step checks the arguments, allocates the outputs and, except for meta tensors, describes both to the
// kernels. It returns a struct with those outputs, and with result(), which finishes and returns them. So an op's
// signature and checks are written once for meta tensors, CPU and CUDA.
#pragma once

#include <torch/library.h>

#include <type_traits>
#include <utility>

#include "ops.h"

namespace fastelbo {

// The prepare step takes the arguments of the op, or a struct of them.
template <const auto& op, auto prepare, auto run>
struct Implementation;

template <ops::Name name, class R, class... A, const ops::Op<name, R(A...)>& op, auto prepare, auto run>
struct Implementation<op, prepare, run> {
  static R call(A... arguments) {
    auto prepared = [&] {
      if constexpr (requires { prepare(std::forward<A>(arguments)...); }) {
        return prepare(std::forward<A>(arguments)...);
      } else {
        return prepare({std::forward<A>(arguments)...});
      }
    }();
    if constexpr (!std::is_null_pointer_v<decltype(run)>) run(prepared);
    return prepared.result();
  }
};

// m.impl("name", implement<ops::name, prepare::name, run>)
template <const auto& op, auto prepare, auto run>
inline constexpr auto* implement = &Implementation<op, prepare, run>::call;

// In a TORCH_LIBRARY_FRAGMENT: the op on the CPU, and on meta tensors, which tracing needs: there the outputs are all
// there is.
template <const auto& op, auto prepare, auto run>
void on_cpu_and_meta(torch::Library& m, const char* name) {
  m.impl(name, torch::dispatch(c10::DispatchKey::CPU, implement<op, prepare, run>));
  m.impl(name, torch::dispatch(c10::DispatchKey::Meta, implement<op, prepare, nullptr>));
}

}  // namespace fastelbo
