"""Memory of each device over a step: what the function that runs needs, and what else lies there meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

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
    """The peak memory of a stage's devices in one step: the most of `memory_over_time`.

    Args:
        step: all of it.
        stage: whose devices.
        functions: the memory of each, by its symbol.
    """
    found = StagePeak("", 0, 0)
    held = memory_over_time(step, stage, functions)
    for task, nbytes in zip(step.stage_tasks[stage], held, strict=True):
        if nbytes > found.nbytes:
            function = step.call(task).function
            found = StagePeak(function, nbytes, functions[function].temporaries)
    return found


def memory_over_time(step: UnrolledStep, stage: int, functions: Mapping[str, FunctionMemory]) -> list[int]:
    """The most bytes of each of a stage's devices during each of its tasks.

    State and constants are there during the whole step; what a function gives until its last reader on the stage has
    run; what comes from the host or from another stage from its first reader on.

    Args:
        step, stage, functions: as of `stage_peak`.
    """
    program, tasks = step.program, step.stage_tasks[stage]
    sizes = dict(program.mesh(stage))

    @cache
    def held(value: int) -> int:
        own = program.values[value]
        return own.nbytes // own.spec.num_shards(sizes)

    spans = buffer_spans(step, stage)
    changes = [0] * (len(tasks) + 1)
    for key, (first, last) in spans.items():
        if last - first > 1:  # there while others run
            changes[first + 1] += held(key.value)
            changes[last] -= held(key.value)
    found = list[int]()
    for at, (task, others) in enumerate(zip(tasks, accumulate(changes), strict=False)):
        own = {key for key in (*step.reads[task], *step.writes[task]) if key in spans and _is_inside(at, spans[key])}
        found.append(functions[step.call(task).function].peak + others - sum(held(key.value) for key in own))
    return found


def _is_inside(at: int, span: tuple[int, int]) -> bool:
    return span[0] < at < span[1]


def buffer_spans(step: UnrolledStep, stage: int) -> dict[Key, tuple[int, int]]:
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
