"""The compiled library: loads it, calls its ops or their twins, and gives its backward ops their derivatives."""

import json
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastelbo import reference

_R = TypeVar("_R")
_ROOT = Path(__file__).resolve().parents[2]
_FROM_SOURCES = (_ROOT / "csrc").is_dir()
_PIP = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"  # pip's cache: of another torch


def _rebuild() -> str:
    """How to build this version again, from what it was installed from."""
    if _FROM_SOURCES:
        return f"build it again: {_PIP} -e {shlex.quote(str(_ROOT))}"
    try:
        installed = distribution("fastelbo")
    except PackageNotFoundError:
        return f"build it again, in the folder of fastelbo's sources: {_PIP} ."
    pip = f"uv {_PIP}" if (installed.read_text("INSTALLER") or "").strip() == "uv" else _PIP
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if not url:
        return f"build it again: {pip} --no-binary fastelbo fastelbo=={installed.version}"
    if url.endswith(".whl"):
        return "build the wheel again, in the folder of fastelbo's sources: pip wheel --no-build-isolation --no-deps ."
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    elif url.startswith("file:"):
        url = url2pathname(urlsplit(url).path)
        if not (Path(url).is_file() or Path(url, "setup.py").is_file()):
            return f"build it again, in the folder of fastelbo's sources, which is no longer {url}: {pip} ."
    return f"build it again: {pip} {shlex.quote(url)}"


if find_spec("fastelbo._C") is None:
    if _FROM_SOURCES:
        _where = "you are in the source folder" if Path.cwd() == _ROOT else "this is the source folder"
        raise ImportError(
            f"{_where} {_ROOT}, whose library is not compiled for this Python; import an installed fastelbo from "
            f"another folder, or compile it here: pip install --no-build-isolation -e {shlex.quote(str(_ROOT))}"
        )
    raise ImportError(f"fastelbo's compiled library is not here, or is one for another Python; {_rebuild()}")
try:
    from fastelbo import _C as _C
except ImportError as error:
    raise ImportError(f"fastelbo was not built against this PyTorch ({torch.__version__}); {_rebuild()}") from error

_BUILT_AGAINST = _C.build_info()["torch"]
if torch.__version__.split(".")[:2] != _BUILT_AGAINST.split(".")[:2]:
    raise ImportError(
        f"fastelbo was built against PyTorch {_BUILT_AGAINST}, but this is PyTorch {torch.__version__}; {_rebuild()}"
    )

reference.random.KERNEL_DEVICES |= {"cpu", "meta", *(["cuda"] if _C.build_info()["cuda"] else [])}


# ---------------------------------------------------------------------------------------------------------------------
# Calls: of an op, or of its twin.


class _Mode(threading.local):
    """How many blocks of `reference_mode` are open. Not a ContextVar: torch.compile cannot trace or guard one."""

    def __init__(self) -> None:
        self.blocks = 0


_mode = _Mode()


@contextmanager
def reference_mode() -> Iterator[None]:
    """Within it, every function takes the plain-PyTorch path of `fastelbo.reference`: to compare, or to debug.

    It holds for the thread that entered it, and for every task of that thread, until the last open block ends.
    `torch.compile` guards on it: a compiled function is traced once within and once without. A backward follows the
    path on which its graph was recorded. Where checkpointing computes anew on a thread of autograd's own (on CUDA
    devices), enter the mode inside the checkpointed function.
    """
    _mode.blocks += 1
    try:
        yield
    finally:
        _mode.blocks -= 1


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an op, those in lists too."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list):
            yield from _tensors(a)


def check(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run the op's own checks of its arguments, on tensors without data: for a call that its twin computes."""

    def stand_in(a: Any) -> Any:
        if isinstance(a, list):
            return [stand_in(item) for item in a]
        if not isinstance(a, Tensor):
            return a
        return torch.empty(a.shape, dtype=a.dtype, device="meta", requires_grad=a.requires_grad)

    with torch._C._DisableFuncTorch(), torch._C._AutoDispatchBelowAutograd():
        op(*map(stand_in, args))


def takes_twins(t: Tensor) -> bool:
    """Whether plain PyTorch computes: in reference mode, under torch.func, in forward-mode AD, without kernels, for
    ONNX, which has no function for an op."""
    devices = reference.random.KERNEL_DEVICES
    return (
        _mode.blocks > 0
        or reference.exports_to_onnx()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not ((t.is_cpu and "cpu" in devices) or t.device.type in devices)  # is_cpu takes a fifth of the time
    )


def call(op: Callable[..., Any], twin: Callable[..., _R], *args: Any) -> _R:
    """The op, or its plain-PyTorch twin."""
    first = args[0]
    if takes_twins(first[0] if isinstance(first, list) else first):
        if not torch.compiler.is_compiling():
            check(op, args)
        return twin(*args)
    return op(*args)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of the backward ops. Their Autograd key is reached only where a graph of the gradient is being built. The
# result is then that of the twin, made of differentiable operations, so that second and higher derivatives are right.

_library = torch.library.Library("fastelbo", "IMPL")


def _register(name: str) -> None:
    op, twin = getattr(torch.ops.fastelbo, name).default, getattr(reference, name.lstrip("_"))

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            return twin(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, autograd, "Autograd")


for _name in (
    "_log_prob_backward",
    "_log_prob_elements_backward",
    "_gaussian_kl_backward",
    "_rsample_backward",
    "_log_mean_exp_backward",
    "_multi_sample_weights",
    "_mixture_log_prob_backward",
    "_ppca_log_prob_backward",
):
    _register(_name)
