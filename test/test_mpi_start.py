"""The start of MPI under MPICH's mpiexec: who waits for a rank that has left ends with a word about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Starts two ranks as mpiexec does: the first ends at once, or waits; the second looks who is missing.
_LAUNCHER = """
import os, subprocess, sys
first, wrapper = sys.argv[1], sys.argv[2:]
ranks = {}
for rank, script in enumerate((first, sys.stdin.read())):
    variables = {"PMI_RANK": str(rank), "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
    command = [*wrapper, sys.executable, "-c", script]
    ranks[rank] = subprocess.Popen(command, env={**os.environ, **variables}, stdin=subprocess.PIPE)
print(ranks[1].wait())
ranks[0].kill()
"""
_SECOND = """
import threading
from bactrian.runtime import mpi_start
started = threading.Event()
threading.Timer(5.0, started.set).start()
mpi_start.watch_ranks(mpi_start.launcher_process(), 2, started)
"""


def start(first: str, *wrapper: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, of which the first runs a script."""
    command = [sys.executable, "-c", _LAUNCHER, first, *wrapper]
    return subprocess.run(command, input=_SECOND, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are seen in /proc")
@pytest.mark.parametrize("wrapper", [(), ("sh", "-c", '"$0" "$@"; exit $?')], ids=["plain", "shell"])
def test_a_rank_that_has_left_is_named(wrapper: tuple[str, ...]) -> None:
    done = start("", *wrapper)
    assert "error: process 0 of the 2 on " in done.stderr
    assert "where: rank 1, which waited for it" in done.stderr
    assert done.stdout.strip() in ("-9", "137")  # a shell's own exit code for the signal


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are seen in /proc")
def test_a_rank_that_is_late_is_waited_for() -> None:
    done = start("import sys; sys.stdin.read()")
    assert (done.stdout.strip(), done.stderr) == ("0", "")
