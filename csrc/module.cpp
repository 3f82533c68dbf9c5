// The Python module: importing it loads the ops; what it offers are facts of the build.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/kernels/kernels.h"
#include "parallel.h"

#ifndef FASTELBO_CUDA_ARCHS
#define FASTELBO_CUDA_ARCHS ""
#endif

#if defined(__clang__)
#define FASTELBO_COMPILER __VERSION__  // "Debian Clang 14.0.6"
#else
#define FASTELBO_COMPILER "g++ " __VERSION__
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads fastelbo's ops; build_info() says what was built.";
  m.def("build_info", [] {
    py::list likelihoods, isas;
    for (int i = 0; i < fastelbo::likelihood_count(); ++i) likelihoods.append(fastelbo::likelihood_info(i).name);
    py::list supported;
    for (int i = 0; i < fastelbo::isa_count(); ++i) {
      isas.append(fastelbo::isa_info(i).name);
      if (fastelbo::isa_info(i).supported) supported.append(fastelbo::isa_info(i).name);
    }
    const std::string archs = FASTELBO_CUDA_ARCHS;
    return py::dict(py::arg("torch") = TORCH_VERSION, py::arg("compiler") = FASTELBO_COMPILER, py::arg("isas") = isas,
                    py::arg("isas_of_this_cpu") = supported, py::arg("isa") = fastelbo::isa_in_use().name,
                    py::arg("threads") = FASTELBO_OPENMP ? "openmp" : "serial", py::arg("cuda") = !archs.empty(),
                    py::arg("cuda_archs") = archs, py::arg("likelihoods") = likelihoods);
  });
}
