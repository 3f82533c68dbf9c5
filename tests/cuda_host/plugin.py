"""pytest -p cuda_host.plugin: fastelbo's CUDA kernels, run on the host, in place of the CPU's.

FASTELBO_CUDA_HOST is the library that CMake builds for this (target cuda_host). It registers its kernels for CPU
tensors after fastelbo has registered its own, and the later ones are used: every test of the ops tests the CUDA
sources.
"""

import os

import torch

import fastelbo  # noqa: F401  first its schemas, its autograd and its CPU kernels

torch.ops.load_library(os.environ["FASTELBO_CUDA_HOST"])
