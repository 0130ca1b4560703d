"""Processes of their own for tasks: results in their order, errors, and an end with the process that asked."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.processes import Workers
from bactrian.passes.schedules.by_name import schedule_named

PROGRAM = """
import sys, time
from bactrian.passes.frame.processes import Workers
with Workers(2) as workers:
    print(*(process.pid for process in workers.processes), flush=True)
    workers.map(time.sleep, [600.0, 600.0])
"""


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_tasks(count: int) -> None:
    with Workers(count) as workers:
        assert workers.map(math.sqrt, [4.0, 9.0, 16.0]) == [2.0, 3.0, 4.0]
        with pytest.raises(ConfigError, match="nonsense"):
            workers.map(schedule_named, ["1f1b", "nonsense"])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")
def test_processes_end_with_the_one_that_asked() -> None:
    """In the middle of a task, too."""
    asking = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    numbers = asking.stdout.readline().split()
    assert len(numbers) == 2
    asking.kill()
    asking.communicate()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(_is_alive(number) for number in numbers):
        time.sleep(0.05)
    assert not any(_is_alive(number) for number in numbers)


def _is_alive(number: str) -> bool:
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
