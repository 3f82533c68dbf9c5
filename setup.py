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
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

ROOT = Path(__file__).parent
CUDA_CHOICE = os.environ.get("FASTELBO_CUDA", "auto")


def lines(path: str) -> list[str]:
    """Of a list that CMakeLists.txt reads as well."""
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


def ask_nvcc(question: str, pattern: str) -> str | None:
    try:
        done = subprocess.run([f"{CUDA_HOME}/bin/nvcc", *question.split()], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(pattern, done.stdout + done.stderr)
    return found[1] if found else None


def cuda_obstacle(sources: list[str]) -> str | None:
    """Why the CUDA kernels cannot be built, or None. Whether a GPU is present does not matter."""
    nvcc, wanted = ask_nvcc("--version", r"release (\d+)"), torch.version.cuda
    if not sources:
        return "this version has no CUDA kernels"
    if wanted is None:
        return f"torch {torch.__version__} is a CPU build"
    if nvcc is None:
        return "nvcc is not found"
    return None if nvcc == wanted.split(".")[0] else f"nvcc is CUDA {nvcc}, torch is CUDA {wanted}"


def requirement() -> str:
    """A wheel needs the minor version of torch that its library was built against; the sources build with others."""
    oldest, built = "torch>=2.11", "torch=={}.{}.*".format(*torch.__version__.split(".")[:2])
    return oldest if "sdist" in sys.argv else built


def description() -> str:
    """README.md for a package index, where the files that it links to are not: their links become text."""
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n+", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE)  # pictures
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


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
flags = lines("csrc/flags.txt") + [f"-isystem{path}" for path in include_paths()]  # no warnings of torch's headers
include_dirs, library_dirs = [str(ROOT / "csrc")], []
if not obstacle:
    if not torch.cuda.is_available():  # else torch builds for the GPU that is there
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*torch.cuda.get_device_capability())
    flags.append(f'-DFASTELBO_CUDA_ARCHS="{archs}"')
    # nvcc's own toolkit, then what pip installed beside torch: a toolkit may come without cublas.h and others
    toolkit = Path(ask_nvcc("--dryrun -x cu -c /dev/null", r"TOP=(\S+)") or CUDA_HOME)
    beside_torch = Path(torch.__file__).parent.parent / f"nvidia/cu{torch.version.cuda.split('.')[0]}"
    include_dirs += [str(toolkit / "include"), str(beside_torch / "include")]
    library_dirs += [str(toolkit / "lib64"), str(beside_torch / "lib")]
setup(
    install_requires=[requirement()],
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        (CppExtension if obstacle else CUDAExtension)(
            "fastelbo._C",
            [source for source in sources if not (obstacle and source in cuda_sources)],
            include_dirs=include_dirs,
            library_dirs=library_dirs,
            extra_compile_args={"cxx": flags, "nvcc": lines("csrc/nvcc_flags.txt")},
        )
    ],
    cmdclass={"build_ext": Build},
)
