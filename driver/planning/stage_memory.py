"""Memory of each device over a step: what the function that runs needs, and what else lies there meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.pipelining.pipeline_events import ONCE
from bactrian.passes.schedules.by_name import schedule_named
from bactrian.passes.schedules.schedule import fused, parse_token
from bactrian.runtime.staged_program import StagedProgram
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


def fewer_microbatches(program: StagedProgram) -> StagedProgram:
    """The program with only as many microbatches as the memory of a step depends on.

    Once the most microbatches are in flight, all that follow repeat what happened before, up to the end of the step: twice
    as many and two more hold as much as thousands do.
    """
    schedule, stages, most = schedule_named(program.schedule), program.num_stages, program.num_microbatches
    in_flight = max(schedule.in_flight(stage, stages, most) for stage in range(stages))
    count = 2 * in_flight + 2
    kinds = [{parse_token(token)[0] for token in order} for order in program.order]
    if count >= most or any(len(order) < most for order in program.order):  # a loop runs all microbatches in one call
        return program
    orders = tuple(
        tuple(token for token in (fused(order) if "FB" in present else order) if parse_token(token)[0] in present)
        for order, present in zip(schedule.order(stages, count), kinds, strict=True)
    )
    return replace(program, num_microbatches=count, order=orders)


def stage_peak(step: UnrolledStep, stage: int, functions: Mapping[str, FunctionMemory]) -> StagePeak:
    """The peak memory of a stage's devices in one step.

    State and constants are there during the whole step; what a function gives until its last reader on the stage has
    run; what comes from the host or from another stage from its first reader on.

    Args:
        functions: the memory of each, by its symbol.
    """
    program = step.program
    sizes = dict(program.mesh(stage))

    @cache
    def held(value: int) -> int:
        own = program.values[value]
        return own.nbytes // own.spec.num_shards(sizes)

    spans = _spans(step, stage)
    tasks = step.stage_tasks[stage]
    # What is held while a task runs, but for what is first or last used then: the running sum of what comes and goes.
    changes = [0] * (len(tasks) + 2)
    for key, (first, last) in spans.items():
        if last - first > 1:
            changes[first + 1] += held(key.value)
            changes[last] -= held(key.value)
    found, lasting = StagePeak("", 0, 0), 0
    for at, task in enumerate(tasks):
        lasting += changes[at]
        function, own = step.call(task).function, {*step.reads[task], *step.writes[task]}
        memory = functions[function]
        within = (key for key in own if key in spans and spans[key][0] < at < spans[key][1])
        others = lasting - sum(held(key.value) for key in within)
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
