"""Ranks in processes of their own: the same bits, and the end of all when one fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "mpi_worker.py"
pytestmark = pytest.mark.mpi


def mpirun(
    *arguments: object, ranks: int = 2, faults: str = "", deadline: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the worker; fails the test past the deadline."""
    command = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"BACTRIAN_FAULTS": faults}
    command += [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=deadline)


def survivors(marker: str) -> list[str]:
    """Processes whose command line has the marker."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if marker in line:
            found.append(f"{entry.name}: {line}")
    return found


@pytest.mark.parametrize("stages, ranks, options", [(2, 2, ("--parts",)), (4, 2, ()), (3, 3, ("--poll",))])
def test_steps_over_mpi_equal_the_serial_ones(stages: int, ranks: int, options: tuple[str, ...]) -> None:
    done = mpirun(stages, 4, 3, *options, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == [f"rank {r} done" for r in range(ranks)]


def test_the_interpreters_end_closes_the_transport() -> None:
    done = mpirun(2, 4, 2)
    assert done.returncode == 0, done.stderr


def test_trace_of_two_ranks(tmp_path: Path) -> None:
    done = mpirun(2, 3, 2, tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    starts = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    ends = {e["id"]: e["ts"] for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and len(starts) > 20
    late = [i for i in starts if starts[i] > ends[i] + 1000]
    assert not late, "clocks are off by more than a millisecond"


FAULTS = [  # before there is a transport, while the others wait, and after the last step; test_faults.py has all points
    "rank=0,point=compile,action=raise",
    "rank=1,step=1,point=in_step,action=kill",
    "rank=0,point=save,action=raise",
    "rank=1,point=exit,action=exit",
]
MORE_FAULTS = [
    "rank=1,point=import,action=raise",
    "rank=0,point=init,action=raise",
    "rank=1,point=plan,action=raise",
    "rank=1,step=1,point=in_step,action=raise",
    "rank=0,step=1,point=before_send,action=raise",
    "rank=1,step=1,point=after_recv,action=raise",
    "rank=0,step=1,point=after_recv,action=kill",
    "rank=1,point=compile,action=exit",
]


@pytest.mark.parametrize("fault", [*FAULTS, *(pytest.param(fault, marks=pytest.mark.long) for fault in MORE_FAULTS)])
def test_a_failing_rank_ends_the_job(fault: str, tmp_path: Path) -> None:
    marker = tmp_path / "unused"
    begin = time.monotonic()
    done = mpirun(2, 4, 3, marker, faults=fault, deadline=60)
    elapsed, ended = time.monotonic() - begin, time.time()
    assert done.returncode != 0
    assert not survivors(str(marker))
    assert elapsed < 40  # start-up included
    if fault.endswith("raise"):
        raised = re.search(r"InjectedFault: fault injected on rank .* unix time ([\d.]+)", done.stderr)
        assert raised, done.stderr
        assert ended - float(raised[1]) < 5
