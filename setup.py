"""Builds fastelbo._C with torch.utils.cpp_extension, against the torch that is installed.

FASTELBO_CUDA=auto|0|1   auto: build the CUDA kernels where nvcc is found and its major version is torch.version.cuda's
MAX_JOBS=N               compilers at a time; by default as the cores and the memory allow that this process may use
TORCH_CUDA_ARCH_LIST, CXX: as in every torch extension
"""

import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools

try:
    import torch
except ModuleNotFoundError:
    sys.path.append(sysconfig.get_path("purelib"))  # pip's isolated build hides the user's own torch: look there
    try:
        import torch
    except ModuleNotFoundError as error:
        sys.exit(
            f"fastelbo is built against your own PyTorch, which this build does not see ({error}): "
            "pip install torch, then pip install --no-build-isolation ."
        )

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

ROOT = Path(__file__).parent
CUDA_CHOICE = os.environ.get("FASTELBO_CUDA", "auto")
COMPILES = {"bdist_wheel", "editable_wheel", "build", "build_ext", "develop", "install"}
COMPILER_GB = 1.3  # that the largest source takes
OLDEST = {"torch": "2.11", "setuptools": "77"}


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


PROBE = """
#if !defined(__clang__) && __GNUC__ < 12 || defined(__clang__) && __clang_major__ < 14
#error this is not g++ 12 or later, or clang 14 or later
#endif
#include <Python.h>
#include <vector>
"""


def compiler_obstacle() -> str | None:
    """Why CXX cannot compile the sources, or None: what it says of a few lines, with the flags of all."""
    flags = [*lines("csrc/flags.txt"), f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c++", "-"]
    command = [*shlex.split(os.environ["CXX"]), *flags]
    try:
        done = subprocess.run(command, input=PROBE, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    except OSError as error:
        return error.strerror
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return errors[0] if errors else f"it exits with {done.returncode}"


def control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups, of either version, and of those above them."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else ():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.strip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def numbers(path: Path) -> list[float]:
    """Of a control group's file; "max" and -1 are no limit."""
    words = path.read_text().split() if path.is_file() else []
    return [math.inf if word in ("max", "-1") else float(word) for word in words]


def cores(root: Path = Path("/")) -> int:
    """How many this process may use: by its affinity, and by the quotas of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    allowed: list[float] = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    for group in control_groups(root):
        quota = numbers(group / "cpu.max") or numbers(group / "cpu.cfs_quota_us") + numbers(group / "cpu.cfs_period_us")
        if quota:
            allowed.append(quota[0] / quota[1])
    return max(1, int(min(allowed)))


def memory_gb(root: Path = Path("/")) -> float:
    """What is left of the machine, and of its control groups' limits beside what their processes hold."""

    def found(pattern: str, path: Path) -> float:
        match = re.search(pattern, path.read_text(), re.MULTILINE) if path.is_file() else None
        return float(match[1]) if match else math.nan

    left = [found(r"^MemAvailable: +(\d+)", root / "proc/meminfo") * 1024]
    for group in control_groups(root):
        held = found(r"^(?:anon|total_rss) (\d+)", group / "memory.stat")  # without the page cache, which gives way
        left += [limit - held for name in ("memory.max", "memory.limit_in_bytes") for limit in numbers(group / name)]
    return min((n for n in left if not math.isnan(n)), default=math.inf) / 1e9


def requirement() -> str:
    """A wheel needs the minor version of torch that its library was built against; the sources build with others."""
    oldest, built = f"torch>={OLDEST['torch']}", "torch=={}.{}.*".format(*torch.__version__.split(".")[:2])
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


for module in (torch, setuptools):
    oldest = OLDEST[module.__name__]
    if [int(n) for n in re.findall(r"\d+", module.__version__)[:2]] < [int(n) for n in oldest.split(".")]:
        sys.exit(
            f"fastelbo needs {module.__name__} {oldest} or later; this is {module.__version__}: "
            f"pip install --upgrade {module.__name__}"
        )
if CUDA_CHOICE not in ("auto", "0", "1"):
    sys.exit(f"FASTELBO_CUDA must be auto, 0 or 1; got {CUDA_CHOICE!r}")
sources = [f"csrc/{source}" for source in lines("csrc/sources.txt")]
cuda_sources = [source for source in sources if source.endswith(".cu") or source.startswith("csrc/cuda/")]
obstacle = "FASTELBO_CUDA=0" if CUDA_CHOICE == "0" else cuda_obstacle(cuda_sources)
if CUDA_CHOICE == "1" and obstacle:
    sys.exit(f"FASTELBO_CUDA=1, but the CUDA kernels cannot be built: {obstacle}")
os.environ.setdefault("CXX", "g++")
if COMPILES & set(sys.argv):  # what cannot work is refused here, before anything is compiled
    if wrong := compiler_obstacle():
        sys.exit(f"fastelbo needs g++ 12 or clang 14, or later, and Python's headers; CXX={os.environ['CXX']}: {wrong}")
    if not os.environ.get("MAX_JOBS"):
        memory = memory_gb()
        if memory < COMPILER_GB:
            sys.exit(
                f"fastelbo: a compiler takes up to {COMPILER_GB} GB of memory, and {memory:.1f} GB are available: "
                "free some, or set MAX_JOBS=1 to build all the same"
            )
        os.environ["MAX_JOBS"] = str(int(min(cores(), memory / COMPILER_GB)))
what = f"CPU only ({obstacle})" if obstacle else "CPU and CUDA"
print(f"fastelbo: for torch {torch.__version__}, {what}, MAX_JOBS={os.environ.get('MAX_JOBS')}", flush=True)
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
setuptools.setup(
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
