"""What setup.py makes of the sources, and what an import says that cannot load the library; nothing is compiled."""

import email
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[2]


def setup(folder: Path, *arguments: str) -> str:
    env = os.environ | {"FASTELBO_CUDA": "0"}
    command = [sys.executable, "setup.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: setuptools writes beside them."""
    folder = tmp_path_factory.mktemp("tree") / "fastelbo"
    ignored = shutil.ignore_patterns("build", "dist", ".*venv*", ".git", "*.egg-info", "*.so", "*cache*", "runs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def wheel_metadata(tree: Path) -> email.message.Message:
    """Of a wheel: what pip asks for before it builds one."""
    setup(tree, "-q", "dist_info", "--output-dir", str(tree.parent))
    (folder,) = tree.parent.glob("*.dist-info")
    return email.message_from_string((folder / "METADATA").read_text())


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    setup(tree, "-q", "sdist", "--dist-dir", str(tree.parent))
    (path,) = tree.parent.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tree.parent / "unpacked")  # filter="data" came with Python 3.11.4
    (folder,) = (tree.parent / "unpacked").iterdir()
    return folder


def of_torch(metadata: email.message.Message) -> list[str]:
    return [name for name in metadata.get_all("Requires-Dist", []) if "extra" not in name]


def test_a_wheel_requires_the_minor_version_that_it_was_built_against(wheel_metadata: email.message.Message) -> None:
    major, minor, *_ = torch.__version__.split(".")
    assert of_torch(wheel_metadata) == [f"torch=={major}.{minor}.*"]


def test_an_sdist_requires_what_it_builds_with(sdist: Path) -> None:
    assert of_torch(email.message_from_string((sdist / "PKG-INFO").read_text())) == ["torch>=2.11"]


def test_the_sdist_has_all_files(sdist: Path) -> None:
    """All of the checkout but what git reads alone."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list to compare with")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True)
    files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} - {".gitignore"}
    there = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert files - there == set()
    assert {name for name in there - files if "egg-info" not in name} == {"PKG-INFO", "setup.cfg"}


def test_the_description_has_no_link_that_an_index_cannot_follow(wheel_metadata: email.message.Message) -> None:
    text = str(wheel_metadata.get_payload())
    assert wheel_metadata["Description-Content-Type"] == "text/markdown"
    assert "import fastelbo" in text and "You have X, write Y: a plain script" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith(("https://", "#")) for target in targets), targets


def test_metadata(wheel_metadata: email.message.Message) -> None:
    assert wheel_metadata["Name"] == "fastelbo" and wheel_metadata["License-Expression"] == "BSD-3-Clause"
    assert wheel_metadata["Author"] and len(wheel_metadata.get_all("Classifier")) > 5
    assert set(wheel_metadata.get_all("Provides-Extra")) == {"h5ad", "sklearn", "train"}


# ----------------------------------------------------------------------------------------------------------------------
# What cannot work is refused in one line, before anything is compiled.


@pytest.fixture
def run_setup(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs setup.py up to its call of setuptools, and returns its names; the variables are those of the environment."""

    def run(command: str = "build_ext", **variables: str) -> dict[str, Any]:
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        for name in ("CXX", "MAX_JOBS"):
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in ({"FASTELBO_CUDA": "0"} | variables).items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "setup.py"))

    return run


Run = Callable[..., dict[str, Any]]


def test_a_torch_that_is_missing_or_too_old(run_setup: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools, too: without isolation, pip does not ask for what pyproject.toml requires."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert required == [f"setuptools>={run_setup('sdist')['OLDEST']['setuptools']}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as refused:
        patch.setattr(sys, "path", [*sys.path])
        patch.setitem(sys.modules, "torch", None)
        run_setup("egg_info")
    assert str(refused.value).endswith(": pip install torch, then pip install --no-build-isolation .")
    for module, version, oldest in ((torch, "2.10.1+cpu", "2.11"), (setuptools, "65.5.0", "77")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as refused:
            patch.setattr(module, "__version__", version)
            run_setup("egg_info")
        name = module.__name__
        way_out = f"pip install --upgrade {name}"
        assert str(refused.value) == f"fastelbo needs {name} {oldest} or later; this is {version}: {way_out}"


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("not-there", "CXX=not-there: No such file or directory"),
        ("g++ -D__clang__ -D__clang_major__=13", "this is not g++ 12 or later, or clang 14 or later"),
        ("g++ -U__GNUC__ -D__GNUC__=11", "this is not g++ 12 or later, or clang 14 or later"),
        ("g++ -std=c++2099", "-std=c++2099"),
        ("g++ -nostdinc", "No such file or directory"),
        ("false", "CXX=false: it exits with 1"),
    ],
)
def test_a_compiler_that_cannot_compile_it(run_setup: Run, compiler: str, says: str) -> None:
    with pytest.raises(SystemExit) as refused:
        run_setup(CXX=compiler)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("fastelbo needs g++ 12 or clang 14, or later, and Python's headers") and says in line
    run_setup("sdist", CXX=compiler)  # compiles nothing


GB, FREE = 10**9, 9223372036854771712
VERSION_2 = {"cgroup": "0::/job/step\n"}
VERSION_1 = {"cgroup": "7:memory:/docker/id\n4:cpu,cpuacct:/docker/id\n1:name=systemd:/x\n"}  # as the host sees it


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ({}, {}, 8, 6),
        (VERSION_2, {}, 8, 6),
        (VERSION_2, {"job/cpu.max": "max 100000", "job/memory.max": "max", "job/memory.stat": f"anon {GB}\n"}, 8, 6),
        (VERSION_2, {"job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2, 6),
        (VERSION_2, {"cpu.max": "50000 100000"}, 1, 6),
        (VERSION_2, {"job/memory.max": 4 * GB, "job/memory.stat": f"anon {GB}\nfile {9 * GB}\n"}, 8, 3),
        (VERSION_2, {"job/memory.max": 9 * GB, "job/memory.stat": f"anon {GB}\n"}, 8, 6),
        (VERSION_1, {"cpu,cpuacct/cpu.cfs_quota_us": -1, "cpu,cpuacct/cpu.cfs_period_us": 100000}, 8, 6),
        (VERSION_1, {"cpu,cpuacct/cpu.cfs_quota_us": 300000, "cpu,cpuacct/cpu.cfs_period_us": 100000}, 3, 6),
        (VERSION_1, {"memory/memory.limit_in_bytes": FREE, "memory/memory.stat": f"rss 0\ntotal_rss {GB}\n"}, 8, 6),
        (VERSION_1, {"memory/memory.limit_in_bytes": 2 * GB, "memory/memory.stat": f"rss 0\ntotal_rss {GB}\n"}, 8, 1),
    ],
)
def test_cores_and_memory_of_a_build(
    run_setup: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: dict[str, str],
    files: dict[str, object],
    cores: int,
    memory: float,
) -> None:
    """By files as Linux has them, of both versions of control groups; 6 GB are left of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    written = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {6 * GB / 1024:.0f} kB\n"}
    written |= {f"proc/self/{name}": text for name, text in groups.items()}
    written |= {f"sys/fs/cgroup/{name}": str(text) for name, text in files.items()}
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    names = run_setup("sdist")
    assert names["cores"](tmp_path) == cores
    assert names["memory_gb"](tmp_path) == pytest.approx(memory)


def test_cores_and_memory_of_this_machine(run_setup: Run) -> None:
    names = run_setup("sdist")
    assert 1 <= names["cores"]() <= len(os.sched_getaffinity(0))
    assert 0 < names["memory_gb"]() < 1e5


@pytest.mark.parametrize(
    ("size", "given", "jobs"), [(GB, None, None), (GB, "1", "1"), (4 * GB, None, "3"), (99 * GB, None, "16")]
)
def test_so_many_compilers_at_a_time(
    run_setup: Run, monkeypatch: pytest.MonkeyPatch, size: int, given: str | None, jobs: str | None
) -> None:
    """On a machine of 16 cores."""
    is_file, read_text = Path.is_file, Path.read_text
    meminfo = f"MemAvailable: {size // 1024} kB"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(Path, "is_file", lambda self: self.name != "cgroup" and is_file(self))
    monkeypatch.setattr(Path, "read_text", lambda self: meminfo if self.name == "meminfo" else read_text(self))
    variables = {} if given is None else {"MAX_JOBS": given}
    if jobs is None:
        with pytest.raises(
            SystemExit, match=r"1\.3 GB of memory, and 1\.0 GB are available: free some, or set MAX_JOBS"
        ):
            run_setup(**variables)
    else:
        run_setup(**variables)
        assert os.environ["MAX_JOBS"] == jobs


# ----------------------------------------------------------------------------------------------------------------------
# An import after an upgrade of PyTorch.


def installed(folder: Path, origin: dict[str, Any] | None, built: bool = True, installer: str = "pip") -> None:
    """The package in `folder` with a library for torch 1.0, and pip's note of where it came from."""
    shutil.copytree(ROOT / "fastelbo", folder / "fastelbo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if built:
        (folder / "fastelbo/_C.py").write_text("def build_info(): return {'torch': '1.0', 'cuda': False}\n")
    info = folder / "fastelbo-0.9.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastelbo\nVersion: 0.9.7\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))


# Prints the error of an import from each folder. An editable install would find the compiled library of this checkout.
IMPORTS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
for folder in sys.argv[1:]:
    sys.path[0] = folder
    try:
        import fastelbo
    except ImportError as error:
        print(error)
    for name in [name for name in sys.modules if name.startswith("fastelbo")]:
        del sys.modules[name]
"""
PIP = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"


def said(cwd: Path, *folders: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", IMPORTS, *folders], cwd=cwd, text=True, capture_output=True)
    return done.stdout.splitlines()


def test_an_import_after_an_upgrade_of_torch_says_how_to_build_again(tmp_path: Path) -> None:
    """What works for what was installed: an index, a folder, an archive, a commit, a wheel; by pip or by uv."""
    sources, empty, sdist = tmp_path / "a folder", tmp_path / "empty", tmp_path / "fastelbo-0.9.7.tar.gz"
    sources.mkdir(), empty.mkdir(), sdist.touch()
    (sources / "setup.py").touch()  # and the working directory: no part of a command is taken from it
    git = {"url": "https://example.org/f.git", "vcs_info": {"vcs": "git", "commit_id": "1f2e"}}
    wheel = {"url": (tmp_path / "dist/fastelbo-0.9.7-cp311-cp311-linux_x86_64.whl").as_uri(), "archive_info": {}}
    again = "build it again: "
    cases: list[tuple[dict[str, Any] | None, str]] = [
        (None, f"{again}{PIP} --no-binary fastelbo fastelbo==0.9.7"),
        ({"url": sources.as_uri(), "dir_info": {}}, f"{again}{PIP} '{sources}'"),
        ({"url": sdist.as_uri(), "archive_info": {}}, f"{again}{PIP} {sdist}"),
        ({"url": "https://example.org/f.tar.gz", "archive_info": {}}, f"{again}{PIP} https://example.org/f.tar.gz"),
        (git, f"{again}{PIP} git+https://example.org/f.git@1f2e"),
        (
            wheel,
            "build the wheel again, in the folder of fastelbo's sources: pip wheel --no-build-isolation --no-deps .",
        ),
        (
            {"url": empty.as_uri(), "dir_info": {}},
            f"build it again, in the folder of fastelbo's sources, which is no longer {empty}: {PIP} .",
        ),
    ]
    folders = [tmp_path / str(i) for i in range(len(cases))]
    for folder, (origin, _) in zip(folders, cases, strict=True):
        installed(folder, origin)
    old = f"fastelbo was built against PyTorch 1.0, but this is PyTorch {torch.__version__}; "
    installed(tmp_path / "uv", git, installer="uv")
    installed(tmp_path / "not built", None, built=False)
    *lines, by_uv, not_built = said(sources, *folders, tmp_path / "uv", tmp_path / "not built")
    assert lines == [old + way_out for _, way_out in cases]
    assert f"{again}uv {PIP} git+" in by_uv
    assert "is not here, or is one for another Python; build it again: pip" in not_built


def test_an_import_from_the_source_folder_says_so(tmp_path: Path) -> None:
    """Building the installed one again would change nothing: the folder stands before it on the path."""
    there, stale, broken = (tmp_path / name for name in ("there", "stale", "broken"))
    for folder in (there, stale, broken):
        installed(folder, None, built=folder == stale)
        (folder / "csrc").mkdir()
    (broken / "fastelbo/_C.py").write_text("raise ImportError('undefined symbol')")
    here, after_upgrade, other_torch = said(there, there, stale, broken)
    assert here.startswith(f"you are in the source folder {there}, whose library is not compiled for this Python; ")
    assert here.endswith(f"from another folder, or compile it here: pip install --no-build-isolation -e {there}")
    assert after_upgrade.endswith(f"build it again: {PIP} -e {stale}")
    assert other_torch.endswith(f"build it again: {PIP} -e {broken}")
    (line,) = said(tmp_path, there)
    assert line.startswith(f"this is the source folder {there}, ")
