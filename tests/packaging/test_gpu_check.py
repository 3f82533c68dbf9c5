"""A rehearsal of scripts/gpu_check.sh without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_step_runs_on_the_host(tmp_path: Path) -> None:
    """With stand-ins for nvidia-smi, compute-sanitizer, the build, the GPU; command lines are the script's."""
    tools, log = tmp_path / "tools", tmp_path / "commands.txt"
    tools.mkdir()

    def tool(name: str, text: str) -> None:
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)

    tool("nvidia-smi", "echo NVIDIA H200, 570.1, 143771 MiB")
    tool(
        "compute-sanitizer",
        'while [[ $1 == --* ]]; do [[ $1 == --tool || $1 == --error-exitcode ]] && shift; shift; done\n"$@"',
    )
    tool("timeout", f'echo "$*" >> {log}; shift; "$@"')
    tool(
        "python",
        f"""case "$*" in
  "setup.py build_ext --inplace") echo built ;;
  "-m benchmarks --device cuda --out "*) echo "targets: 0 met, 0 missed" ;;
  *) exec "{sys.executable}" "$@" ;;
esac""",
    )
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [ROOT / "scripts/gpu_check.sh", tmp_path / "out"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, cwd=tmp_path)
    table = done.stdout.rstrip().rsplit("\n\n", 1)[1]
    steps = ("build", "gpu_tests", "memcheck", "racecheck", "benchmark")
    assert [line.split()[:2] for line in table.splitlines()] == [[step, "ok"] for step in steps], done.stdout
    assert done.returncode == 0 and "targets: 0 met, 0 missed" in table
    assert sum(int(line.split()[0]) for line in log.read_text().splitlines()) <= 480
