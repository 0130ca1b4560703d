"""The search for a pipeline against brute force: every cut, place, mesh and option of every layer of small instances."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.pipelining.host_line import HostKind, HostLine, HostLink
from bactrian.passes.pipelining.layer_options import LayerOption, Menu
from bactrian.passes.pipelining.measured_stages import MeasuredStage, parse_stages, stages_text
from bactrian.passes.pipelining.pipeline_problem import (
    FixedStages,
    PipelineChoice,
    PipelineProblem,
    in_flight_by_stages_left,
)
from bactrian.passes.pipelining.pipeline_search import search_pipeline
from bactrian.passes.pipelining.stage_costs import choose_options
from bactrian.passes.pipelining.step_time import step_seconds
from bactrian.passes.schedules.by_name import SCHEDULES
from bactrian.passes.schedules.schedule import Schedule

MEMORY = 100.0


@dataclass(frozen=True)
class Chosen:
    """What brute force puts on the line: layers, devices, the kind of host, a menu."""

    first: int
    end: int
    device: int
    kind: int
    menu: Menu

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return math.prod(size for _, size in self.menu.mesh)


def instance(seed: int, *, same_updates: bool = True) -> PipelineProblem:
    """A random problem of at most 6 layers and 4 devices."""
    rng = random.Random(seed)
    num_kinds = rng.randint(1, 3)
    kinds = tuple(rng.randrange(num_kinds) for _ in range(rng.randint(1, 6)))
    sizes = rng.choice([[1], [2], [3], [4], [1, 1], [2, 2], [1, 2], [3, 1], [1, 1, 2], [1, 1, 1, 1], [2, 1, 1]])
    several = rng.random() < 0.5  # kinds of hosts also where they have equally many devices
    by_size: dict[tuple[int, int], int] = {}
    hosts = tuple(by_size.setdefault((size, n * several), len(by_size)) for n, size in enumerate(sizes))
    slow = rng.choice([0.1, 1.0, 5.0, 50.0])  # seconds of all that crosses a border at once
    call = rng.choice([0.0, 0.1, 2.0])
    host_kinds = tuple(
        HostKind(
            size,
            MEMORY,
            HostLink(0.01, 1e3 / slow),
            HostLink(0.02, rng.uniform(100, 300) / slow),
            call * rng.uniform(0.5, 1),
        )
        for size, _ in by_size
    )
    menus = tuple(tuple(menus_of(rng, size, sizes, num_kinds, same_updates)) for size, _ in by_size)
    borders = (0.0, *(rng.choice([0.0, rng.uniform(1, 100)]) for _ in kinds[1:]))
    schedule = SCHEDULES[rng.choice(sorted(SCHEDULES))]
    return PipelineProblem(
        kinds,
        borders,
        HostLine(host_kinds, hosts),
        menus,
        rng.choice([1, 2, 3, 4, 8, 32]),
        schedule,
        fixed(rng, len(kinds)),
    )


def menus_of(rng: random.Random, per_host: int, sizes: list[int], num_kinds: int, same_updates: bool) -> Iterator[Menu]:
    """Menus of meshes that such hosts have, some of them twice."""
    for devices in sorted({*range(1, per_host + 1), *range(per_host, sum(sizes) + 1, per_host)}):
        for mesh in ((("data", devices),), (("model", devices),))[: rng.randint(1, 2)]:
            options = list[tuple[LayerOption, ...]]()
            for _ in range(num_kinds):
                seconds, update = rng.uniform(1, 3) / devices ** rng.uniform(0.5, 1), rng.uniform(0, 3)
                options.append(
                    tuple(
                        LayerOption(
                            seconds * slow,
                            2 * seconds * slow,
                            update if same_updates else rng.uniform(0, 3),
                            rng.uniform(5, 40) / devices,
                            rng.uniform(0, 20) / slow**2,
                            rng.choice([0.0, 5.0, 20.0]),
                        )
                        for slow in (1.0, rng.uniform(1, 1.2), rng.uniform(1, 1.5))[: rng.randint(1, 3)]
                    )
                )
            yield Menu(mesh, tuple(options))


def fixed(rng: random.Random, num_layers: int) -> FixedStages:
    """Mostly nothing; else a number of stages, their layers, or their meshes."""
    count = rng.randint(1, min(3, num_layers))
    first_layers = (0, *sorted(rng.sample(range(1, num_layers), count - 1)))
    mesh = ((rng.choice(["data", "model"]), rng.randint(1, 2)),)
    choices = [FixedStages(count), FixedStages(first_layers=first_layers), FixedStages(count, first_layers)]
    choices += [FixedStages(meshes=(mesh,)), FixedStages(count, meshes=(mesh, (("data", 1),), mesh)[:count])]
    return rng.choice([*[FixedStages()] * 8, *choices])


def frontier(problem: PipelineProblem, chosen: Chosen, in_flight: int) -> list[tuple[float, float]]:
    """Seconds and update seconds of every choice of options that fits and that no other beats."""
    found = set[tuple[float, float]]()
    if math.isinf(factors(problem, chosen)[0]):
        return []
    for options in itertools.product(*(chosen.menu.options[kind] for kind in problem.kinds[chosen.first : chosen.end])):
        memory = sum(o.state_bytes + in_flight * o.kept_bytes for o in options) + max(o.working_bytes for o in options)
        if memory <= problem.line.kinds[chosen.kind].memory_bytes:
            found.add(
                (sum(o.forward_seconds + o.backward_seconds for o in options), sum(o.update_seconds for o in options))
            )
    return [a for a in found if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in found)]


def factors(problem: PipelineProblem, chosen: Chosen) -> tuple[float, float]:
    """By how much a stage takes longer than its options say: as those of the same layers, mesh and microbatches that were
    measured, else as the mean of those of the same mesh and microbatches, else as the least of all, or not at all."""
    own = sorted(problem.kinds[chosen.first : chosen.end])
    usable = [each for each in problem.measured if math.isfinite(each.seconds_factor)]
    near = [
        each
        for each in problem.measured
        if each.mesh == chosen.menu.mesh and each.num_microbatches == problem.num_microbatches
    ]
    same = [each for each in near if sorted(problem.kinds[each.first_layer : each.end_layer]) == own]
    if found := same or [each for each in near if each in usable]:
        return fmean(each.seconds_factor for each in found), fmean(each.update_factor for each in found)
    return min([1.0, *(each.seconds_factor for each in usable)]), min([1.0, *(each.update_factor for each in usable)])


def measured(problem: PipelineProblem, rng: random.Random) -> Iterator[MeasuredStage]:
    """Stages that were measured, some of which can't run; some of another size of microbatch."""
    meshes = [menu.mesh for menus in problem.menus for menu in menus]
    for _ in range(rng.randint(1, 4)):
        first = rng.randrange(problem.num_layers)
        end, mesh = rng.randint(first + 1, problem.num_layers), rng.choice(meshes)
        count = rng.choice([problem.num_microbatches, problem.num_microbatches, 5])
        if rng.random() < 0.3:
            yield MeasuredStage.unusable(first, end, mesh, count)
        else:
            yield MeasuredStage(first, end, mesh, count, rng.uniform(0.5, 4), rng.uniform(0.5, 4))


def pipelines(problem: PipelineProblem, num_stages: int) -> Iterator[list[Chosen]]:
    """All cuts of the layers, with all meshes at all places of the line."""
    host_of = [h for h, kind in enumerate(problem.line.hosts) for _ in range(problem.line.kinds[kind].num_devices)]
    for cuts in itertools.combinations(range(1, len(problem.kinds)), num_stages - 1):
        bounds = [0, *cuts, len(problem.kinds)]
        if problem.fixed.first_layers not in (None, tuple(bounds[:-1])):
            continue

        def placed(stage: int, device: int, bounds: list[int] = bounds) -> Iterator[list[Chosen]]:
            if stage == num_stages:
                yield []
                return
            for start in range(device, len(host_of)):
                kind = problem.line.hosts[host_of[start]]
                for menu in problem.menus[kind]:
                    chosen = Chosen(bounds[stage], bounds[stage + 1], start, kind, menu)
                    if is_place(problem, chosen, host_of) and has_mesh(problem.fixed, menu, stage):
                        yield from ([chosen, *rest] for rest in placed(stage + 1, start + chosen.size))

        yield from placed(0, 0)


def is_place(problem: PipelineProblem, chosen: Chosen, host_of: list[int]) -> bool:
    """Whether a mesh lies within a host, or has all devices of hosts of one kind."""
    hosts = host_of[chosen.device : chosen.device + chosen.size]
    if len(hosts) < chosen.size or any(problem.line.hosts[host] != chosen.kind for host in hosts):
        return False
    return len(set(hosts)) == 1 or all(hosts.count(host) == host_of.count(host) for host in hosts)


def has_mesh(fixed: FixedStages, menu: Menu, stage: int) -> bool:
    """Whether a stage's mesh is the one that is decided."""
    return fixed.meshes is None or menu.mesh == fixed.meshes[stage if len(fixed.meshes) > 1 else 0]


def calls_of(problem: PipelineProblem, chosen: list[Chosen]) -> tuple[list[float], list[float]]:
    """By stage, seconds of the calls of a microbatch, one where the last stage fuses them, and of the two others of a step.

    A loop over the microbatches of a single stage of one device is one call of the step.
    """
    is_fused = problem.schedule.name != "gpipe"
    calls = [problem.line.kinds[each.kind].call_seconds for each in chosen]
    if is_fused and len(chosen) == chosen[0].size == 1:
        return [0.0], calls
    twice = [2 * seconds for seconds in calls]
    return [*twice[:-1], calls[-1] if is_fused else twice[-1]], twice


def trips_of(problem: PipelineProblem, chosen: list[Chosen]) -> list[float]:
    """Seconds there and back between neighbours."""
    host_of = [h for h, kind in enumerate(problem.line.hosts) for _ in range(problem.line.kinds[kind].num_devices)]
    found = list[float]()
    for a, b in itertools.pairwise(chosen):
        nbytes = problem.border_bytes[b.first]
        kinds = problem.line.kinds[a.kind], problem.line.kinds[b.kind]
        if host_of[a.device + a.size - 1] == host_of[b.device]:
            link = kinds[0].intra_host
            rate, latency = min(a.size, b.size) * link.bytes_per_second, link.latency
        else:
            hosts = [max(1, each.size // kind.num_devices) for each, kind in zip((a, b), kinds, strict=True)]
            rate = min(n * kind.inter_host.bytes_per_second for n, kind in zip(hosts, kinds, strict=True))
            latency = max(kind.inter_host.latency for kind in kinds)
        found.append(nbytes / rate + 2 * latency if nbytes else 0.0)
    return found


def brute_force(problem: PipelineProblem) -> float:
    """The least step time of all there is."""
    best, m = math.inf, problem.num_microbatches
    known = dict[tuple[int, int, int, int, int], list[tuple[float, float]]]()
    for count in range(1, len(problem.kinds) + 1):
        if problem.fixed.known_stages not in (None, count):
            continue
        in_flight = [problem.schedule.in_flight(stage, count, m) for stage in range(count)]
        for chosen in pipelines(problem, count):
            fronts = list[list[tuple[float, float]]]()
            for each, k in zip(chosen, in_flight, strict=True):
                key = each.first, each.end, each.kind, id(each.menu), k
                if key not in known:
                    known[key] = frontier(problem, each, k)
                fronts.append(known[key])
            trips, (calls, once) = trips_of(problem, chosen), calls_of(problem, chosen)
            slower = [factors(problem, each) for each in chosen]
            for taken in itertools.product(*fronts):
                seconds = [f * (t + call) for (t, _), call, (f, _) in zip(taken, calls, slower, strict=True)]
                updates = [f * (u + call) for (_, u), call, (_, f) in zip(taken, once, slower, strict=True)]
                best = min(best, step_seconds(seconds, trips, updates, in_flight, m))
    return best


def check(seed: int, problem: PipelineProblem) -> None:
    """The search finds what brute force finds, and bounds it."""
    best, found = brute_force(problem), search_pipeline(problem, tolerance=1e-6)
    assert (found.choice is None) == math.isinf(best) == math.isinf(found.bound_seconds), seed
    if found.choice is not None:
        assert best * (1 - 1e-9) <= found.choice.step_seconds <= best * (1 + 1e-5), seed
        assert found.bound_seconds <= best * (1 + 1e-9), seed
        assert found.bound_seconds >= best * (1 - 1e-5), seed
        check_stages(problem, found.choice)


def check_stages(problem: PipelineProblem, found: PipelineChoice) -> None:
    """The stages have all layers, fit, stand where brute force may put them, and take what is said."""
    host_of = [h for h, kind in enumerate(problem.line.hosts) for _ in range(problem.line.kinds[kind].num_devices)]
    chosen = list[Chosen]()
    for number, stage in enumerate(found.stages):
        place = stage.place
        (menu,) = (each for each in problem.menus[place.submesh.kind] if each.mesh == stage.mesh)
        chosen.append(Chosen(place.first_layer, place.end_layer, place.first_device, place.submesh.kind, menu))
        assert is_place(problem, chosen[-1], host_of)
        assert stage.memory_bytes <= problem.line.kinds[place.submesh.kind].memory_bytes * (1 + 1e-9)
        for kind, option in zip(problem.kinds[place.first_layer : place.end_layer], stage.options, strict=True):
            assert option in menu.options[kind]
        assert stage.in_flight == problem.schedule.in_flight(number, len(found.stages), problem.num_microbatches)
    assert [each.first for each in chosen] == [0, *(each.end for each in chosen[:-1])]
    assert chosen[-1].end == len(problem.kinds)
    assert all(a.device + a.size <= b.device for a, b in itertools.pairwise(chosen))
    (calls, once), slower = calls_of(problem, chosen), [factors(problem, each) for each in chosen]
    seconds = [
        factor * (call + sum(option.forward_seconds + option.backward_seconds for option in stage.options))
        for call, stage, (factor, _) in zip(calls, found.stages, slower, strict=True)
    ]
    updates = [
        factor * (call + sum(option.update_seconds for option in stage.options))
        for call, stage, (_, factor) in zip(once, found.stages, slower, strict=True)
    ]
    in_flight = [stage.in_flight for stage in found.stages]
    step = step_seconds(seconds, trips_of(problem, chosen), updates, in_flight, problem.num_microbatches)
    assert found.step_seconds == pytest.approx(step, rel=1e-9)


@pytest.mark.parametrize(
    "seeds",
    [range(24), *(pytest.param(range(n, n + 100), marks=pytest.mark.long) for n in range(0, 500, 100))],
    ids=lambda seeds: f"{seeds.start}-{seeds.stop}",
)
def test_equals_brute_force(seeds: range) -> None:
    for seed in seeds:
        check(seed, instance(seed))


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 200), marks=pytest.mark.long)], ids=str)
def test_equals_brute_force_with_measured_stages(seeds: range) -> None:
    for seed in seeds:
        problem = instance(seed)
        check(seed, dataclasses.replace(problem, measured=tuple(measured(problem, random.Random(seed)))))


@pytest.mark.parametrize("seed", range(1000, 1012))
def test_bounds_what_differs_in_updates(seed: int) -> None:
    # Then the fastest choice of a stage need not be the best of the step, and the bound is below it.
    problem = instance(seed, same_updates=False)
    best, found = brute_force(problem), search_pipeline(problem)
    assert (found.choice is None) == math.isinf(best)
    if found.choice is not None:
        assert found.bound_seconds <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= found.choice.step_seconds <= best * 1.05
        check_stages(problem, found.choice)


def test_measured_stages_as_text() -> None:
    stages = (
        MeasuredStage(0, 4, (("data", 2), ("model", 2)), 8, 1.5, 1 / 3),
        MeasuredStage.unusable(4, 5, (("data", 1),), 1),
    )
    assert parse_stages(stages_text(stages)) == stages
    assert parse_stages("") == ()


@pytest.mark.parametrize(
    "text",
    ["0-4", "4-4 on data=2 of 8 takes 1.0 1.0", "0-4 on data=2 of 8 takes 0.0 1.0", "0-4 on data=2 of 8 takes nan 1"],
)
def test_bad_measured_stages(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read measured stage"):
        parse_stages(text)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda schedule: schedule.name)
def test_in_flight_counts_from_the_end(schedule: Schedule) -> None:
    for m in (1, 2, 5, 8):
        counted = in_flight_by_stages_left(schedule, 6, m)
        for stages in range(1, 7):
            assert [schedule.in_flight(s, stages, m) for s in range(stages)] == counted[stages:0:-1]


def test_nothing_beats_a_good_incumbent() -> None:
    problem = instance(0)
    found = search_pipeline(problem).choice
    assert found is not None
    nothing = search_pipeline(problem, incumbent=found.step_seconds * 0.9)
    assert (nothing.choice, nothing.bound_seconds) == (None, found.step_seconds * 0.9)


def test_idle_slow_hosts() -> None:
    """A host that would make the pipeline slower stays idle, wherever it stands."""
    kinds = tuple(HostKind(1, MEMORY, HostLink(0.0, 1e9), HostLink(0.0, 1e9)) for _ in range(2))
    option = LayerOption(1.0, 2.0, 0.0, 1.0, 1.0, 0.0)
    mesh = (("data", 1),)
    slow = Menu(mesh, ((dataclasses.replace(option, forward_seconds=50.0),),))
    for hosts in itertools.permutations((0, 0, 1)):
        line = HostLine(kinds, hosts)
        menus = (Menu(mesh, ((option,),)),), (slow,)
        found = search_pipeline(PipelineProblem((0,) * 4, (0.0,) * 4, line, menus, 8, SCHEDULES["1f1b"])).choice
        assert found is not None
        assert [hosts[stage.place.first_device] for stage in found.stages] == [0, 0]
        assert found.step_seconds == pytest.approx(6.0 * (8 + 1))


def test_layers_that_compute_the_same_again_are_neighbours() -> None:
    """Which of the equal layers keep more makes no difference to time and memory."""
    keeps = LayerOption(1.0, 2.0, 0.0, 4.0, 3.0, 0.0)
    again = LayerOption(1.0, 3.0, 0.0, 4.0, 1.0, 0.0, "all")
    options, kinds = ((keeps, again), (again, keeps)), (0, 1, 0, 0, 1, 0)
    numbers = choose_options(options, kinds, in_flight=2, memory_bytes=6 * 4 + 2 * 12, update_weight=0.0)
    assert numbers is not None
    words = [options[kind][number].remat for kind, number in zip(kinds, numbers, strict=True)]
    assert words.count("none") == 3
    for kind in set(kinds):
        own = [word for word, other in zip(words, kinds, strict=True) if other == kind]
        assert own == sorted(own)
