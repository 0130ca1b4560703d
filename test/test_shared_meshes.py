"""Which ranks' devices make up a mesh, and what is said where they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import pytest

from bactrian.driver.cli import main
from bactrian.driver.ranks import World
from bactrian.driver.run.distributed_meshes import devices_of_ranks, ranks_per_mesh
from bactrian.driver.run.session import stage_ranks
from bactrian.passes.frame.errors import ConfigError
from bactrian.runtime.control import SingleProcess

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


def ask(meshes: Sequence[tuple[tuple[str, int], ...]], num_ranks: int, each: int, rank: int = 0) -> int:
    """`ranks_per_mesh` on one of so many ranks."""
    return ranks_per_mesh(meshes, World(Ranks(rank, num_ranks)), [None] * each)


def test_ranks_that_a_mesh_takes(joined: list[int]) -> None:
    assert ask([MESH], 3, 4) == 1  # nothing has to be joined
    joined += [2, 2, 2, 2]
    assert ask([MESH, MESH], 4, 2) == 2
    assert ask([MESH], 4, 4) == 1
    assert [d.id for d in devices_of_ranks([2, 3])] == [4096, 4097, 6144, 6145]
    assert stage_ranks(3, 4, 2) == (0, 1, 0)


def test_ranks_that_are_not_joined(joined: list[int]) -> None:
    del joined
    with pytest.raises(ConfigError, match=r"has a mesh of 4 devices \(data=2,model=2\), each rank has 2") as error:
        ask([MESH], 2, 2)
    assert "bactrian run --distributed" in str(error.value)
    assert 'cluster_detection_method="mpi4py"' in str(error.value)
    with pytest.raises(ConfigError, match="this process has 2"):
        ranks_per_mesh([MESH], World(), [None] * 2)


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
        ([2, 2, 2], [MESH], "takes 2 ranks of 2 devices, but 3 ranks were started"),
        ([2, 1], [MESH], "rank 1 has 1 devices, rank 0 has 2"),
        (
            [2, 2, 2, 2],
            [MESH, (("data", 2),)],
            "different meshes is not supported yet: stage 0 has data=2,model=2, stage 1 has data=2",
        ),
    ],
)
def test_ranks_that_do_not_fit(
    joined: list[int], shares: list[int], meshes: list[tuple[tuple[str, int], ...]], message: str
) -> None:
    joined += shares
    with pytest.raises(ConfigError, match=message):
        ask(meshes, len(shares), shares[0])


def test_more_ranks_than_stages_take() -> None:
    with pytest.raises(ConfigError, match="has 1 stage, but 4 ranks were started") as error:
        stage_ranks(1, 4, 2)
    assert "start 2 ranks, or ask for num_stages=2" in str(error.value)
    with pytest.raises(ConfigError) as error:
        stage_ranks(3, 8, 2)
    assert "start a multiple of 2 ranks up to 6, or ask for num_stages=4" in str(error.value)
    with pytest.raises(ConfigError) as error:
        stage_ranks(2, 4)
    assert "start 1 to 2 ranks, or ask for num_stages=4" in str(error.value)


def test_one_process_has_nothing_to_join(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(9)")
    assert main(["run", "--distributed", str(script)]) == 3
    assert "--distributed joins the devices of several ranks, but there is one process" in capsys.readouterr().err
