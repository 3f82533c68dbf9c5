"""pyright on the program of a user that mypy checks in test_structure.py. `make test-integrations` has pyright."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests/typed_program.py"

if importlib.util.find_spec("pyright") is None:
    pytest.skip("pyright is not installed: make test-integrations installs it", allow_module_level=True)


def check(folder: Path, text: str) -> list[dict]:
    (folder / "program.py").write_text(text)
    settings = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error", "extraPaths": [str(ROOT)]}
    # of torch and numpy, whose stubs leave them
    settings |= dict.fromkeys(
        ("reportUnknownMemberType", "reportUnknownVariableType", "reportUnknownArgumentType"), False
    )
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", folder]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    return json.loads(done.stdout)["generalDiagnostics"]


def test_types_hold_and_every_mistake_is_found(tmp_path: Path) -> None:
    assert check(tmp_path, PROGRAM.read_text()) == []


def test_the_check_can_fail(tmp_path: Path) -> None:
    text = PROGRAM.read_text()
    mistakes = text.count("# type: ignore")
    found = check(tmp_path, text.replace("# type: ignore", "# "))
    assert len({error["range"]["start"]["line"] for error in found}) == mistakes > 20
