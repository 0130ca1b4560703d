"""Memory of each device over a step: what the function that runs needs, and what else lies there meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.pipelining.pipeline_events import ONCE
from bactrian.runtime.unrolled_step import INDEX, Key, UnrolledStep


@dataclass(frozen=True)
class StagePeak:
    """The peak memory of a stage's devices.

    Attributes:
        function: that runs then.
        nbytes: of each device.
        temporaries: the part of it that only this function needs.
    """

    function: str
    nbytes: int
    temporaries: int


def stage_peak(step: UnrolledStep, stage: int, functions: Mapping[str, FunctionMemory]) -> StagePeak:
    """The peak memory of a stage's devices in one step.

    State and constants are there during the whole step; what a function gives until its last reader on the stage has
    run; what comes from the host or from another stage from its first reader on.

    Args:
        functions: the memory of each, by its symbol.
    """
    program = step.program
    sizes = dict(program.mesh(stage))

    def held(value: int) -> int:
        own = program.values[value]
        return own.nbytes // own.spec.num_shards(sizes)

    spans = _spans(step, stage)
    found = StagePeak("", 0, 0)
    for at, task in enumerate(step.stage_tasks[stage]):
        function, own = step.call(task).function, {*step.reads[task], *step.writes[task]}
        memory = functions[function]
        others = sum(held(key.value) for key, (first, last) in spans.items() if first < at < last and key not in own)
        if memory.peak + others > found.nbytes:
            found = StagePeak(function, memory.peak + others, memory.temporaries)
    return found


def _spans(step: UnrolledStep, stage: int) -> dict[Key, tuple[int, int]]:
    """From which task of a stage to which one each buffer is there."""
    program = step.program
    spans = dict[Key, tuple[int, int]]()
    for at, task in enumerate(step.stage_tasks[stage]):
        for key in (*step.reads[task], *step.writes[task]):
            if key.value != INDEX:
                spans[key] = spans.get(key, (at, at))[0], at
    end = len(step.stage_tasks[stage])
    for piece in program.results:
        key = step.key(piece.value, ONCE)
        if key in spans:
            spans[key] = spans[key][0], end
    held = [piece.value for piece in program.arguments if piece.role != "batch"]
    return spans | {Key(value, ONCE, stage): (-1, end) for value in held if program.values[value].stage == stage}
