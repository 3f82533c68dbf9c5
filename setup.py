"""Builds fastelbo._C with torch.utils.cpp_extension, against the torch that is installed.

FASTELBO_CUDA=auto|0|1   auto: build the CUDA kernels where nvcc is found and its major version is torch.version.cuda's
MAX_JOBS, TORCH_CUDA_ARCH_LIST, CXX: as in every torch extension
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.path.append(sysconfig.get_path("purelib"))  # pip's isolated build hides the user's own torch: look there
    try:
        import torch
    except ImportError:
        sys.exit("fastelbo is built against your own PyTorch: first pip install torch, then pip install .")
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
CUDA_CHOICE = os.environ.get("FASTELBO_CUDA", "auto")


def lines(path: str) -> list[str]:
    """Of a list that CMakeLists.txt reads as well."""
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


def nvcc_major() -> str | None:
    try:
        text = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)", text)
    return found[1] if found else None


def cuda_obstacle(sources: list[str]) -> str | None:
    """Why the CUDA kernels cannot be built, or None. Whether a GPU is present does not matter."""
    nvcc, wanted = nvcc_major(), torch.version.cuda
    if not sources:
        return "this version has no CUDA kernels"
    if wanted is None:
        return f"torch {torch.__version__} is a CPU build"
    if nvcc is None:
        return "nvcc is not found"
    return None if nvcc == wanted.split(".")[0] else f"nvcc is CUDA {nvcc}, torch is CUDA {wanted}"


class Build(BuildExtension):
    """Keeps the objects between builds, also under pip, so that ninja compiles only what has changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / f"build/{sys.implementation.cache_tag}-torch-{torch.__version__}")


if CUDA_CHOICE not in ("auto", "0", "1"):
    sys.exit(f"FASTELBO_CUDA must be auto, 0 or 1; got {CUDA_CHOICE!r}")
sources = [f"csrc/{source}" for source in lines("csrc/sources.txt")]
cuda_sources = [source for source in sources if source.endswith(".cu") or source.startswith("csrc/cuda/")]
obstacle = "FASTELBO_CUDA=0" if CUDA_CHOICE == "0" else cuda_obstacle(cuda_sources)
if CUDA_CHOICE == "1" and obstacle:
    sys.exit(f"FASTELBO_CUDA=1, but the CUDA kernels cannot be built: {obstacle}")
print(
    f"fastelbo: for torch {torch.__version__}, " + (f"CPU only ({obstacle})" if obstacle else "CPU and CUDA"),
    flush=True,
)

os.environ.setdefault("CXX", "g++")
os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
flags = lines("csrc/flags.txt")
setup(
    ext_modules=[
        (CppExtension if obstacle else CUDAExtension)(
            "fastelbo._C",
            [source for source in sources if not (obstacle and source in cuda_sources)],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": flags, "nvcc": ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]},
        )
    ],
    cmdclass={"build_ext": Build},
)
