"""A pipeline of stages of which each sends to its neighbours only, from the seconds of every stage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from bactrian.passes.pipelining.pipeline_events import ONCE, Function, Message, Pipeline, Task
from bactrian.passes.schedules.schedule import Schedule, parse_token


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of a stage.

    Attributes:
        forward, backward: of one microbatch.
        update: once per step.
        sent_forward: of the transfer of a microbatch to the next stage; that of its gradient back takes as long.
        links_forward, links_backward: what these two need to themselves; by default no other transfer has a part in it.
    """

    forward: float
    backward: float
    update: float = 0.0
    sent_forward: float = 0.0
    links_forward: tuple[Hashable, ...] | None = None
    links_backward: tuple[Hashable, ...] | None = None


def stage_chain(schedule: Schedule, stages: Sequence[StageSeconds], num_microbatches: int) -> Pipeline:
    """The pipeline of stages in a row, each on a mesh of its own.

    Function ``3 s`` is the forward of stage ``s``, ``3 s + 1`` its backward, ``3 s + 2`` its update.
    """
    functions, order = list[Function](), list[tuple[Task, ...]]()
    last = len(stages) - 1
    for number, (stage, tokens) in enumerate(zip(stages, schedule.order(last + 1, num_microbatches), strict=True)):
        forwards, backwards = tuple[Message, ...](), tuple[Message, ...]()
        if number < last:
            links = (("forward", number),) if stage.links_forward is None else stage.links_forward
            forwards = (Message(3 * number + 3, stage.sent_forward, links),)
        if number:
            before = stages[number - 1]
            links = (("backward", number),) if before.links_backward is None else before.links_backward
            backwards = (Message(3 * number - 2, before.sent_forward, links),)
        functions += [
            Function(f"stage{number}.forward", number, stage.forward, messages=forwards),
            Function(f"stage{number}.backward", number, stage.backward, messages=backwards),
            Function(f"stage{number}.update", number, stage.update, per_microbatch=False),
        ]
        calls = [Task(3 * number + "FB".index(kind), m) for kind, m in map(parse_token, tokens)]
        order.append((*calls, Task(3 * number + 2, ONCE)))
    return Pipeline(tuple(functions), tuple(order), num_microbatches)
