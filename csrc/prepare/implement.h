// From an op's prepare step and a device's way of running it to the function that the dispatcher calls.
//
// A prepare step checks the arguments, allocates the outputs and, except for meta tensors, describes both to the
// kernels. It returns a struct with those outputs, and with result(), which finishes and returns them. So an op's
// signature and checks are written once for meta tensors, CPU and CUDA.
#pragma once

#include <torch/library.h>

#include <utility>

namespace fastelbo {

template <auto prepare, auto run>
struct Implementation;

template <class Prepared, class... A, Prepared (*prepare)(A...), void (*run)(Prepared&)>
struct Implementation<prepare, run> {
  static auto call(A... arguments) {
    Prepared prepared = prepare(std::forward<A>(arguments)...);
    run(prepared);
    return prepared.result();
  }
};

// m.impl("name", implement<prepare::name, run>)
template <auto prepare, auto run>
inline constexpr auto* implement = &Implementation<prepare, run>::call;

// On meta tensors the outputs are all there is.
template <class Prepared>
void only_outputs(Prepared&) {}

template <auto prepare>
struct OnMeta;
template <class Prepared, class... A, Prepared (*prepare)(A...)>
struct OnMeta<prepare> : Implementation<prepare, &only_outputs<Prepared>> {};

// In a TORCH_LIBRARY_FRAGMENT: the op on the CPU, and on meta tensors, which tracing needs.
template <auto prepare, auto run>
void on_cpu_and_meta(torch::Library& m, const char* name) {
  m.impl(name, torch::dispatch(c10::DispatchKey::CPU, implement<prepare, run>));
  m.impl(name, torch::dispatch(c10::DispatchKey::Meta, &OnMeta<prepare>::call));
}

}  // namespace fastelbo
