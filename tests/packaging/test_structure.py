"""The Python package by its source: what imports what, and which types a user's program sees."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastelbo"


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]  # a stub: the compiled module
MODULES = {_name(path): ast.parse(path.read_text()) for path in SOURCES}
PACKAGES = {_name(path) for path in PACKAGE.rglob("__init__.py")}


def _imports(module: str) -> set[str]:
    """The modules of the package that a module imports, at any depth of its source, also for types alone.

    Who imports a module of another package, but for the root, imports that package's own module as well.
    """
    named = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= {name if name in MODULES else str(node.module) for name in inner}
    parents = {name.rpartition(".")[0] for name in named} & PACKAGES - {"fastelbo"}
    outside = {parent for parent in parents if not f"{module}.".startswith(f"{parent}.")}
    return (named & set(MODULES) | outside) - {module}


LAZY = "fastelbo.models.loading"  # imports the command, of whose runs it loads models, when it is called


def test_imports_have_no_circle():
    graph = {module: _imports(module) for module in MODULES if module != LAZY}
    assert "fastelbo.reference" in graph["fastelbo.losses.elbo"] and "fastelbo.ppca" in graph["fastelbo.commands.cli"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_the_library_imports_nothing_of_its_command():
    command = {module for module in MODULES if module.startswith("fastelbo.commands")} | {"fastelbo.__main__"}
    for module in MODULES.keys() - command - {LAZY}:
        assert not _imports(module) & command, module


def test_likelihoods_and_reference_are_at_the_bottom():
    assert not _imports("fastelbo.likelihoods")
    twins = {module for module in MODULES if f"{module}.".startswith("fastelbo.reference.")}
    assert set().union(*map(_imports, twins)) - twins == {"fastelbo.likelihoods"}


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == PACKAGES


def test_an_import_needs_torch_alone_and_loads_no_command():
    """Without numpy, which arrays alone need, and without scikit-learn."""
    program = """
import sys
sys.modules |= {"numpy": None, "sklearn": None}
import torch, fastelbo
x = torch.randn(9, 3)
print(*fastelbo.PPCA(1).fit(x, "em").log_prob(x).shape, *fastelbo.gaussian_kl(x, x).shape)
print([m for m in sys.modules if m.startswith(("fastelbo.commands", "fastelbo.sklearn"))])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "9 9\n[]\n", done.stderr


def _public_functions(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef) and (node.name in ("__init__", "__call__") or node.name[0] != "_"):
            found.append((prefix + node.name, node))
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            found += _public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.If):  # TYPE_CHECKING
            found += _public_functions(node.body, prefix)
    return found


LOSSES = [f"losses.{name}" for name in ("bounds", "elbo", "kept", "likelihood", "mixture", "multi_sample", "sampling")]
MODELS = [f"models.{name}" for name in ("diagnostics", "marginal", "objective", "vae")]
API = [*LOSSES, *MODELS, "distributions", "ppca.density", "ppca.model", "sklearn"]


@pytest.mark.parametrize("module", ["fastelbo", *(f"fastelbo.{name}" for name in API)])
def test_public_signatures_say_what_they_take(module):
    functions = _public_functions(MODULES[module].body)
    assert functions
    for name, function in functions:
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        annotations = [a.annotation for a in (*parameters, arguments.vararg, arguments.kwarg) if a and a.annotation]
        for annotation in (*annotations, function.returns):
            assert annotation is not None, f"{name}: no type of what it returns"
            assert "Any" not in {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}, f"{name}: Any"


@pytest.mark.slow
def test_a_user_s_program_has_types():
    """mypy's own configuration is not read: the program is checked as that of a user, --strict."""
    program = ROOT / "tests/typed_program.py"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", program],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# C++

CSRC = ROOT / "csrc"
TORCH_FREE = [CSRC / "math", CSRC / "likelihoods", CSRC / "cpu/kernels", CSRC / "cuda/kernels"]
HALF = {"c10/util/BFloat16.h", "c10/util/Half.h"}  # headers of numbers, which need no library


def _included(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("folder", TORCH_FREE, ids=lambda f: str(f.relative_to(CSRC)))
def test_kernels_maths_and_likelihoods_include_no_torch(folder):
    files = [p for p in folder.iterdir() if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert len(files) > 2
    for path in files:
        torch = {name for name in _included(path) if name.startswith(("ATen/", "c10/", "torch/")) or "pybind" in name}
        assert torch <= HALF, path
        # nor by way of the folders that prepare and dispatch
        upward = {name for name in _included(path) if name.startswith(("prepare/", "autograd/", "composite/"))}
        assert not upward and "ops.h" not in _included(path), path


def test_maths_and_likelihoods_know_no_device():
    for path in [*(CSRC / "math").iterdir(), *(CSRC / "likelihoods").iterdir()]:
        assert not {name for name in _included(path) if name.startswith(("cpu/", "cuda/"))}, path


def test_an_instruction_set_is_named_in_one_place():
    """Code asks for its properties: math/isa.h says which it has."""
    for path in CSRC.rglob("*.[hc]*"):
        if path.name != "isa.h" and not path.name.startswith("isa_"):
            assert "X86_LEVEL" not in path.read_text(), path


def test_every_source_is_compiled_once_and_no_cuda_file_lies_in_a_cpu_folder():
    """Listed, or included by a listed source that is a list of includes and nothing else."""
    listed = [n for n in (CSRC / "sources.txt").read_text().splitlines() if n and not n.startswith("#")]
    for unit in ("bindings.cpp", "cuda/bindings.cpp"):
        code = [line for line in (CSRC / unit).read_text().splitlines() if not line.startswith("//")]
        assert all(line.startswith('#include "') for line in code), unit
        listed += _included(CSRC / unit)
    files = {str(p.relative_to(CSRC)) for p in CSRC.rglob("*") if p.suffix in (".cpp", ".cu")}
    assert sorted(listed) == sorted(files)
    for path in CSRC.rglob("*.cu*"):
        assert path.relative_to(CSRC).parts[0] == "cuda", path
