"""A rehearsal of scripts/gpu_check.sh without a GPU, and the arithmetic of scripts/cuda_model.py."""

import csv
import os
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cuda_model
import pytest
from cuda_model import CARDS, Case, Work, predict, resident_blocks
from ptxas_table import Kernel

from benchmarks import records

ROOT = Path(__file__).parents[2]
H100 = CARDS["H100 SXM"]


def test_resident_blocks_are_those_of_nvidia_s_occupancy_calculator() -> None:
    """Blocks of 256 threads on compute capability 9.0: 65,536 registers, in units of 256 per warp."""
    known = {32: 8, 33: 6, 40: 6, 48: 5, 64: 4, 65: 3, 80: 3, 96: 2, 128: 2, 129: 1, 255: 1}
    assert {registers: resident_blocks(H100, registers, 0) for registers in known} == known
    assert resident_blocks(H100, 32, 100 * 1024) == 2  # of 228 KB, 1 KB of which each block takes itself


def case(**changes: object) -> Case:
    return Case("a case", "a kernel", 1 << 30, 12, 64, 8, 100_000)._replace(**changes)


KERNEL, WORK = Kernel("a kernel", "", 80, 0, 0, True), Work(400, 8)


def test_a_launch_that_memory_limits_takes_the_time_of_a_copy() -> None:
    found = predict(H100, case(), KERNEL, WORK)
    assert found.limit == "memory" and 0.98 < found.copy < 1
    assert found.seconds == pytest.approx(12 * 2**30 / (0.92 * 3.35e12) + cuda_model.START)


def test_each_limit() -> None:
    assert predict(H100, case(), KERNEL, Work(4000, 8)).limit == "issue"
    assert predict(H100, case(), KERNEL, Work(400, 800)).limit == "mufu"
    assert predict(H100, case(loads=4), KERNEL, WORK).limit == "flight"
    assert predict(H100, case(elements=1000, blocks=1), KERNEL, WORK).limit == "launch"


def test_idle_multiprocessors_cost_their_share() -> None:
    busy, idle = (predict(H100, case(blocks=n), KERNEL, Work(4000, 8)).seconds for n in (396, 397))
    assert (idle - cuda_model.START) / (busy - cuda_model.START) == pytest.approx(2 * 396 / 397)


SASS = (
    """
.L_a:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   IMAD R9, R9, R9, R9 ;
        /*0030*/                   IMAD R9, R9, R9, R9 ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   IMAD R9, R9, R9, R9 ;
.L_x_3:
"""
    + "".join(f"        /*{i:04x}*/                   FFMA R5, R5, R6, R7 ;\n" for i in range(96, 96 + 20))
    + """
        /*0200*/                   MUFU.EX2 R5, R5 ;
        /*0210*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0220*/              @!P1 BRA `(.L_a) ;
        /*0230*/                   EXIT ;
"""
)


def test_instructions_of_the_shortest_way_through_a_loop() -> None:
    """The load and a jump; one of two branches; 20 + MUFU + store + the jump back."""
    assert cuda_model.work_of(SASS.replace(".L_a", ".L_x_1")) == Work(2 + 1 + 23, 1)


def test_every_step_runs_on_the_host(tmp_path: Path) -> None:
    """With stand-ins for nvidia-smi, compute-sanitizer, the build, the GPU; command lines are the script's."""
    tools = tmp_path / "tools"
    tools.mkdir()
    log = tmp_path / "commands.txt"

    def tool(name: str, text: str) -> None:
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755 | stat.S_IXUSR)

    measured = tmp_path / "measured.csv"
    row = records.Row("", "ELBO zinb [1024 x 20000]", 1, "fastelbo", "both", device="cuda", median_us=250.0)
    with measured.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(row)))
        writer.writeheader()
        writer.writerow(asdict(row))
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
  "scripts/cuda_model.py --code "*/code.json) touch "$3" ;;
  "-m benchmarks "*) for out; do :; done; cp {measured} "$out"; echo "targets: 0 met, 0 missed" ;;
  "scripts/cuda_model.py --code "*" --csv "*) "{sys.executable}" -c "
import csv, sys; sys.path.insert(0, 'scripts'); import cuda_model
assert sys.argv[6] in cuda_model.CARDS and sys.argv[1] == '--code'
print(*cuda_model.beside(list(csv.DictReader(open(sys.argv[4]))), {{'ELBO zinb [1024 x 20000]': 0.0002}}), sep=chr(10))
" "${{@:2}}" ;;
  *) exec "{sys.executable}" "$@" ;;
esac""",
    )
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    out = tmp_path / "out"
    done = subprocess.run([ROOT / "scripts/gpu_check.sh", out], env=env, text=True, capture_output=True, cwd=tmp_path)
    table = done.stdout.rstrip().rsplit("\n\n", 1)[1]
    assert [line.split()[:2] for line in table.splitlines()] == [
        ["build", "ok"],
        ["gpu_tests", "ok"],
        ["memcheck", "ok"],
        ["racecheck", "ok"],
        ["benchmark", "ok"],
        ["model", "ok"],
    ], done.stdout + done.stderr
    assert done.returncode == 0
    assert "measured    0.250 ms, predicted    0.200 ms" in done.stdout
    assert (out / "code.json").exists()
    one_by_one = [line for line in log.read_text().splitlines() if "--csv" in line or "cuda_model.py" not in line]
    assert len(one_by_one) == 6 and sum(int(line.split()[0]) for line in one_by_one) <= 480
    assert log.read_text().splitlines()[-1].endswith(f"--csv {out}/cuda.csv --card H200")
