"""Pipelines whose round trips too are within the limit of the period: the best of what a `Recurrence` has.

Seen from before, the longest round trip that ends at a stage exceeds the microbatches that may be on it times the limit ``T``
by::

    D = t + max(-T, D of the stage before + x - (k of the stage before - k) T)

with ``t`` seconds of the stage, ``x`` of the round trip from the stage before, and ``k`` microbatches in flight; only stages
that wait for round trips count. ``D`` must not be above 0. Pipelines are begun at the first stage, those of the least sum
first: as the recurrence knows what is left at least, the first that ends is the best (Hart, Nilsson and Raphael, "A formal
basis for the heuristic determination of minimum cost paths", 1968).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from bactrian.passes.pipelining.pipeline_problem import Place
from bactrian.passes.pipelining.recurrence import SLACK, Recurrence

MOST_STAGES_TRIED = 3_000


@dataclass(frozen=True)
class _Begun:
    """A pipeline up to where its next stage begins.

    Attributes:
        left: stages that are left.
        number, first, position: submesh, first layer and position of the next one.
        done: seconds so far, with the round trip to it.
        excess: ``D`` of the stage before, with the round trip from there to the next.
        places: so far.
    """

    left: int
    number: int
    first: int
    position: int
    done: float
    excess: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class RoundTripSearch:
    """What was found.

    Attributes:
        seconds: no pipeline within the limits has a smaller sum.
        places: of one with this sum; None where there is none, or the search was given up.
    """

    seconds: float
    places: tuple[Place, ...] | None

    @classmethod
    def of(cls, recurrence: Recurrence) -> RoundTripSearch:
        """Search what the recurrence has."""
        numbers, known = itertools.count(), defaultdict[tuple[int, int, int, int], list[tuple[float, float]]](list)
        heap = list[tuple[float, int, int, _Begun]]()
        for left, seconds in enumerate(recurrence.seconds, 1):
            if math.isfinite(seconds):
                for least, number, position in recurrence.beginnings(left):
                    if math.isfinite(least):
                        begun = _Begun(left, number, 0, position, 0.0, -math.inf, ())
                        heap.append((least, left, next(numbers), begun))
        heapq.heapify(heap)
        tried = 0
        while heap and tried < MOST_STAGES_TRIED:
            least, left, _, begun = heapq.heappop(heap)
            if left == 0:
                return cls(least, begun.places)
            others = known[left, begun.number, begun.first, begun.position]
            if any(done <= begun.done and excess <= begun.excess for done, excess in others):
                continue
            others.append((begun.done, begun.excess))
            for total, following in _extended(recurrence, begun):
                tried += 1
                if total < recurrence.allowance:
                    heapq.heappush(heap, (total, following.left, next(numbers), following))
        return cls(heap[0][0] if heap else math.inf, None)


def _extended(recurrence: Recurrence, begun: _Begun) -> Iterator[tuple[float, _Begun]]:
    """The next stage of all lengths, and where the one after it may begin; with the least sum that each may come to."""
    tables, left, period = recurrence.tables, begun.left, recurrence.limits.period
    waits, end = tables.waits(left), recurrence.behind(begun.number, begun.position)
    for num_layers, costs in recurrence.costs(left, begun.number):
        own = float(costs[begun.first]) if begun.first < len(costs) else math.inf
        excess = own + max(-period, begun.excess) if waits else -math.inf
        if not math.isfinite(own) or excess > SLACK * period:
            continue
        first = begun.first + num_layers
        places = (*begun.places, recurrence.place(begun.number, begun.first, first, begun.position))
        if left == 1:
            if first == tables.problem.num_layers:
                yield begun.done + own, _Begun(0, 0, first, end, begun.done + own, excess, places)
            continue
        hidden = (tables.in_flight[left] - tables.in_flight[left - 1]) * period if waits else 0.0
        for least, trip, number, position in recurrence.followers(left - 1, begun.number, first, end):
            done = begun.done + own + trip
            yield done + least, _Begun(left - 1, number, first, position, done, excess + trip - hidden, places)
