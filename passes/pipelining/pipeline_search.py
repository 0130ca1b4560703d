"""The search for a pipeline: stages, places, meshes and options of layers with the least step time, and how good it is.

The step time (`step_time`) is a sum over stages and round trips, plus ``m - 1`` times the period, plus the slowest update.
For limits on the period and on the update, the recurrence has the least sum; over all limits the step time is made least by
branch and bound: of the pipelines whose period is from ``a`` to ``b`` and whose update from ``c`` to ``d``, none takes less
than ``sum within (b, d) + (m - 1) a + c``.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bactrian.passes.pipelining.pipeline_problem import (
    PipelineChoice,
    PipelineProblem,
    Place,
    StageChoice,
    round_trips,
)
from bactrian.passes.pipelining.recurrence import Recurrence
from bactrian.passes.pipelining.round_trip_search import RoundTripSearch
from bactrian.passes.pipelining.stage_costs import choose_options
from bactrian.passes.pipelining.stage_tables import Limits, StageTables
from bactrian.passes.pipelining.step_time import MOST_ABOVE, period_seconds, step_seconds

TOLERANCE = 1e-3
MOST_RUNS = 200
_STRICT = (
    1e-2  # where it differs by no more than this, a pipeline within the limits is looked for, round trips included
)
_TRIES = 20  # of periods for the first pipeline, before any is allowed


@dataclass(frozen=True)
class PipelineSearch:
    """What a search found.

    Attributes:
        choice: the best pipeline; None where nothing fits, or nothing is faster than what had to be beaten.
        bound_seconds: no pipeline takes less for a step; infinite where none fits.
        num_runs: of the recurrence.
        others: pipelines of other numbers of stages that the search came by, and that take little longer than the best,
            or than what had to be beaten; the fastest first.
    """

    choice: PipelineChoice | None
    bound_seconds: float
    num_runs: int
    others: tuple[PipelineChoice, ...] = ()

    def best(self, most: int) -> tuple[PipelineChoice, ...]:
        """The fastest, at most so many."""
        return ((self.choice, *self.others) if self.choice is not None else self.others)[:most]


def search_pipeline(
    problem: PipelineProblem,
    *,
    tolerance: float = TOLERANCE,
    most_runs: int = MOST_RUNS,
    incumbent: float = math.inf,
) -> PipelineSearch:
    """Search for the pipeline of the least step time.

    Args:
        problem: layers, options and hosts.
        tolerance: the search ends when no other pipeline is faster by more than this share of the step.
        most_runs: of the recurrence, after which it ends too.
        incumbent: seconds of a step that must be beaten.
    """
    return _Search(problem, tolerance, most_runs, incumbent).run()


def any_stages(problem: PipelineProblem) -> tuple[StageChoice, ...] | None:
    """The stages of the least sum, whatever the period; None where nothing fits."""
    tables = StageTables(problem)
    found = Recurrence(tables, Limits()) if tables.submeshes else None
    if found is None or not math.isfinite(found.least):
        return None
    stages = _Stages(tables, found.places(found.seconds.index(found.least) + 1), Limits())
    return tuple(stages.with_options(0.0))


@dataclass(order=True)
class _Box:
    """Pipelines whose period and update lie above and within limits, and what none of them takes less than."""

    bound: float
    number: int
    above: Limits = field(compare=False)
    within: Limits = field(compare=False)
    sum_seconds: float = field(compare=False)


class _Search:
    """One search, with the best pipeline so far."""

    def __init__(self, problem: PipelineProblem, tolerance: float, most_runs: int, incumbent: float) -> None:
        self._problem, self._tolerance, self._most_runs = problem, tolerance, most_runs
        self._tables = StageTables(problem)
        self._repeats = problem.num_microbatches - 1  # periods of a step beside the sum
        self._best: PipelineChoice | None = None
        self._by_stages: dict[int, PipelineChoice] = {}
        self._step_seconds = incumbent
        self._num_runs = 0
        self._numbers = itertools.count()

    def run(self) -> PipelineSearch:
        """Find a first pipeline, then branch and bound."""
        least = self._tables.least_above(Limits()) if self._tables.submeshes else None
        if least is None:
            return PipelineSearch(None, math.inf, 0)
        bound = self._branch(least) if math.isfinite(self._step_seconds) or self._begin(least) else math.inf
        limit = self._step_seconds * (1 + MOST_ABOVE)
        others = [each for each in self._by_stages.values() if each is not self._best and each.step_seconds <= limit]
        others.sort(key=lambda each: each.step_seconds)
        return PipelineSearch(self._best, min(bound, self._step_seconds), self._num_runs, tuple(others))

    def _begin(self, least: Limits) -> bool:
        """Look within longer and longer periods until there are pipelines; whether there are."""
        period, tries = least.period * 1.05, 0
        while not math.isfinite(self._take(Limits(period), least)):
            if period == math.inf:
                return False
            period, tries = period * 1.3 if tries < _TRIES else math.inf, tries + 1
        return True

    def _branch(self, least: Limits) -> float:
        """Split boxes, the one of the least bound first; returns what no pipeline takes less than."""
        spare = self._step_seconds - self._tables.fewest_seconds()
        period = (spare - least.update) / self._repeats if self._repeats else math.inf
        boxes, narrow = list[_Box](), math.inf
        self._push(boxes, least, Limits(period, spare - self._repeats * least.period))
        while (
            boxes and boxes[0].bound < self._step_seconds * (1 - self._tolerance) and self._num_runs < self._most_runs
        ):
            box = heapq.heappop(boxes)
            above, within = box.above, box.within
            periods, updates = self._widths(above, within)
            if max(periods, updates) <= self._tolerance / 2 * self._step_seconds:
                narrow = min(narrow, box.bound)
            elif periods >= updates:
                middle = (above.period + within.period) / 2
                self._push(boxes, replace(above, period=middle), within, box.sum_seconds)
                self._push(boxes, above, replace(within, period=middle))
            else:
                middle = (above.update + within.update) / 2
                self._push(boxes, replace(above, update=middle), within, box.sum_seconds)
                self._push(boxes, above, replace(within, update=middle))
        return min([narrow, *(box.bound for box in boxes[:1])])

    def _widths(self, above: Limits, within: Limits) -> tuple[float, float]:
        """By how many seconds of the step the periods and the updates of a box differ at most."""
        periods = self._repeats * (within.period - above.period) if self._repeats else 0.0
        return periods, within.update - above.update

    def _push(self, boxes: list[_Box], above: Limits, within: Limits, sum_seconds: float | None = None) -> None:
        """Add a box, unless it is seen to have no pipeline; the recurrence is run if its sum is not known yet."""
        least = self._tables.least_above(within)
        if least is None:
            return
        above = Limits(max(above.period, least.period), max(above.update, least.update))
        if sum_seconds is None:
            sum_seconds = self._take(within, above)
        bound = sum_seconds + self._repeats * above.period + above.update
        heapq.heappush(boxes, _Box(bound, next(self._numbers), above, within, sum_seconds))

    def _take(self, within: Limits, above: Limits) -> float:
        """Take what is better than the best within limits; returns what no sum there is below.

        Args:
            within: the limits.
            above: what period and update are not below, so that what can't be better need not be looked at.
        """
        beside = self._repeats * above.period + above.update
        found = Recurrence(self._tables, within, self._step_seconds - beside)
        self._num_runs += 1
        least = found.least
        if not math.isfinite(least):
            return least
        for num_stages, seconds in enumerate(found.seconds, 1):
            if seconds + beside < self._step_seconds:
                places = found.places(num_stages)
                stages = _Stages(self._tables, places, within)
                self._consider(stages)
                if seconds == least and stages.period_seconds > within.period * (1 + 1e-9):
                    strict = RoundTripSearch.of(found)
                    least = strict.seconds
                    if strict.places is not None:
                        self._consider(_Stages(self._tables, strict.places, within))
        return least

    def _consider(self, stages: _Stages) -> None:
        """Choose the options of the layers, and take the pipeline if it is the best, or close and the best of its stages.

        What a second of the update counts depends on whether its stage is the slowest in it, or of a microbatch, or both.
        """
        known = self._by_stages.get(stages.num_stages)
        least = math.inf if known is None else known.step_seconds
        if stages.step_seconds >= min(least, self._step_seconds * (1 + MOST_ABOVE)):
            return
        for weight in (0.0, 1 / self._problem.num_microbatches, 1.0):
            choice = PipelineChoice.of(self._problem, stages.with_options(weight))
            if choice.step_seconds < least:
                self._by_stages[stages.num_stages], least = choice, choice.step_seconds
            if choice.step_seconds < self._step_seconds:
                self._best, self._step_seconds = choice, choice.step_seconds


class _Stages:
    """Stages at their places, with the menus that take least, before options are chosen."""

    def __init__(self, tables: StageTables, places: Sequence[Place], limits: Limits) -> None:
        self._tables, self._places = tables, places
        found = [
            tables.stage(len(places) - stage, place.submesh, limits, place.first_layer, place.end_layer)
            for stage, place in enumerate(places)
        ]
        self.num_stages = len(places)
        self._found = found
        self._in_flight = [tables.in_flight[len(places) - stage] for stage in range(len(places))]
        seconds, updates = [each.seconds for each in found], [each.update_seconds for each in found]
        trips, count = round_trips(tables.problem, places), tables.problem.num_microbatches
        self.period_seconds = period_seconds(seconds, trips, self._in_flight, count)
        self.step_seconds = step_seconds(seconds, trips, updates, self._in_flight, count)

    def with_options(self, update_weight: float) -> list[StageChoice]:
        """The stages with an option for each layer."""
        problem, found = self._tables.problem, list[StageChoice]()
        for place, cheapest, in_flight in zip(self._places, self._found, self._in_flight, strict=True):
            menu, factors = cheapest.menu, (cheapest.seconds_factor, cheapest.update_factor)
            kinds = problem.kinds[place.first_layer : place.end_layer]
            memory = problem.line.kinds[place.submesh.kind].memory_bytes
            numbers = choose_options(menu.options, kinds, in_flight, memory, update_weight)
            assert numbers is not None, "the tables said that it fits"
            options = tuple(menu.options[kind][number] for kind, number in zip(kinds, numbers, strict=True))
            left, is_only = len(self._places) - len(found), len(self._places) == 1
            calls = problem.call_seconds(left, place.submesh, is_only=is_only)
            found.append(StageChoice(place, menu.mesh, in_flight, options, calls, *factors))
        return found
