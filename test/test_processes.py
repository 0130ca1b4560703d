"""Processes of their own for tasks: results in their order, errors, and an end with the process that asked."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.processes import Workers
from bactrian.passes.schedules.by_name import schedule_named

PROGRAM = """
from bactrian.passes.frame.processes import Workers
task = "import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(600)"
with Workers(2) as workers:
    workers.map(exec, [task, task])
"""


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_tasks(count: int) -> None:
    with Workers(count) as workers:
        assert workers.map(math.sqrt, [4.0, 9.0, 16.0]) == [2.0, 3.0, 4.0]
        with pytest.raises(ConfigError, match="nonsense"):
            workers.map(schedule_named, ["1f1b", "nonsense"])


def test_processes_end_with_the_one_that_asked() -> None:
    """In the middle of a task, too: standard error, which they share, is at its end when all of them are gone."""
    asking = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM], stderr=subprocess.PIPE, text=True)
    assert asking.stderr is not None
    assert [asking.stderr.readline() for _ in range(2)] == ["begun\n", "begun\n"]
    asking.kill()
    asking.communicate(timeout=60)
