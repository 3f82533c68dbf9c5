"""Builds fastelbo._C with torch.utils.cpp_extension, against the torch that is installed.

FASTELBO_CUDA=auto|0|1   auto: build the CUDA kernels where nvcc is found and its major version is torch.version.cuda's
MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX: as in every torch extension
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("fastelbo is built against your own PyTorch: pip install torch, then pip install --no-build-isolation .")

ROOT = Path(__file__).parent


def lines(path: str) -> list[str]:
    """Of a list that CMakeLists.txt reads as well."""
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


if platform.system() == "Windows":
    sys.exit("fastelbo is built with g++ on Linux; Windows is not supported yet")
os.environ.setdefault("CXX", "g++")
os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))

setup(
    ext_modules=[
        CppExtension(
            "fastelbo._C",
            [f"csrc/{source}" for source in lines("csrc/sources.txt")],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": lines("csrc/flags.txt")},
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
print(f"fastelbo: built against torch {torch.__version__}, CPU only", file=sys.stderr)
