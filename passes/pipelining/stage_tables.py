"""What every range of layers takes as a stage on every submesh, within limits: the tables that the recurrence reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bactrian.passes.machine.spec import num_devices
from bactrian.passes.pipelining.host_line import Floats, Submesh
from bactrian.passes.pipelining.layer_options import Menu
from bactrian.passes.pipelining.measured_stages import Corrections
from bactrian.passes.pipelining.pipeline_problem import PipelineProblem, in_flight_by_stages_left
from bactrian.passes.pipelining.stage_costs import LayerRanges, least_seconds, least_updates


@dataclass(frozen=True)
class Limits:
    """What a pipeline may take at most: seconds of a period, and of a stage's update."""

    period: float = math.inf
    update: float = math.inf


@dataclass(frozen=True)
class CheapestMenu:
    """The menu that a stage takes the least seconds with.

    Attributes:
        menu: of its mesh.
        seconds: of a microbatch.
        update_seconds: the least of the update.
        seconds_factor, update_factor: by how much both are longer than options and calls say.
    """

    menu: Menu
    seconds: float
    update_seconds: float
    seconds_factor: float
    update_factor: float


class StageTables:
    """The stages of a problem: each range of layers on each submesh, made as they are asked for.

    Stages are counted from the end, 1 for the last: as many microbatches are in flight as the schedule has there.
    """

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.ranges = LayerRanges.of(problem.kinds)
        menus: dict[Submesh, list[Menu]] = {}
        for kind, of_kind in enumerate(problem.menus):
            for menu in of_kind:
                menus.setdefault(Submesh(num_devices(menu.mesh), kind), []).append(menu)
        self.submeshes = sorted(
            (each for each in menus if next(problem.line.places(each), None) is not None),
            key=lambda each: (each.num_devices, each.kind),
        )
        self.menus = {submesh: tuple(menus[submesh]) for submesh in self.submeshes}
        self.most_stages = min(problem.num_layers, problem.line.num_devices)
        known = problem.fixed.known_stages
        if known is not None:
            self.most_stages = min(self.most_stages, known)
        self.in_flight = in_flight_by_stages_left(problem.schedule, self.most_stages, problem.num_microbatches)
        self._seconds: dict[tuple[int, Submesh], tuple[float, Floats]] = {}  # with the longest
        self._corrections = Corrections(problem.measured, problem.num_microbatches)

    def waits(self, stages_left: int) -> bool:
        """Whether the stage that is so many from the end waits for round trips: not all microbatches may be in flight."""
        return self.in_flight[stages_left] < self.problem.num_microbatches

    def seconds(self, in_flight: int, submesh: Submesh, longest: float = math.inf) -> Floats:
        """Seconds of a microbatch, by menu of the submesh and class of layer ranges; those above the longest may be infinite.

        What calls take is not among them, and nothing is corrected by what was measured.
        """
        key = in_flight, submesh
        known, found = self._seconds.get(key, (-math.inf, np.zeros(0)))
        if longest > known:
            memory = self.problem.line.kinds[submesh.kind].memory_bytes
            found = np.stack(
                [least_seconds(menu.options, self.ranges, in_flight, memory, longest) for menu in self.menus[submesh]]
            )
            self._seconds[key] = longest, found
        return found

    @cached_property
    def _updates(self) -> dict[Submesh, Floats]:
        return {
            submesh: _corrected(
                np.stack([least_updates(menu.options, self.ranges) for menu in menus]) + self._fewest_calls[submesh][1],
                self._update_factors[submesh],
            )
            for submesh, menus in self.menus.items()
        }

    @cached_property
    def _seconds_factors(self) -> dict[Submesh, Floats]:
        """By how much stages take longer than their options and calls say, by menu and class of ranges."""
        return {
            submesh: np.stack([self._corrections.of_seconds(menu.mesh, self.ranges) for menu in menus])
            for submesh, menus in self.menus.items()
        }

    @cached_property
    def _update_factors(self) -> dict[Submesh, Floats]:
        return {
            submesh: np.stack([self._corrections.of_updates(menu.mesh, self.ranges) for menu in menus])
            for submesh, menus in self.menus.items()
        }

    def _calls(self, stages_left: int, submesh: Submesh) -> Floats:
        """Seconds of the calls of a microbatch, and of the other calls of a step, by class of layer ranges."""
        seconds = [self.problem.call_seconds(stages_left, submesh, is_only=is_only) for is_only in (False, True)]
        found = np.repeat(np.array(seconds[0])[:, None], len(self.ranges.steps), axis=1)
        found[:, self.ranges.classes[0, -1]] = seconds[1]
        return found

    @cached_property
    def _fewest_calls(self) -> dict[Submesh, Floats]:
        lefts = range(1, self.most_stages + 1)
        return {each: np.min([self._calls(left, each) for left in lefts], axis=0) for each in self.submeshes}

    def _fewest(self, submesh: Submesh) -> Floats:
        """`seconds` and calls of stages with as few microbatches in flight, and as few calls, as any has."""
        taken = self.seconds(min(self.in_flight[1:]), submesh) + self._fewest_calls[submesh][0]
        return _corrected(taken, self._seconds_factors[submesh])

    def within(self, stages_left: int, submesh: Submesh, limits: Limits) -> Floats:
        """Seconds of a microbatch by menu of the submesh and class of ranges, infinite where it exceeds a limit."""
        factors = self._seconds_factors[submesh]
        work = self.seconds(self.in_flight[stages_left], submesh, limits.period / _least_factor(factors))
        found = self._limited(_corrected(work + self._calls(stages_left, submesh)[0], factors), submesh, limits)
        for number, menu in enumerate(self.menus[submesh]):
            if not self.problem.fixed.allows_mesh(menu.mesh, stages_left):
                found[number] = math.inf
        return found

    def _limited(self, seconds: Floats, submesh: Submesh, limits: Limits) -> Floats:
        within = (seconds <= limits.period) & (self._updates[submesh] <= limits.update)
        return np.where(within, seconds, math.inf)

    def is_usable(self, submesh: Submesh, limits: Limits) -> bool:
        """Whether any range of layers may run on the submesh within limits, with as few microbatches in flight as there are."""
        return bool(np.isfinite(self._limited(self._fewest(submesh), submesh, limits)).any())

    def by_length(self, stages_left: int, submesh: Submesh, limits: Limits) -> list[tuple[int, Floats]]:
        """The least seconds on the submesh of so many layers by the first of them, for each number of layers that there may be."""
        best = self.within(stages_left, submesh, limits).min(axis=0)
        if not np.isfinite(best).any():
            return []
        found = np.append(best, math.inf)[self.ranges.classes]
        starts, count = self.problem.fixed.first_layers, self.problem.num_layers
        if starts is not None:
            stage = len(starts) - stages_left
            ends = [*starts, count]
            only = np.full_like(found, math.inf)
            only[ends[stage], ends[stage + 1]] = found[ends[stage], ends[stage + 1]]
            found = only
        firsts, ends = np.nonzero(np.isfinite(found))
        return [(length, found.diagonal(length)) for length in np.unique(ends - firsts).tolist()]

    def stage(self, stages_left: int, submesh: Submesh, limits: Limits, first: int, end: int) -> CheapestMenu:
        """The menu of the least seconds for layers ``first`` to before ``end``."""
        number = self.ranges.classes[first, end]
        of_menus = self.within(stages_left, submesh, limits)[:, number]
        chosen = int(of_menus.argmin())
        return CheapestMenu(
            self.menus[submesh][chosen],
            float(of_menus[chosen]),
            float(self._updates[submesh][chosen, number]),
            float(self._seconds_factors[submesh][chosen, number]),
            float(self._update_factors[submesh][chosen, number]),
        )

    def fewest_devices(self, limits: Limits) -> float:
        """Devices that stages within limits need, wherever they stand: no pipeline needs fewer. Infinite if there is none."""
        return float(self._shortest(limits, lambda submesh, seconds: np.full_like(seconds, submesh.num_devices))[-1])

    def fewest_seconds(self) -> float:
        """Seconds of a microbatch over all stages, wherever they stand, without round trips: no pipeline takes less."""
        return float(self.before[-1])

    @cached_property
    def before(self) -> Floats:
        """By layer, seconds of a microbatch over stages of all layers before it: no pipeline takes less for them."""
        return self._shortest(Limits(), lambda _, seconds: seconds)

    def _shortest(self, limits: Limits, weight: Callable[[Submesh, Floats], Floats]) -> Floats:
        """By layer, the least sum of weights of stages of the layers before it, with as few microbatches in flight as any has."""
        edges = list[Floats]()
        for submesh in self.submeshes:
            seconds = self._limited(self._fewest(submesh), submesh, limits).min(axis=0)
            weights = np.where(np.isfinite(seconds), weight(submesh, seconds), math.inf)
            edges.append(np.append(weights, math.inf)[self.ranges.classes])
        least = np.min(edges, axis=0)
        before = np.full(self.problem.num_layers + 1, math.inf)
        before[0] = 0.0
        for end in range(1, self.problem.num_layers + 1):
            before[end] = (before + least[:, end]).min()
        return before

    def least_above(self, within: Limits) -> Limits | None:
        """What neither the period nor the update of any pipeline within limits is below; None where there are none.

        Stages alone, wherever they stand, need more devices than there are.
        """
        fewest = [self._fewest(submesh) for submesh in self.submeshes]
        period = self._least(fewest, lambda value: replace(within, period=min(value, within.period)))
        update = self._least(self._updates.values(), lambda value: replace(within, update=min(value, within.update)))
        return None if period is None or update is None else Limits(period, update)

    def _least(self, tables: Iterable[Floats], limits: Callable[[float], Limits]) -> float | None:
        """The least of the values in tables that leaves enough devices as a limit; None if none does."""
        values = np.unique(np.concatenate([np.zeros(0), *(table[np.isfinite(table)] for table in tables)]))
        low, high = 0, len(values)
        while low < high:
            middle = (low + high) // 2
            if self.fewest_devices(limits(float(values[middle]))) <= self.problem.line.num_devices:
                high = middle
            else:
                low = middle + 1
        return float(values[low]) if low < len(values) else None


def _least_factor(factors: Floats) -> float:
    """Of those that are finite; 1 without any."""
    return float(factors.min(initial=math.inf, where=np.isfinite(factors))) if np.isfinite(factors).any() else 1.0


def _corrected(seconds: Floats, factors: Floats) -> Floats:
    """Seconds times factors, of which some are infinite."""
    return np.where(np.isfinite(factors), seconds * np.where(np.isfinite(factors), factors, 1.0), math.inf)
