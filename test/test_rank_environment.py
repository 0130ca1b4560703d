"""What a process knows of its place among the ranks: from the environment of a launcher, and which cores are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bactrian.driver.ranks import World
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime import rank_lifecycle
from bactrian.runtime.rank_lifecycle import keep_memory, rank_environment, share_of_cores

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("cores", "size", "shares"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([4, 5, 8, 9, 10], 2, [[4, 5, 8], [9, 10]]),
        ([0, 1], 3, [[0], [1], [0]]),
        ([7], 1, [[7]]),
    ],
)
def test_cores_are_shared_evenly(cores: list[int], size: int, shares: list[list[int]]) -> None:
    assert [share_of_cores(cores, rank, size) for rank in range(size)] == shares


@pytest.mark.parametrize("size", range(1, 40))
def test_no_core_is_left_out_or_given_twice(size: int) -> None:
    for cores in range(1, 40):
        shares = [share_of_cores(list(range(cores)), rank, size) for rank in range(size)]
        given = [core for share in shares for core in share]
        assert all(shares) and set(given) == set(range(cores))
        assert len(given) == max(cores, size) and max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("more", [0, 1])
def test_ranks_know_whether_they_share_cores(more: int) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("cores can't be given to processes here")
    size = str(len(os.sched_getaffinity(0)) + more)
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    place = {f"OMPI_COMM_WORLD_{name}": size if name.endswith("SIZE") else "0" for name in names}
    code = "from bactrian.runtime.rank_lifecycle import *; pin_cores(); print(has_own_cores())"
    environment = os.environ | place | {"BACTRIAN_JOB": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert done.stdout == f"{not more}\n"


def place_of(**environment: str) -> tuple[str, int, int, int, int]:
    place = rank_environment(environment)
    return place.launcher, place.rank, place.size, place.local_rank, place.local_size


# What a batch script with four tasks on two nodes has, and the third task of a step of it.
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
}


def test_ranks_are_known_from_the_environment() -> None:
    assert place_of() == ("", 0, 1, 0, 1)
    names = dict(zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "5814", strict=True))
    open_mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()}
    assert place_of(**open_mpi, **BATCH) == place_of(**open_mpi, **STEP) == ("Open MPI", 5, 8, 1, 4)
    assert place_of(PMI_RANK="1", PMI_SIZE="2") == ("MPICH", 1, 2, 1, 2)
    assert place_of(PMI_RANK="2", PMI_SIZE="3", **STEP) == ("MPICH", 2, 3, 0, 1)


@pytest.mark.parametrize(
    ("variables", "waits"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        (STEP, False),
        ({}, False),
    ],
)
def test_others_may_wait_for_who_leaves_where_mpi_can_start(
    variables: dict[str, str], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    assert rank_lifecycle._others_may_wait() is waits


@pytest.mark.parametrize(
    ("step", "fix"), [(STEP, "srun --mpi=pmix"), ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpi4py extra")]
)
def test_ranks_that_mpi_does_not_see(monkeypatch: pytest.MonkeyPatch, step: dict[str, str], fix: str) -> None:
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_lifecycle, "start_mpi", lambda: SimpleNamespace(Get_size=lambda: 1))
    with pytest.raises(ConfigError, match="ranks, but MPI sees 1") as caught:
        World.current()
    assert fix in caught.value.fix


def test_tasks_of_slurm_are_ranks_and_batch_scripts_are_not() -> None:
    assert place_of(**STEP) == ("Slurm", 2, 3, 0, 1)
    assert place_of(**STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}) == ("Slurm", 2, 3, 0, 2)
    assert place_of(**BATCH) == ("", 0, 1, 0, 1)
    for special in (0xFFFFFFFA, 0xFFFFFFFB):  # a shell of salloc, a batch script
        assert place_of(**STEP | {"SLURM_STEP_ID": str(special)}) == ("", 0, 1, 0, 1)
    assert place_of(SLURM_PROCID="0", SLURM_NTASKS="4") == ("", 0, 1, 0, 1)


def test_malloc_is_left_alone_where_the_user_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_memory()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=0")
    assert not keep_memory()


def test_steps_are_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(rank_lifecycle, "tell_step", told.append)
    monkeypatch.setattr(rank_lifecycle, "_told", (0.0, -1))
    for step in (0, 1, 0, 2):  # at once: within one interval
        rank_lifecycle.note_step(step)
    assert told == [0]
    monkeypatch.setattr(rank_lifecycle, "_TELL_SECONDS", 0.0)
    for step in (0, 3, 1, 4):  # another step function has run less often
        rank_lifecycle.note_step(step)
    assert told == [0, 3, 4]
