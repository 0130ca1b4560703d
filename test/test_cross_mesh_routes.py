"""How values get from one mesh to another, for any two meshes and shardings: no route has fewer bytes.

The nine cases are those of Zhuang et al., "On Optimizing the Communication of Model Parallelism" (MLSys 2023), table 2, as
their benchmark has them, at a fraction of the size. Hosts are along axis ``a``, their devices along axis ``b``.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from staged_programs import chain

from bactrian.passes.machine.spec import MeshAxes, Spec, num_devices
from bactrian.runtime.box_routing import Box, num_elements, plan_slices, rank_tiles, tiles
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import check_streams
from bactrian.runtime.mesh_groups import share_streams
from bactrian.runtime.stage_groups import deal_stages

NUM_RANDOM = 1000


@dataclass(frozen=True)
class Transfer:
    """A value on its way."""

    shape: tuple[int, ...]
    source_mesh: MeshAxes
    source: Spec
    target_mesh: MeshAxes
    target: Spec


def on_hosts(hosts: int, devices: int) -> MeshAxes:
    """A mesh of hosts with so many devices each."""
    return ("a", hosts), ("b", devices)


CASES = {
    "1": Transfer((16, 16, 8), on_hosts(2, 4), Spec.parse("a,-,-"), on_hosts(2, 4), Spec.parse("a,-,-")),
    "2": Transfer((16, 16, 8), on_hosts(2, 4), Spec.parse("-,-,-"), on_hosts(2, 4), Spec.parse("a,-,-")),
    "3": Transfer((16, 16, 8), on_hosts(2, 4), Spec.parse("-,a,-"), on_hosts(2, 4), Spec.parse("a,-,-")),
    "4": Transfer((16, 16, 8), on_hosts(2, 4), Spec.parse("-,a+b,-"), on_hosts(2, 4), Spec.parse("a+b,-,-")),
    "5": Transfer((16, 16, 8), on_hosts(2, 4), Spec.parse("b,-,-"), on_hosts(2, 4), Spec.parse("a,-,-")),
    "6": Transfer((48, 16, 5), on_hosts(2, 4), Spec.parse("a,-,-"), on_hosts(3, 4), Spec.parse("a,-,-")),
    "7": Transfer((16, 16, 8), on_hosts(1, 4), Spec.parse("b,-,-"), on_hosts(2, 4), Spec.parse("-,-,-")),
    "8": Transfer(
        (16, 16, 8), on_hosts(2, 4), Spec.parse("-,-,-"), on_hosts(1, 4), Spec.parse("b,-,-")
    ),  # 7 is 8 there
    "9": Transfer((16, 16, 8), on_hosts(2, 4), Spec.parse("-,a,-"), on_hosts(2, 4), Spec.parse("-,-,a")),
}


def route(transfer: Transfer, source_ranks: int, target_ranks: int, whole: int) -> int:
    """The most elements that a rank sends or receives across, for a transfer between meshes of so many ranks.

    A value is carried along the route, and seen to arrive. No elements cross twice, and none that a rank needs is passed to
    it twice, so fewer can't be sent.
    """
    value = np.arange(math.prod(transfer.shape)).reshape(transfer.shape)
    held = rank_tiles(tiles(transfer.shape, transfer.source_mesh, transfer.source), source_ranks)
    needed = rank_tiles(tiles(transfer.shape, transfer.target_mesh, transfer.target), target_ranks)
    slices = plan_slices(held, needed, whole=whole)
    arrived = [np.full(transfer.shape, -1) for _ in needed]
    for (sender, receiver), boxes in slices.sent.items():
        for box in boxes:
            assert any(is_within(box, tile) for tile in held[sender])
            fill(arrived[receiver], value, box)
    direct = [array.copy() for array in arrived]
    for (first, other), boxes in slices.passed.items():
        for box in boxes:
            assert (direct[first][at(box)] == value[at(box)]).all()
            fill(arrived[other], value, box)
    for array, boxes in zip(arrived, needed, strict=True):
        wanted = np.zeros(transfer.shape, bool)
        for box in boxes:
            wanted[at(box)] = True
        assert (array == np.where(wanted, value, -1)).all()
    assert sum(map(num_elements, slices.sent.values())) == value.size
    sent, received = [0] * source_ranks, [0] * target_ranks
    for (sender, receiver), boxes in slices.sent.items():
        sent[sender] += num_elements(boxes)
        received[receiver] += num_elements(boxes)
    return max(*sent, *received)


def fill(array: np.ndarray, value: np.ndarray, box: Box) -> None:
    """Receive some elements, none of which is there."""
    assert (array[at(box)] == -1).all()
    array[at(box)] = value[at(box)]


def at(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def is_within(box: Box, outer: Box) -> bool:
    """Whether one box is a part of another."""
    return all(a <= start and stop <= b for (start, stop), (a, b) in zip(box, outer, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_nine_cases(case: str) -> None:
    """With a rank for each host, and for each device: in the least time too, all ranks of the smaller mesh being busy."""
    transfer = CASES[case]
    for each in (1, 4):
        source, target = each * transfer.source_mesh[0][1], each * transfer.target_mesh[0][1]
        assert route(transfer, source, target, whole=1) == math.prod(transfer.shape) // min(source, target)


def random_mesh(chosen: random.Random) -> MeshAxes:
    """Of 1 to 8 devices, along one, two or three axes."""
    sizes = chosen.choice(
        [(1,), (2,), (3,), (4,), (6,), (8,), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (1, 4), (2, 2, 2)]
    )
    return tuple(zip("abc", sizes, strict=False))


def random_spec(chosen: random.Random, mesh: MeshAxes, rank: int) -> Spec:
    """Some axes, each on some dim."""
    dims: list[list[str]] = [[] for _ in range(rank)]
    for name, _ in chosen.sample(mesh, len(mesh)):
        if rank and chosen.random() < 0.7:
            dims[chosen.randrange(rank)].append(name)
    return Spec(tuple(map(tuple, dims)))


def random_transfer(chosen: random.Random) -> Transfer:
    """Between two meshes; each dim divides for both."""
    source_mesh, target_mesh = random_mesh(chosen), random_mesh(chosen)
    rank = chosen.randrange(1, 4)
    source, target = random_spec(chosen, source_mesh, rank), random_spec(chosen, target_mesh, rank)
    shape = tuple(
        math.lcm(
            *(
                Spec((spec.dims[dim],)).num_shards(dict(mesh))
                for spec, mesh in ((source, source_mesh), (target, target_mesh))
            )
        )
        * chosen.choice([1, 1, 2, 3])
        for dim in range(rank)
    )
    return Transfer(shape, source_mesh, source, target_mesh, target)


def check_random(numbers: Sequence[int]) -> None:
    """Random transfers, between ranks of equally many devices."""
    for number in numbers:
        chosen = random.Random(number)
        transfer = random_transfer(chosen)
        source, target = (
            chosen.choice([ranks for ranks in range(1, 9) if num_devices(mesh) % ranks == 0])
            for mesh in (transfer.source_mesh, transfer.target_mesh)
        )
        route(transfer, source, target, whole=chosen.choice([1, 8, 1024]))
        large = replace(transfer, shape=tuple(12 * size for size in transfer.shape))
        assert route(large, source, target, whole=1) <= 1.5 * math.prod(large.shape) / min(source, target)


def test_random_transfers() -> None:
    check_random(range(0, NUM_RANDOM, 10))


@pytest.mark.long
def test_a_thousand_random_transfers() -> None:
    check_random(range(NUM_RANDOM))


@pytest.mark.parametrize(
    ("ranks", "num_ranks"),
    [([2, 1], 3), ([1, 4, 2], 7), ([2, 1, 2, 1], 3), ([3, 1, 1], 5)],
)
def test_streams_of_unequal_groups_send_each_value_once(ranks: list[int], num_ranks: int) -> None:
    """Stages over several ranks beside stages of one, whose meshes have two devices per rank."""
    groups = deal_stages([2 * count for count in ranks], 2, num_ranks)
    program = chain(len(ranks), 3)
    meshes = tuple((("a", 2), ("b", count)) for count in ranks)
    for seed in range(4):
        chosen = random.Random(seed)
        values = tuple(
            replace(value, spec=fitting_spec(chosen, meshes[value.stage], value.shape)) for value in program.values
        )
        sharded = replace(program, values=values, meshes=meshes)
        streams = build_streams(sharded, groups.of_stage)
        shared = share_streams(streams, sharded, groups)
        report = check_streams(shared)
        assert report.message_bytes == check_streams(streams).message_bytes
        assert [stream.rank for stream in shared] == list(range(num_ranks))
        for group, size in enumerate(groups.sizes):
            own = [shared[rank] for rank in groups.ranks(group)]
            assert {stream.mesh_ranks for stream in own} == {tuple(groups.ranks(group)) if size > 1 else ()}


def fitting_spec(chosen: random.Random, mesh: MeshAxes, shape: tuple[int, ...]) -> Spec:
    """A random spec whose axes divide a shape."""
    for _ in itertools.repeat(None, 20):
        spec = random_spec(chosen, mesh, len(shape))
        if all(size % Spec((axes,)).num_shards(dict(mesh)) == 0 for size, axes in zip(shape, spec.dims, strict=True)):
            return spec
    return Spec.replicated(len(shape))
