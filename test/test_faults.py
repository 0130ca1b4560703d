"""A training job with a failure at each named point: how it ends, how soon, and that nothing stays behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from test_launch import END_SECONDS, Command, Ended
from training_script import TRAIN

from bactrian.runtime import faults

POINTS = ("import", "init", "plan", "compile", "in_step", "before_send", "after_recv", "exit")
START_SECONDS = 90.0  # jax and its compiler start on every rank
LOST_SECONDS = 3.0

pytestmark = pytest.mark.mpi


EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_gpt.py"
EXAMPLE_ARGUMENTS = [
    "--steps=4", "--layers=2", "--width=32", "--length=32", "--batch=8", "--microbatches=4", "--report-every=2",
]  # fmt: skip


def run(
    tmp_path: Path, rank: int, point: str, action: str, *arguments: str, script: str | Path = TRAIN
) -> tuple[Ended, float]:
    """The job, and the seconds from the failure to its end."""
    fault = f"rank={rank},step=1,point={point},action={action}"
    command = Command(tmp_path, *arguments, script=script, BACTRIAN_FAULTS=fault)
    job = command.ended(start_seconds=START_SECONDS)
    failed = re.search(rf"{action}: fault injected on rank {rank} at {point}, step \d+, unix time ([\d.]+)", job.err)
    assert failed, job.err
    return job, job.ended_at - float(failed[1])


def check_raise(tmp_path: Path, rank: int, point: str) -> None:
    job, seconds = run(tmp_path, rank, point, "raise")
    number = 1 if point in ("in_step", "before_send", "after_recv") else 2 if point == "exit" else 0
    assert job.code == 1, job.err
    assert f"InjectedFault: fault injected on rank {rank} at {point}, step {number}" in job.last, job.err
    assert f"rank {rank} on {os.uname().nodename} " in job.err and "Traceback (most recent call last)" in job.err
    assert "MPI_ABORT" not in job.err and "prterun" not in job.err
    assert ("step 0 done" in job.out) == (number > 0)
    assert seconds <= END_SECONDS
    assert job.survivors == []


def check_example(tmp_path: Path, rank: int, point: str) -> None:
    out = tmp_path / "run"
    job, seconds = run(tmp_path, rank, point, "raise", *EXAMPLE_ARGUMENTS, "--out", str(out), script=EXAMPLE)
    assert job.code == 1, job.err
    assert f"InjectedFault: fault injected on rank {rank} at {point}, step" in job.last, job.err
    assert f"rank {rank} on {os.uname().nodename} " in job.err and "Traceback (most recent call last)" in job.err
    assert "MPI_ABORT" not in job.err and "prterun" not in job.err
    assert seconds <= END_SECONDS
    assert job.survivors == []


def check_kill(tmp_path: Path, rank: int, point: str) -> None:
    job, seconds = run(tmp_path, rank, point, "kill")
    assert job.code == 6, job.err
    assert job.last.startswith(f"bactrian: lost rank {rank} on {os.uname().nodename} (process "), job.err
    # The records are 0.2 s apart at least, so the first step is told and a second one right after it may not be.
    began = point in ("in_step", "before_send", "after_recv", "exit")
    assert re.search(r"\), in step \d+ or soon after: " if began else r"\), before the first step: ", job.last), job.err
    assert job.last.endswith("killed by signal 9 (SIGKILL); the other ranks were ended")
    assert seconds <= LOST_SECONDS
    assert job.survivors == []


@pytest.mark.parametrize(("rank", "point"), [(number % 2, point) for number, point in enumerate(POINTS)])
def test_an_exception_ends_the_job(tmp_path: Path, rank: int, point: str) -> None:
    check_raise(tmp_path, rank, point)


@pytest.mark.parametrize(("rank", "point"), [(0, "before_send"), (1, "in_step")])
def test_a_killed_rank_ends_the_job(tmp_path: Path, rank: int, point: str) -> None:
    check_kill(tmp_path, rank, point)


def test_the_example_ends_so(tmp_path: Path) -> None:
    check_example(tmp_path, 0, "after_recv")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_the_example_ends_so_at_every_point(tmp_path: Path, rank: int, point: str) -> None:
    check_example(tmp_path, rank, point)


@pytest.mark.long
@pytest.mark.parametrize("number", range(200))
def test_every_point_and_rank_again_and_again(tmp_path: Path, number: int) -> None:
    repeat, rank, point = number // 16, number // 8 % 2, POINTS[number % 8]
    (check_kill if repeat % 4 == 3 else check_raise)(tmp_path, rank, point)


def test_unset_faults_cost_nothing() -> None:
    assert faults.ACTIVE is None, "BACTRIAN_FAULTS is set"
    assert faults.parse("") is None
