"""What setup.py makes of the sources, and what an import says that cannot load the library; nothing is compiled."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
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
        archive.extractall(tree.parent / "unpacked", filter="data")
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
    assert "import fastelbo" in text and "You have X, write Y has the lines" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith(("https://", "#")) for target in targets), targets


def test_metadata(wheel_metadata: email.message.Message) -> None:
    assert wheel_metadata["Name"] == "fastelbo" and wheel_metadata["License-Expression"] == "BSD-3-Clause"
    assert wheel_metadata["Author"] and len(wheel_metadata.get_all("Classifier")) > 5
    assert set(wheel_metadata.get_all("Provides-Extra")) == {"train", "sklearn"}


# ----------------------------------------------------------------------------------------------------------------------
# An import after an upgrade of PyTorch.


def installed(folder: Path, version: str, url: str | None) -> None:
    """The package in `folder` with a library for torch 1.0, and pip's note of where it came from."""
    shutil.copytree(ROOT / "fastelbo", folder / "fastelbo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "fastelbo/_C.py").write_text("def build_info(): return {'torch': '1.0', 'cuda': False}\n")
    info = folder / f"fastelbo-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fastelbo\nVersion: {version}\n")
    if url is not None:
        (info / "direct_url.json").write_text(f'{{"url": "{url}", "dir_info": {{}}}}')


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


def test_what_an_import_says_that_cannot_load_the_library(tmp_path: Path) -> None:
    """A command that needs no source tree; the source tree that it was installed from; that it is not built."""
    sources, empty = tmp_path / "a folder", tmp_path / "empty"
    sources.mkdir(), empty.mkdir()
    (sources / "setup.py").touch()
    folders = [tmp_path / name for name in ("index", "no sources", "sources", "not built")]
    for folder, url in zip(folders, (None, empty.as_uri(), sources.as_uri(), None), strict=True):
        folder.mkdir()
        installed(folder, "0.9.7", url)
    (folders[3] / "fastelbo/_C.py").unlink()
    done = subprocess.run([sys.executable, "-c", IMPORTS, *folders], cwd=tmp_path, text=True, capture_output=True)
    index, no_sources, tree, not_built = done.stdout.splitlines()
    assert f"built against PyTorch 1.0, but this is PyTorch {torch.__version__}" in index
    command = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps"
    assert index.endswith(f"{command} --no-binary fastelbo fastelbo==0.9.7")
    assert no_sources.endswith("--no-binary fastelbo fastelbo==0.9.7")  # the folder has no setup.py
    assert tree.endswith(f"--no-deps '{sources}'")
    assert "is not built here; build it: pip install" in not_built
