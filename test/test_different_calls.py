"""Jobs of two ranks that do not make the same calls, or not with the same values: they end soon, and say who does what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import END_SECONDS, Command, Ended, marked
from training_script import SCRIPT

START_SECONDS = 90.0

# argv: what happens, on which rank. Prints the time. "own part" is an exit after steps on a batch of the rank's own.
DIFFERENT = (
    SCRIPT
    + """
what, where = sys.argv[1:]
here = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == where
def happens(case):
    if case == what and here:
        print("failed at", time.time(), flush=True)
        return True
if here and what == "own part" or happens("seed"):
    batch["x"] = np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32)
step = make(check_inputs=what != "own part")
number = 0
while number < 3 + (what == "more" and here):
    if number == 3:
        happens("more")
    if number == 2 and (happens("exit") or happens("own part")):
        sys.exit(0)
    if number == 2 and happens("gather"):
        bactrian.gather(state)
    if number == 2 and happens("shape"):
        batch = {name: values[:4] for name, values in batch.items()}
    state, loss = step(state, batch)
    number += 1
print("done", float(loss), flush=True)
"""
)

pytestmark = pytest.mark.mpi


def check(job: Ended, message: str, code: int = 6) -> None:
    assert job.code == code, job.err
    assert re.search(message, job.err), job.err
    assert "Traceback" not in job.err
    assert job.survivors == []


def bare(tmp_path: Path, *arguments: str) -> Ended:
    """Under `mpirun` alone."""
    mark, script = f"bare{os.getpid()}", tmp_path / "train.py"
    script.write_text(DIFFERENT)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = ["mpirun", *root, "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, str(script)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"TEST_MARK": mark}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    failed, now = re.search(r"failed at ([\d.]+)", done.stdout), time.time()
    assert failed, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr, now - float(failed[1]), marked(mark), now)


CASES = [
    ("own part", 1, "rank 1 has ended its program, but rank 0 is in step 2 of train", 6),
    ("gather", 0, r"rank 0 calls bactrian\.gather of .*, but rank 1 is in step 2 of train", 6),
    ("seed", 1, r"ranks give train different values of batch\['x'\]: rank 1's are not rank 0's", 3),
]
MORE = [
    ("more", 1, "rank 0 has ended its program, but rank 1 is in step 3 of train", 6),
    ("shape", 1, r"ranks differ in the arguments of train: rank 0 has .*\[8,6\], .*, rank 1 has .*\[4,6\]", 3),
    ("exit", 1, "rank 1 has ended its program, but rank 0 is in step 2 of train", 6),
    ("exit", 0, "rank 0 has ended its program, but rank 1 is in step 2 of train", 6),
    ("more", 0, "rank 1 has ended its program, but rank 0 is in step 3 of train", 6),
    ("shape", 0, r"ranks differ in the arguments of train: rank 0 has .*\[4,6\], .*, rank 1 has .*\[8,6\]", 3),
]


@pytest.mark.parametrize(
    ("what", "rank", "message", "code"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)],
)
def test_the_job_ends_and_says_who_does_what(tmp_path: Path, what: str, rank: int, message: str, code: int) -> None:
    job = Command(tmp_path, what, str(rank), script=DIFFERENT).ended(start_seconds=START_SECONDS)
    check(job, message, code)
    assert what == "seed" or job.seconds <= END_SECONDS  # ranks compile before they compare
    assert job.out.count("done") == (what == "more")


@pytest.mark.parametrize(
    ("what", "rank", "message", "code"),
    [MORE[0], *(pytest.param(*case, marks=pytest.mark.long) for case in (*CASES, *MORE[1:]))],
)
def test_so_it_does_under_mpirun_alone(tmp_path: Path, what: str, rank: int, message: str, code: int) -> None:
    check(bare(tmp_path, what, str(rank)), message, code)
