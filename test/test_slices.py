"""Values between meshes of several ranks: every element crosses once, and everybody gets what it needs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from staged_programs import chain

from bactrian.passes.frame.errors import PassError
from bactrian.passes.machine.spec import UNSHARDED, MeshAxes, Spec
from bactrian.runtime.box_routing import Box, num_elements, plan_slices, rank_tiles, tiles
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import check_streams
from bactrian.runtime.instructions import Forward, Instruction, InstructionStream, Recv, Run, Send, describe
from bactrian.runtime.mesh_groups import share_streams
from bactrian.runtime.stage_groups import StageGroups

SHAPE = (8, 8)
SMALL: MeshAxes = (("a", 2), ("b", 2))
LARGE: MeshAxes = (("a", 2), ("b", 4))
# Shardings of a matrix as the papers name them: S0 cuts along axis a, S1 along b, S01 along both, R not at all.
SPECS: dict[str, Spec] = {
    "RR": Spec(((), ())),
    "S0R": Spec((("a",), ())),
    "RS0": Spec(((), ("a",))),
    "S1R": Spec((("b",), ())),
    "S01R": Spec((("a", "b"), ())),
    "RS10": Spec(((), ("b", "a"))),
    "S0S1": Spec((("a",), ("b",))),
    "S1S0": Spec((("b",), ("a",))),
}


def marked(boxes: Sequence[Box], shape: Sequence[int]) -> np.ndarray:
    """How often the boxes have each element."""
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[tuple(slice(*part) for part in box)] += 1
    return counts


def check_plan(source: Sequence[Sequence[Box]], target: Sequence[Sequence[Box]], shape: Sequence[int]) -> list[int]:
    """What a plan promises, at both limits of splitting; gives what each rank sends at most."""
    most: list[int] = []
    for whole in (1, 10**9):
        plan = plan_slices(source, target, whole=whole)
        crossing = [box for boxes in plan.sent.values() for box in boxes]
        assert (marked(crossing, shape) == 1).all()
        for (sender, _), boxes in plan.sent.items():
            held = marked(source[sender], shape)
            assert all(held[tuple(slice(*part) for part in box)].all() for box in boxes)
        arrived = {rank: [box for (_, to), boxes in plan.sent.items() if to == rank for box in boxes]
                   for rank in range(len(target))}  # fmt: skip
        for (first, _), boxes in plan.passed.items():
            assert set(boxes) <= set(arrived[first])
        for rank, needed in enumerate(target):
            passed = [box for (_, to), boxes in plan.passed.items() if to == rank for box in boxes]
            assert (marked(arrived[rank] + passed, shape) == marked(needed, shape)).all()
        load = [sum(num_elements(boxes) for (s, _), boxes in plan.sent.items() if s == rank)
                for rank in range(len(source))]  # fmt: skip
        most.append(max(load))
    return most


@pytest.mark.parametrize(
    ("source_ranks", "target_ranks", "target_axes"),
    [(1, 2, SMALL), (1, 4, SMALL), (2, 1, SMALL), (2, 2, SMALL), (4, 4, SMALL), (4, 2, SMALL), (2, 4, LARGE)],
)
def test_each_element_crosses_once(source_ranks: int, target_ranks: int, target_axes: MeshAxes) -> None:
    for source, target in itertools.product(SPECS.values(), SPECS.values()):
        held = rank_tiles(tiles(SHAPE, SMALL, source), source_ranks)
        needed = rank_tiles(tiles(SHAPE, target_axes, target), target_ranks)
        split, _ = check_plan(held, needed, SHAPE)
        if source_ranks <= target_ranks:
            assert split == 64 // source_ranks, (source, target)  # nobody sends more than others


@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (1, 5)])
def test_shapes_that_cannot_be_cut(shape: tuple[int, ...]) -> None:
    for source, target in ((2, 2), (1, 4), (4, 1)):
        check_plan(
            rank_tiles(tiles(shape, SMALL, UNSHARDED), source),
            rank_tiles(tiles(shape, SMALL, UNSHARDED), target),
            shape,
        )


def test_what_several_need_is_shared_among_them() -> None:
    whole = ((0, 64), (0, 64))
    plan = plan_slices([[whole]], [[whole], [whole]])
    assert plan.sent == {(0, 0): (((0, 32), (0, 64)),), (0, 1): (((32, 64), (0, 64)),)}
    assert plan.passed == {(0, 1): (((0, 32), (0, 64)),), (1, 0): (((32, 64), (0, 64)),)}


def shared(stages: int, groups: int, *, ranks: int = 2, seed: int = 0) -> tuple[tuple[InstructionStream, ...], int]:
    """The lists of a pipeline whose values are sharded over meshes of several ranks, and the bytes of what crosses."""
    chosen = random.Random(seed)
    program = chain(stages, 3)
    specs = [Spec(dims) for dims in [(), (("a",),), (("b",),), (("a", "b"),), ((), ("a",)), (("b",), ("a",))]]

    def spec(shape: tuple[int, ...]) -> Spec:
        fitting = [
            each
            for each in specs
            if len(each.dims) <= len(shape) and all(shape[d] % 2 ** len(c) == 0 for d, c in enumerate(each.dims))
        ]
        return chosen.choice(fitting)

    values = tuple(replace(value, spec=spec(value.shape)) for value in program.values)
    program = replace(program, values=values, meshes=(SMALL,) * stages)
    dealt = StageGroups(tuple(stage % groups for stage in range(stages)), (ranks,) * groups)
    lists = build_streams(program, dealt.of_stage)
    return share_streams(lists, program, dealt), check_streams(lists).message_bytes


@pytest.mark.parametrize(("stages", "groups", "ranks"), [(4, 4, 2), (4, 2, 2), (3, 3, 4), (2, 1, 2)])
def test_lists_of_ranks_that_share_meshes_end(stages: int, groups: int, ranks: int) -> None:
    for seed in range(5):
        lists, crossing = shared(stages, groups, ranks=ranks, seed=seed)
        report = check_streams(lists)
        assert report.message_bytes == crossing
        assert len(lists) == groups * ranks
        for place in range(0, len(lists), ranks):
            calls = [[x for x in one.instructions if isinstance(x, Run)] for one in lists[place : place + ranks]]
            assert all(others == calls[0] for others in calls)
            assert {one.mesh_ranks for one in lists[place : place + ranks]} == {tuple(range(place, place + ranks))}


def changed(
    lists: tuple[InstructionStream, ...], rank: int, number: int, *instead: Instruction
) -> list[InstructionStream]:
    """The lists with one instruction of a rank replaced."""
    instructions = list(lists[rank].instructions)
    instructions[number : number + 1] = instead
    return [replace(one, instructions=tuple(instructions)) if one.rank == rank else one for one in lists]


def place_of(lists: tuple[InstructionStream, ...], kind: type) -> tuple[int, int]:
    """Rank and number of the first instruction of a kind."""
    return next((one.rank, i) for one in lists for i, x in enumerate(one.instructions) if isinstance(x, kind))


def test_defects_of_shared_lists_are_found() -> None:
    lists, _ = shared(4, 4)
    rank, number = place_of(lists, Forward)
    forward = lists[rank].instructions[number]
    assert isinstance(forward, Forward)
    with pytest.raises(PassError, match="deadlock"):
        check_streams(changed(lists, rank, number))
    with pytest.raises(PassError, match="passes on what it does not get"):
        check_streams(changed(lists, rank, number, replace(forward, sources=())))
    rank, number = place_of(lists, Send)
    send = lists[rank].instructions[number]
    assert isinstance(send, Send)
    with pytest.raises(PassError, match="or other parts of it"):
        check_streams(changed(lists, rank, number, replace(send, boxes=(((0, 1), (0, 1)),))))
    rank, number = place_of(lists, Run)
    run = lists[rank].instructions[number]
    assert isinstance(run, Run)
    with pytest.raises(PassError, match="of the same mesh is at another one"):
        check_streams(changed(lists, rank, number, replace(run, function="other")))


def test_parts_are_read_in_dumps() -> None:
    send = Send(3, 1, 0, 32, False, (((0, 2), (4, 8)),))
    assert describe(send) == "SEND %3 [0:2, 4:8] to rank 1 tag 0, 32 bytes"
    recv = Recv(4, 2, 7, (8,), "float32", 0, 16, (((0, 4),), ((4, 8),)))
    assert describe(recv) == "RECV %4 [0:4] [4:8] from rank 2 tag 7, float32[8]"
    forward = Forward(4, (2,), 5, 1, 16, (((0, 4),),))
    assert describe(forward) == "FORWARD %4 [0:4] to rank 5 tag 1, 16 bytes"
