"""The step time of a pipeline that was found, by its events: what decides between the best few of the closed form."""

from __future__ import annotations

from collections.abc import Hashable

from bactrian.passes.pipelining.pipeline_events import simulate
from bactrian.passes.pipelining.pipeline_problem import PipelineChoice, PipelineProblem, Place, StageChoice, round_trips
from bactrian.passes.pipelining.stage_chain import StageSeconds, stage_chain

_FILLING = 8  # microbatches, beside four of each stage, after which each takes as long as those before it


def simulated_seconds(problem: PipelineProblem, choice: PipelineChoice) -> float:
    """Seconds of a step, with the links of hosts that transfers share.

    Of many microbatches, those after the pipeline is full are taken to be as fast as a few of them.
    """
    stages, count = _stage_seconds(problem, choice), len(choice.stages)
    few, more, many = 4 * count + _FILLING, 4 * count, problem.num_microbatches
    if many <= few + more:
        return simulate(stage_chain(problem.schedule, stages, many)).seconds
    shorter, longer = (simulate(stage_chain(problem.schedule, stages, m)).seconds for m in (few, few + more))
    return longer + (many - few - more) * (longer - shorter) / more


def _stage_seconds(problem: PipelineProblem, choice: PipelineChoice) -> list[StageSeconds]:
    """A call of a microbatch that stands for forward and backward is counted with the backward."""
    places, found = [stage.place for stage in choice.stages], list[StageSeconds]()
    trips = [*round_trips(problem, places), 0.0]
    for number, (stage, trip) in enumerate(zip(choice.stages, trips, strict=True)):
        forth, back = None, None
        if number + 1 < len(places):
            forth, back = (_links(problem, *ends) for ends in _both_ways(places[number], places[number + 1]))
        forward, backward = _call_seconds(problem, stage, len(places) - number)
        found.append(
            StageSeconds(
                stage.seconds_factor * (forward + sum(option.forward_seconds for option in stage.options)),
                stage.seconds_factor * (backward + sum(option.backward_seconds for option in stage.options)),
                stage.update_seconds,
                trip / 2,
                forth,
                back,
            )
        )
    return found


def _call_seconds(problem: PipelineProblem, stage: StageChoice, stages_left: int) -> tuple[float, float]:
    """What the calls of a microbatch take beside their work: of the forward, and of the backward."""
    seconds = stage.call_seconds[0]
    return (0.0, seconds) if problem.schedule.fuses(0, stages_left) else (seconds / 2, seconds / 2)


def _both_ways(sender: Place, receiver: Place) -> tuple[tuple[Place, Place], tuple[Place, Place]]:
    return (sender, receiver), (receiver, sender)


def _links(problem: PipelineProblem, sender: Place, receiver: Place) -> tuple[Hashable, ...] | None:
    """Out of each host of one stage and into each of the other; None within a host, where transfers share nothing."""
    hosts = [_hosts(problem, place) for place in (sender, receiver)]
    if hosts[0] == hosts[1]:
        return None
    return *(("out of", host) for host in hosts[0]), *(("into", host) for host in hosts[1])


def _hosts(problem: PipelineProblem, place: Place) -> range:
    line = problem.line
    return range(line.host_of(place.first_device), line.host_of(place.first_device + place.submesh.num_devices - 1) + 1)
