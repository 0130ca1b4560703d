"""Discrete events of pipelines: against closed forms, against another way to count them, and case by case."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from bactrian.passes.frame.errors import PassError
from bactrian.passes.pipelining.pipeline_events import (
    ONCE,
    Function,
    Message,
    Pipeline,
    PipelineTimes,
    Task,
    simulate,
)
from bactrian.passes.pipelining.stage_chain import StageSeconds, stage_chain
from bactrian.passes.pipelining.step_time import step_seconds
from bactrian.passes.schedules.by_name import SCHEDULES
from bactrian.passes.schedules.schedule import parse_token


def seconds(name: str, stages: Sequence[StageSeconds], microbatches: int) -> float:
    return simulate(stage_chain(SCHEDULES[name], stages, microbatches)).seconds


def random_stages(draw: random.Random, count: int) -> list[StageSeconds]:
    return [
        StageSeconds(draw.uniform(0.3, 0.36), draw.uniform(0.6, 0.7), 0.0, draw.choice((0.01, draw.uniform(0, 0.3))))
        for _ in range(count)
    ]


def random_stage(draw: random.Random, most: float) -> StageSeconds:
    return StageSeconds(draw.uniform(0, most), draw.uniform(0, most), draw.uniform(0, most), draw.uniform(0, most))


def closed_form(name: str, stages: Sequence[StageSeconds], microbatches: int) -> float:
    """What the search for stages makes least."""
    return step_seconds(
        [stage.forward + stage.backward for stage in stages],
        [2 * stage.sent_forward for stage in stages[:-1]],
        [stage.update for stage in stages],
        [SCHEDULES[name].in_flight(s, len(stages), microbatches) for s in range(len(stages))],
        microbatches,
    )


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 5, 16])
def test_equal_stages_take_their_fill_and_their_microbatches(name: str, count: int, microbatches: int) -> None:
    stages = [StageSeconds(1.0, 2.0)] * count
    times = simulate(stage_chain(SCHEDULES[name], stages, microbatches))
    assert times.seconds == 3 * (microbatches + count - 1)
    assert all(mesh.busy == 3 * microbatches and mesh.bubble == 3 * (count - 1) for mesh in times.meshes)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_transfers_of_equal_stages(name: str) -> None:
    """1F1B pays for round trips in the steady state; its eager form and GPipe only for the fill and the drain."""
    count, microbatches, sent = 6, 40, 0.25
    stages = [StageSeconds(1.0, 2.0, 0.5, sent)] * count
    period = 3 + 2 * sent * (count - 1) / count if name == "1f1b" else 3
    whole = seconds(name, stages, microbatches)
    assert math.isclose(seconds(name, stages, microbatches + count) - whole, count * period)
    if name != "1f1b":
        assert math.isclose(whole, 3 * count + 2 * sent * (count - 1) + (microbatches - 1) * period + 0.5)


def test_gpipe_is_two_flow_shops() -> None:
    """Of equal jobs, on machines in a row: each machine once, and the slowest one for each other job."""
    draw = random.Random(0)
    for _ in range(50):
        microbatches, stages = draw.randint(1, 20), random_stages(draw, draw.randint(1, 12))
        sent = [stage.sent_forward for stage in stages[:-1]]
        machines = ([*(s.forward for s in stages), *sent], [*(s.backward for s in stages), *sent])
        whole = sum(sum(each) + (microbatches - 1) * max(each) for each in machines)
        assert math.isclose(seconds("gpipe", stages, microbatches), whole)
        assert closed_form("gpipe", stages, microbatches) <= whole * (1 + 1e-9)


@pytest.mark.parametrize("name", ["1f1b", "eager-1f1b"])
def test_closed_forms_on_random_pipelines(name: str) -> None:
    """The closed form of the search is never below the events, and not far above."""
    draw, off = random.Random(0), list[float]()
    for _ in range(100):
        count, microbatches = draw.randint(1, 12), draw.choice((1, 4, 16, 64))
        stages = random_stages(draw, count)
        off.append(closed_form(name, stages, microbatches) / seconds(name, stages, microbatches) - 1)
    assert min(off) > -1e-9 and max(off) < 0.2 and sorted(off)[50] < 0.03


def by_rounds(name: str, stages: Sequence[StageSeconds], microbatches: int) -> float:
    """The end of the last call, without a clock: each stage goes as far as it can, in turn."""
    count = len(stages)
    order = [[parse_token(token) for token in tokens] for tokens in SCHEDULES[name].order(count, microbatches)]
    at, free = [0] * count, [0.0] * count
    there = {("F", 0, m): 0.0 for m in range(microbatches)} | {("B", count - 1, m): 0.0 for m in range(microbatches)}
    links: dict[tuple[str, int], float] = {}
    while any(at[s] < len(order[s]) for s in range(count)):
        for s in range(count):
            while at[s] < len(order[s]) and (order[s][at[s]][0], s, order[s][at[s]][1]) in there:
                kind, m = order[s][at[s]]
                free[s] = max(free[s], there[kind, s, m]) + (stages[s].forward if kind == "F" else stages[s].backward)
                other = s + 1 if kind == "F" else s - 1
                if 0 <= other < count:
                    begin = max(free[s], links.get((kind, s), 0.0))
                    links[kind, s] = there[kind, other, m] = begin + stages[min(s, other)].sent_forward
                at[s] += 1
    return max(end + stage.update for end, stage in zip(free, stages, strict=True))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_events_do_not_depend_on_how_they_are_found(name: str) -> None:
    draw = random.Random(1)
    for _ in range(40):
        count, microbatches = draw.randint(1, 9), draw.randint(1, 20)
        stages = [random_stage(draw, 2.0) for _ in range(count)]
        assert math.isclose(seconds(name, stages, microbatches), by_rounds(name, stages, microbatches))


def check(pipeline: Pipeline, times: PipelineTimes) -> None:
    """What holds of all events: calls of a mesh follow each other, links carry one message at a time, times add up."""
    for mesh, (begins, ends) in enumerate(zip(times.begins, times.ends, strict=True)):
        assert len(ends) == len(pipeline.order[mesh])
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
        part = times.meshes[mesh]
        assert math.isclose(part.busy + part.bubble + part.exposed, times.seconds, abs_tol=1e-9)
        assert part.exposed > -1e-9 and part.bubble > -1e-9 and part.hidden > -1e-9
    begins = {
        call: begin
        for calls, row in zip(pipeline.order, times.begins, strict=True)
        for call, begin in zip(calls, row, strict=True)
    }
    busy: dict[object, list[tuple[float, float]]] = {}
    for sent in times.messages:
        assert sent.ready <= sent.begin <= sent.arrive <= begins[sent.reader] + 1e-12
        for link in sent.message.links:
            busy.setdefault(link, []).append((sent.begin, sent.begin + sent.message.link_seconds))
    for spans in busy.values():
        spans.sort()
        assert all(end <= begin + 1e-12 for (_, end), (begin, _) in pairwise(spans))


@pytest.mark.parametrize("seed", range(12))
def test_invariants_where_links_are_shared(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 6)
    hosts = [draw.randint(0, 2) for _ in range(count)]
    stages = [
        replace(
            random_stage(draw, 1.0),
            links_forward=(("out", hosts[s]), ("in", hosts[min(s + 1, count - 1)])),
            links_backward=(("out", hosts[min(s + 1, count - 1)]), ("in", hosts[s])),
        )
        for s in range(count)
    ]
    pipeline = stage_chain(SCHEDULES[draw.choice(sorted(SCHEDULES))], stages, draw.randint(1, 9))
    check(pipeline, simulate(pipeline))


def two_meshes(*messages: Message, first: tuple[tuple[int, Message], ...] = (), microbatches: int = 1) -> Pipeline:
    """One second on mesh 0, then two on mesh 1, for each microbatch; then one for the update of mesh 1."""
    functions = (Function("a", 0, 1.0, messages=messages), Function("b", 1, 2.0), Function("c", 1, 1.0, False))
    calls = [[Task(f, m) for m in range(microbatches)] for f in range(2)]
    return Pipeline(functions, (tuple(calls[0]), (*calls[1], Task(2, ONCE))), microbatches, first)


def test_messages_of_one_link_follow_each_other() -> None:
    apart = simulate(two_meshes(Message(1, 0.5, ("x",)), Message(1, 0.5, ("y",))))
    shared = simulate(two_meshes(Message(1, 0.5, ("x",)), Message(1, 0.5, ("x",))))
    assert apart.seconds == 1 + 0.5 + 2 + 1 and shared.seconds == apart.seconds + 0.5
    assert shared.meshes[1].exposed == 1.0 and shared.meshes[1].bubble == 1.0 and shared.meshes[1].communication == 1.5


def test_latency_does_not_keep_the_link() -> None:
    times = simulate(two_meshes(Message(1, 0.5, ("x",), 3.0), microbatches=2))
    assert [sent.begin for sent in times.messages] == [1.0, 2.0]
    assert [sent.arrive for sent in times.messages] == [4.5, 5.5]
    assert times.begins[1] == (4.5, 6.5, 8.5)


def test_the_last_microbatch_sends_what_is_read_once() -> None:
    times = simulate(two_meshes(Message(1, 0.0), Message(2, 9.0), microbatches=3))
    assert [sent.sender for sent in times.messages if sent.reader == Task(2, ONCE)] == [Task(0, 2)]
    assert times.begins[1][-1] == 3 + 9


def test_what_is_there_before_the_step_is_sent_at_once() -> None:
    times = simulate(two_meshes(Message(1, 0.0), first=((0, Message(1, 4.0)),), microbatches=2))
    assert times.begins[1] == (4.0, 6.0, 8.0)
    assert times.meshes[1].exposed == 4.0 and times.meshes[0].exposed == 0.0


def test_meshes_that_wait_for_each_other_are_refused() -> None:
    functions = (Function("a", 0, 1.0, messages=(Message(1, 0.0),)), Function("b", 1, 1.0, messages=(Message(0, 0.0),)))
    with pytest.raises(PassError, match="mesh 0 waits for ever at a of microbatch 0"):
        simulate(Pipeline(functions, ((Task(0, 0),), (Task(1, 0),)), 1))


@pytest.mark.parametrize("microbatches", [128, pytest.param(1024, marks=pytest.mark.long)])
def test_sixty_four_stages(microbatches: int) -> None:
    stages = [StageSeconds(1.0, 2.0, 0.5, 0.25)] * 64
    whole = 64 * 3 + 2 * 63 * 0.25 + (microbatches - 1) * 3 + 0.5
    assert math.isclose(seconds("eager-1f1b", stages, microbatches), whole)
