"""Memory of each device over a step: what the function that runs needs, and what else lies there meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.runtime.staged_program import Call, StagedProgram

_PHASES = {"F": "forward", "B": "backward", "FB": "forward_backward"}
_Piece = tuple[int, int | None]
"""A value, and of which microbatch it is."""


@dataclass(frozen=True)
class StagePeak:
    """The fullest time of a stage's devices.

    Attributes:
        function: that runs then.
        nbytes: of each device.
        temporaries: the part of it that only this function needs.
    """

    function: str
    nbytes: int
    temporaries: int


def stage_peak(program: StagedProgram, stage: int, functions: Mapping[str, FunctionMemory]) -> StagePeak:
    """The fullest time of a stage's devices in one step.

    State and constants are there during the whole step; what a function gives until its last reader on the stage has
    run; what comes from the host or from another stage from its first reader on.

    Args:
        functions: the memory of each, by its symbol.
    """
    sizes = dict(program.mesh(stage))

    def held(value: int) -> int:
        own = program.values[value]
        return own.nbytes // math.prod(sizes[axis] for axes in own.layout for axis in axes)

    steps = list(_steps(program, stage))
    spans = _spans(program, stage, [(reads, writes) for _, reads, writes in steps])
    found = StagePeak("", 0, 0)
    for at, (call, reads, writes) in enumerate(steps):
        memory, own = functions[call.function], {*reads, *writes}
        others = sum(held(piece[0]) for piece, (first, last) in spans.items() if first < at < last and piece not in own)
        if memory.peak + others > found.nbytes:
            found = StagePeak(call.function, memory.peak + others, memory.temporaries)
    return found


def _steps(program: StagedProgram, stage: int) -> Iterable[tuple[Call, list[_Piece], list[_Piece]]]:
    """The calls of a stage in its order of work, with what each reads and gives."""
    calls = [call for call in program.calls if call.stage == stage]
    last = program.num_microbatches - 1

    def piece(value: int, microbatch: int | None) -> _Piece:
        if not program.values[value].per_microbatch:
            return value, None
        return value, last if microbatch is None else microbatch

    def step(call: Call, microbatch: int | None) -> tuple[Call, list[_Piece], list[_Piece]]:
        carried = dict(call.carries) if microbatch else {}
        reads = [
            (call.outputs[carried[position]], (microbatch or 0) - 1)
            if position in carried
            else piece(value, microbatch)
            for position, value in enumerate(call.inputs)
            if value >= 0
        ]
        return call, reads, [piece(value, microbatch) for value in call.outputs]

    yield from (step(call, None) for call in calls if call.phase == "initialize")
    for token in program.order[stage]:
        phase, microbatch = _PHASES[token.rstrip("0123456789")], int(token.lstrip("FB"))
        yield from (step(call, microbatch) for call in calls if call.phase == phase)
    updates = [call for call in calls if call.phase == "update"]
    yield from (step(call, None) for call in sorted(updates, key=lambda call: call.round))


def _spans(
    program: StagedProgram, stage: int, steps: list[tuple[list[_Piece], list[_Piece]]]
) -> dict[_Piece, tuple[int, int]]:
    """From which step to which one each value is there."""
    spans = dict[_Piece, tuple[int, int]]()
    for at, (reads, writes) in enumerate(steps):
        for piece in (*reads, *writes):
            spans[piece] = spans.get(piece, (at, at))[0], at
    kept = {piece.value for piece in program.results}
    lasting = {
        piece.value
        for piece in program.arguments
        if piece.role != "batch" and program.values[piece.value].stage == stage
    }
    end = len(steps)
    for piece, (first, _) in spans.items():
        if piece[0] in kept and piece[1] in (None, program.num_microbatches - 1):
            spans[piece] = first, end
    return spans | {(value, None): (-1, end) for value in lasting}
