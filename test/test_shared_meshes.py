"""Which ranks' devices make up a mesh, and what is said where they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import pytest

from bactrian.driver.cli import main
from bactrian.driver.ranks import World
from bactrian.driver.run.distributed_meshes import check_devices, devices_of_ranks
from bactrian.driver.run.session import lots_of_devices
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.control import SingleProcess
from bactrian.runtime.stage_groups import StageGroups, deal_stages

MESH = (("data", 2), ("model", 2))


@dataclass(frozen=True)
class Device:
    """What is asked of a device."""

    id: int
    process_index: int


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """jax.distributed, of processes with so many devices each; this is the first."""
    shares: list[int] = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(shares))
    monkeypatch.setattr(jax, "process_count", lambda: len(shares))
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(
        jax,
        "devices",
        lambda: [Device(rank * 2048 + i, rank) for i in (2, 1, 0) for rank, n in enumerate(shares) if i < n],
    )
    return shares


class Ranks(SingleProcess):
    """One of several ranks, of which only this one is there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def ask(meshes: Sequence[tuple[tuple[str, int], ...]], num_ranks: int, each: int, rank: int = 0) -> None:
    """`check_devices` on one of so many ranks."""
    check_devices(meshes, World(Ranks(rank, num_ranks)), [None] * each)


def test_ranks_that_a_mesh_takes(joined: list[int]) -> None:
    ask([MESH], 3, 4)  # nothing has to be joined
    joined += [2, 2, 2, 2]
    ask([MESH, (("data", 1),), (("data", 2),), (("data", 8),)], 4, 2)
    assert [d.id for d in devices_of_ranks([2, 3])] == [4096, 4097, 6144, 6145]


def test_stages_are_dealt_to_groups_of_ranks() -> None:
    assert deal_stages([4, 4, 4], 2, 4) == StageGroups((0, 1, 0), (2, 2))
    assert deal_stages([4, 1, 8], 2, 7) == StageGroups((0, 1, 2), (2, 1, 4))
    groups = deal_stages([2, 1, 2, 1], 1, 3)
    assert groups == StageGroups((0, 1, 0, 1), (2, 1))
    assert [list(groups.ranks(group)) for group in (0, 1)] == [[0, 1], [2]]
    assert [groups.of_rank(rank) for rank in range(groups.num_ranks)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("sizes", "each", "num_ranks", "groups"),
    [
        ([2, 2, 2, 2], 4, 2, StageGroups((0, 1, 0, 1), (1, 1))),  # dealt round, no device is shared
        ([4, 2, 2], 4, 2, StageGroups((0, 1, 1), (1, 1))),
        ([4, 2, 2, 2, 2], 4, 4, StageGroups((0, 1, 1, 2, 3), (1, 1, 1, 1))),
        ([8, 2, 2, 4, 8], 4, 6, StageGroups((0, 1, 1, 2, 3), (2, 1, 1, 2))),
        ([4, 4, 2], 4, 2, StageGroups((0, 1, 0), (1, 1))),  # they must share
    ],
)
def test_stages_share_no_devices_that_they_need_not(
    sizes: list[int], each: int, num_ranks: int, groups: StageGroups
) -> None:
    assert deal_stages(sizes, each, num_ranks) == groups


def test_devices_of_one_process() -> None:
    assert lots_of_devices([4, 4, 4], 8) == (range(4), range(4, 8))
    assert lots_of_devices([4, 2, 1], 8) == (range(4), range(4, 6), range(6, 7))
    assert lots_of_devices([2, 4, 4], 8) == (range(4), range(4, 8))  # the first and the third share a lot
    assert lots_of_devices([1, 8], 8) == (range(8),)


def test_ranks_that_are_not_joined(joined: list[int]) -> None:
    del joined
    with pytest.raises(ConfigError, match=r"has a mesh of 4 devices \(data=2,model=2\), each rank has 2") as error:
        ask([MESH], 2, 2)
    assert "bactrian run --distributed" in str(error.value)
    assert 'cluster_detection_method="mpi4py"' in str(error.value)
    with pytest.raises(ConfigError, match="this process has 2"):
        check_devices([MESH], World(), [None] * 2)


def test_ranks_that_are_joined_otherwise(joined: list[int]) -> None:
    joined += [2, 2]
    with pytest.raises(ConfigError, match="joins 2 processes, of which this is number 0; MPI has 4 ranks"):
        ask([MESH], 4, 2)
    with pytest.raises(ConfigError, match="number 0; MPI has 2 ranks, of which this is number 1"):
        ask([MESH], 2, 2, rank=1)


@pytest.mark.parametrize(
    ("shares", "meshes", "message"),
    [
        ([3, 3], [MESH], "each rank has 3, which does not divide 4"),
        ([2, 1], [MESH], "rank 1 has 1 devices, rank 0 has 2"),
        ([2, 2, 2], [MESH, (("data", 3),)], "stage 1 has a mesh of 3 devices .*, each rank has 2, which does not"),
    ],
)
def test_ranks_that_do_not_fit(
    joined: list[int], shares: list[int], meshes: list[tuple[tuple[str, int], ...]], message: str
) -> None:
    joined += shares
    with pytest.raises(ConfigError, match=message):
        ask(meshes, len(shares), shares[0])


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "message", "fix"),
    [
        ([2], 4, "has 1 stage, but 4 ranks were started", "start 2 ranks, or ask for num_stages=2"),
        ([2] * 3, 8, "has 3 stages, but 8 ranks", "start 2, 4 or 6 ranks, or ask for num_stages=4"),
        ([2] * 2, 3, "has 2 stages, but 3 ranks", "start 2 or 4 ranks"),
        ([1, 1], 4, "has 2 stages, but 4 ranks", "start 1 to 2 ranks, or ask for num_stages=4"),
        ([2, 1, 2, 1], 4, "has 4 stages, but 4 ranks", "start 3 or 6 ranks"),
    ],
)
def test_ranks_that_stages_have_no_use_for(sizes: list[int], num_ranks: int, message: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        deal_stages(sizes, 1, num_ranks)
    assert str(error.value).endswith(fix)


def test_ranks_that_fit_if_stages_lie_along_them_are_named() -> None:
    with pytest.raises(ConfigError, match="has 4 stages, but 3 ranks were started") as error:
        deal_stages([8, 4, 2, 2], 4, 3)
    assert str(error.value).endswith("start 4 or 5 ranks")
    assert "stages belong to 2, 1, 1, 1 ranks" in str(error.value)


def test_one_process_has_nothing_to_join(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(9)")
    assert main(["run", "--distributed", str(script)]) == 3
    assert "--distributed joins the devices of several ranks, but there is one process" in capsys.readouterr().err
