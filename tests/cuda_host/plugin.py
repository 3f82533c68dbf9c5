"""pytest -p cuda_host.plugin: fastelbo's CUDA kernels, run on the host, in place of the CPU's.

FASTELBO_CUDA_HOST is the library that CMake builds for this (target cuda_host). It is loaded as fastelbo._C before
fastelbo is imported, so that every test of the ops becomes a test of the CUDA sources.
"""

import importlib.util
import os
import sys

import torch  # noqa: F401  its libraries have to be there first

spec = importlib.util.spec_from_file_location("fastelbo._C", os.environ["FASTELBO_CUDA_HOST"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["fastelbo._C"] = module
spec.loader.exec_module(module)
