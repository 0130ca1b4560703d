"""The best pipeline over what is left open: the order of the kinds of hosts, and the schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.spec import axes_text, num_devices
from bactrian.passes.pipelining.host_line import HostLine
from bactrian.passes.pipelining.layer_options import Menu
from bactrian.passes.pipelining.measured_stages import MeasuredStage
from bactrian.passes.pipelining.pipeline_problem import FixedStages, PipelineChoice, PipelineProblem
from bactrian.passes.pipelining.pipeline_search import search_pipeline
from bactrian.passes.pipelining.pipeline_shortage import OpenWays, shortage
from bactrian.passes.pipelining.simulated_choice import simulated_seconds
from bactrian.passes.plan.pipeline_record import OtherPipeline
from bactrian.passes.plan.remat_words import words_of_layers
from bactrian.passes.schedules.schedule import Schedule

_MOST_SIMULATED = 2  # of one schedule
_EQUAL = 1e-9  # pipelines that differ by no larger share take equally long: the first is chosen


@dataclass(frozen=True)
class PipelineRequest:
    """What a pipeline is chosen for.

    Attributes:
        kinds, border_bytes: of the layers, as `PipelineProblem` has them.
        menus: by group of the cluster's hosts.
        cluster: the hosts.
        num_microbatches: of a step.
        schedules: of which one is chosen.
        fixed: what is decided already.
        ways: what else the user could change.
        measured: stages that correct what options say.
        memory_shares: of a device's memory what stages may fill, by group; all of it if not given.
    """

    kinds: tuple[int, ...]
    border_bytes: tuple[float, ...]
    menus: tuple[tuple[Menu, ...], ...]
    cluster: Cluster
    num_microbatches: int
    schedules: tuple[Schedule, ...]
    fixed: FixedStages = field(default_factory=FixedStages)
    ways: OpenWays = field(default_factory=OpenWays)
    measured: tuple[MeasuredStage, ...] = ()
    memory_shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class ChosenPipeline:
    """The best pipeline.

    Attributes:
        choice: its stages and their time.
        schedule: that it follows.
        first_devices: of each stage's mesh, as the cluster numbers devices.
        bound_seconds: no other pipeline takes less in closed form, whatever its schedule.
        simulated_seconds: of a step, by its events.
        next_best: the fastest of those that were simulated and have another number of stages.
    """

    choice: PipelineChoice
    schedule: Schedule
    first_devices: tuple[int, ...]
    bound_seconds: float
    simulated_seconds: float
    next_best: OtherPipeline | None = None

    @property
    def remat(self) -> tuple[str, ...]:
        """What each layer computes again; nothing where none does."""
        words = [option.remat for stage in self.choice.stages for option in stage.options]
        return words_of_layers(words, len(words))


def choose_pipeline(request: PipelineRequest) -> ChosenPipeline:
    """The pipeline of the least step time.

    Stages follow one another along the line of hosts, so all orders of the kinds of hosts are tried. The best of each
    schedule in closed form, and others that come close, are simulated; the one whose events take least is chosen.

    Raises:
        InfeasiblePlanError: no pipeline fits into memory.
    """
    least = bound = math.inf
    candidates = list[_Candidate]()
    for order in itertools.permutations(range(len(request.cluster.groups))):
        for schedule in request.schedules:
            problem = _problem(request, order, schedule)
            found = search_pipeline(problem, incumbent=least)
            bound = min(bound, found.bound_seconds)
            for choice in found.best(_MOST_SIMULATED):
                seconds = simulated_seconds(problem, choice)
                candidates.append(_Candidate(schedule, order, choice, seconds))
                least = min(least, max(seconds, choice.step_seconds))
    if not candidates:
        schedule = min(
            request.schedules, key=lambda each: each.in_flight(0, len(request.kinds), request.num_microbatches)
        )
        orders = itertools.permutations(range(len(request.cluster.groups)))
        leanest = [_problem(request, order, schedule) for order in orders]
        is_whole = min(request.memory_shares, default=1.0) == 1
        raise shortage(request.cluster, leanest, request.ways, is_whole=is_whole)
    fastest = min(each.seconds for each in candidates)
    chosen = next(each for each in candidates if each.seconds <= fastest * (1 + _EQUAL))
    first_devices = _first_devices(request, chosen.order, chosen.choice)
    others = [each for each in candidates if each.num_stages != chosen.num_stages]
    next_best = min(others, key=lambda each: each.seconds).summary if others else None
    return ChosenPipeline(chosen.choice, chosen.schedule, first_devices, bound, chosen.seconds, next_best)


@dataclass(frozen=True)
class _Candidate:
    """A pipeline that is among the best in closed form, the order of the kinds of hosts, and seconds by its events."""

    schedule: Schedule
    order: tuple[int, ...]
    choice: PipelineChoice
    seconds: float

    @property
    def num_stages(self) -> int:
        """Of the pipeline."""
        return len(self.choice.stages)

    @property
    def summary(self) -> OtherPipeline:
        """For the plan."""
        return OtherPipeline(self.num_stages, self.schedule.name, self.seconds)


def _problem(request: PipelineRequest, order: Sequence[int], schedule: Schedule) -> PipelineProblem:
    groups = list(request.cluster.groups)
    for group, share in enumerate(request.memory_shares):
        groups[group] = replace(groups[group], memory_bytes=int(share * groups[group].memory_bytes))
    cluster = Cluster(request.cluster.name, tuple(groups[group] for group in order))
    return PipelineProblem(
        request.kinds,
        request.border_bytes,
        HostLine.of(cluster),
        tuple(request.menus[group] for group in order),
        request.num_microbatches,
        schedule,
        request.fixed,
        request.measured,
    )


def _first_devices(request: PipelineRequest, order: Sequence[int], choice: PipelineChoice) -> tuple[int, ...]:
    """The first device of each stage, from its place on the line of groups in some order."""
    groups = request.cluster.groups
    before = dict(zip(order, itertools.accumulate((groups[g].num_devices for g in order[:-1]), initial=0), strict=True))
    shift = {group: request.cluster.first_devices[group] - before[group] for group in order}
    places = [stage.place for stage in choice.stages]
    return tuple(place.first_device + shift[order[place.submesh.kind]] for place in places)


def check_fixed(fixed: FixedStages, cluster: Cluster, num_layers: int) -> None:
    """Refuse decisions that the program or the cluster can't have, whatever layers take.

    Raises:
        InfeasiblePlanError: there are more stages than layers.
        ConfigError: a stage begins behind the last layer; the cluster has no room for the meshes.
    """
    stages = fixed.known_stages or 1
    if stages > num_layers:
        raise InfeasiblePlanError(
            f"cannot make {stages} stages of {num_layers} layer{'s' * (num_layers > 1)}",
            why="a stage has at least one layer",
            fix=f"ask for at most {num_layers} stages",
        )
    if fixed.first_layers is not None and fixed.first_layers[-1] >= num_layers:
        raise ConfigError(
            f"cannot begin a stage at layer {fixed.first_layers[-1]}: the program has {num_layers} layers",
            fix="boundaries name the first layer of each stage, layers count from 0",
        )
    meshes = fixed.meshes or ((("data", 1),),)
    meshes = meshes if len(meshes) == stages else meshes * stages
    needed = sum(map(num_devices, meshes))
    if needed > cluster.num_devices:
        raise ConfigError(
            f"{stages} stage{'s' * (stages > 1)} on {' and '.join(dict.fromkeys(map(axes_text, meshes)))} "
            f"need{'s' * (stages == 1)} {needed} "
            f"devices, {cluster.name} has {cluster.num_devices}",
            why=cluster.description,
            fix="take fewer stages or smaller meshes, or describe a larger cluster",
        )
    _check_places(cluster, [num_devices(mesh) for mesh in meshes])


def _check_places(cluster: Cluster, sizes: Sequence[int]) -> None:
    """Refuse meshes that can't lie along the hosts, in any order of their kinds."""
    errors = list[ConfigError]()
    for groups in itertools.permutations(cluster.groups):
        try:
            Cluster(cluster.name, groups).places(sizes)
        except ConfigError as error:
            errors.append(error)
        else:
            return
    raise errors[0]
