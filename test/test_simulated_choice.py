"""Pipelines that the search finds are simulated: many microbatches from few, and the best few ranked by their events."""

from __future__ import annotations

import dataclasses

import pytest
from test_pipeline_search import instance

from bactrian.passes.machine.cluster import CPU_HOST, Cluster
from bactrian.passes.pipelining import simulated_choice
from bactrian.passes.pipelining.layer_options import LayerOption, Menu
from bactrian.passes.pipelining.measured_stages import MeasuredStage
from bactrian.passes.pipelining.pipeline_candidates import PipelineRequest, choose_pipeline
from bactrian.passes.pipelining.pipeline_events import simulate
from bactrian.passes.pipelining.pipeline_problem import FixedStages
from bactrian.passes.pipelining.pipeline_search import search_pipeline
from bactrian.passes.pipelining.simulated_choice import simulated_seconds
from bactrian.passes.pipelining.stage_chain import StageSeconds, stage_chain
from bactrian.passes.plan.pipeline_record import OtherPipeline
from bactrian.passes.schedules.by_name import SCHEDULES

ONE_DEVICE = (("data", 1),)


def option(forward: float, backward: float) -> LayerOption:
    return LayerOption(forward, backward, 0.0, 0.0, 0.0, 0.0)


def test_many_microbatches_are_as_fast_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    off = list[float]()
    for seed in range(40):
        problem = dataclasses.replace(instance(seed), num_microbatches=200)
        choice = search_pipeline(problem, most_runs=20).choice
        if choice is not None and len(choice.stages) > 1:
            few = simulated_seconds(problem, choice)
            with monkeypatch.context() as patch:
                patch.setattr(simulated_choice, "_FILLING", 1000)
                off.append(few / simulated_seconds(problem, choice) - 1)
    assert len(off) > 10 and max(map(abs, off)) < 1e-2


def test_what_is_simulated_are_the_stages_and_their_calls() -> None:
    """Two stages of a layer each, on two hosts: a call takes 0.5 s, the way between 1 s."""
    group = dataclasses.replace(
        CPU_HOST, hosts=2, devices_per_host=1, inter_host_latency=0.0, inter_host_bytes_per_second=1.0, call_seconds=0.5
    )
    for name, schedule in SCHEDULES.items():
        menu = Menu(ONE_DEVICE, ((option(2.0, 3.0),), (option(3.0, 2.0),)))
        chosen = choose_pipeline(
            PipelineRequest((0, 1), (0.0, 2.0), ((menu,),), Cluster("c", (group,)), 8, (schedule,))
        )
        last = StageSeconds(3.5, 2.5, 1.0) if name == "gpipe" else StageSeconds(3.0, 2.5, 1.0)
        events = simulate(stage_chain(schedule, [StageSeconds(2.5, 3.5, 1.0, 1.0), last], 8))
        assert len(chosen.choice.stages) == 2
        assert chosen.simulated_seconds == pytest.approx(events.seconds)


def test_measured_stages_are_simulated_as_they_were_measured() -> None:
    group = dataclasses.replace(CPU_HOST, hosts=1, devices_per_host=2, call_seconds=0.5)
    menu = Menu(ONE_DEVICE, ((option(2.0, 3.0),), (option(3.0, 2.0),)))
    measured = (MeasuredStage(0, 1, ONE_DEVICE, 8, 2.0, 3.0), MeasuredStage(1, 2, ONE_DEVICE, 8, 1.5, 5.0))
    request = PipelineRequest(
        (0, 1),
        (0.0, 0.0),
        ((menu,),),
        Cluster("c", (group,)),
        8,
        (SCHEDULES["1f1b"],),
        FixedStages(2),
        measured=measured,
    )
    stages = [StageSeconds(5.0, 7.0, 3.0), StageSeconds(4.5, 3.75, 5.0)]
    expected = simulate(stage_chain(SCHEDULES["1f1b"], stages, 8)).seconds
    assert choose_pipeline(request).simulated_seconds == pytest.approx(expected)


def test_events_decide_between_schedules() -> None:
    """GPipe waits for the slowest forward, then for the slowest backward, which are here of different stages; its closed form,
    of both together, is the least of all."""
    group = dataclasses.replace(
        CPU_HOST, hosts=2, devices_per_host=1, inter_host_latency=0.0, inter_host_bytes_per_second=1.0
    )
    menu = Menu(ONE_DEVICE, ((option(9.0, 1.0),), (option(1.0, 9.0),)))
    request = PipelineRequest((0, 1), (0.0, 24.0), ((menu,),), Cluster("c", (group,)), 16, tuple(SCHEDULES.values()))
    each = [choose_pipeline(dataclasses.replace(request, schedules=(schedule,))) for schedule in request.schedules]
    chosen = choose_pipeline(request)
    assert chosen.simulated_seconds == min(one.simulated_seconds for one in each)
    assert chosen.schedule.name != "gpipe" == min(each, key=lambda one: one.choice.step_seconds).schedule.name
    assert chosen.bound_seconds <= min(one.choice.step_seconds for one in each)


def test_the_next_best_has_another_number_of_stages() -> None:
    """Of one microbatch, two stages take the way between them longer."""
    group = dataclasses.replace(
        CPU_HOST, hosts=2, devices_per_host=1, inter_host_latency=0.0, inter_host_bytes_per_second=1.0
    )
    menu = Menu(ONE_DEVICE, ((option(2.0, 3.0),),))
    for sent, other in ((1.0, OtherPipeline(2, "1f1b", 11.0)), (2.0, None)):
        request = PipelineRequest((0, 0), (0.0, sent), ((menu,),), Cluster("c", (group,)), 1, (SCHEDULES["1f1b"],))
        chosen = choose_pipeline(request)
        assert len(chosen.choice.stages) == 1 and chosen.next_best == other
