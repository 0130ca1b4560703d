"""Where blocks repeat in a row of ops, and where to cut between them: numbers only, no MLIR.

A model of equal blocks is planned best if its layers are equal: what one of them takes is known for all. So cuts should lie
at the same place of each block. What repeats is found among the anchors, the ops that carry the model's weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bactrian.passes.stages.layer_partitioning import Floats, Ints


@dataclass(frozen=True)
class RepeatedRun:
    """Anchors ``first`` to before ``first + length``, each of which is equal to the one ``period`` further, as far as that is
    one of them."""

    first: int
    length: int
    period: int


def repeated_runs(keys: Sequence[Hashable], places: Sequence[int], weights: Sequence[float]) -> list[RepeatedRun]:
    """The runs of repeated anchors, in order: first that which weighs most, then those on both sides of it.

    Args:
        keys: of the anchors: equal ones have equal keys.
        places: the position of each anchor among the ops: within a run, as many ops stand before equal anchors.
        weights: of the anchors.

    >>> repeated_runs("eqkvqkvqkvh", range(11), [1.0] * 11)
    [RepeatedRun(first=1, length=9, period=3)]
    """
    numbers: dict[Hashable, int] = {}
    alike = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    gaps = np.diff(np.asarray(places, np.int64), prepend=-1)
    before = np.concatenate([[0.0], np.cumsum(np.asarray(weights, np.float64))])
    return _runs(alike, gaps, before, 0, len(keys))


def _runs(alike: Ints, gaps: Ints, before: Floats, first: int, end: int) -> list[RepeatedRun]:
    best, most = None, 0.0
    for period in range(1, (end - first) // 2 + 1):
        one, other = slice(first, end - period), slice(first + period, end)
        equal = alike[one] == alike[other]
        for start, stop in _stretches(equal & (gaps[one] == gaps[other])):
            start -= start > 0 and bool(equal[start - 1])  # before a run's first anchor anything may stand
            if stop - start < period:
                continue
            weight = before[first + stop + period] - before[first + start]
            if weight > most * (1 + 1e-9):  # of equal ones that of the shortest period
                best, most = RepeatedRun(first + start, stop - start + period, period), weight
    if best is None:
        return []
    left = _runs(alike, gaps, before, first, best.first)
    return [*left, best, *_runs(alike, gaps, before, best.first + best.length, end)]


def _stretches(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The first and the end of each stretch of true flags."""
    change = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return list(zip(change[::2].tolist(), change[1::2].tolist(), strict=True))


@dataclass(frozen=True)
class BlockCuts:
    """Positions between ops where cuts keep repeated blocks equal.

    Attributes:
        between: the blocks, and outside of all runs.
        within: blocks as well, where no more bytes cross than between them.
    """

    between: tuple[int, ...]
    within: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """All of them, in order."""
        return tuple(sorted({*self.between, *self.within}))


def block_cuts(runs: Sequence[RepeatedRun], places: Sequence[int], crossing: Ints) -> BlockCuts:
    """Where to cut so that repeated blocks are equal.

    Args:
        runs: of anchors.
        places: the position of each anchor among the ops.
        crossing: bytes that live across each position, as `layer_partitioning.cut_bytes` gives them.
    """
    inside, between, within = set[int](), set[int](), set[int]()
    for run in runs:
        end = run.first + run.length
        before = places[run.first - 1] + 1 if run.first else 0
        inside.update(range(before, places[end] + 1 if end < len(places) else len(crossing)))
        classes = _classes(run, places, crossing)
        least = min(cost for cost, _ in classes)
        cheapest = [positions for cost, positions in classes if cost <= least]
        between.update(cheapest[0])
        within.update(position for positions in cheapest[1:] for position in positions)
    between.update(position for position in range(1, len(crossing) - 1) if position not in inside)
    return BlockCuts(tuple(sorted(between)), tuple(sorted(within - between)))


def _classes(run: RepeatedRun, places: Sequence[int], crossing: Ints) -> list[tuple[float, list[int]]]:
    """For each anchor of a period, the cheapest place for cuts before it: the mean of their bytes inside of the run, and the
    positions of the cuts, also before the first block and behind the last one."""
    found = list[tuple[float, list[int]]]()
    first, end = run.first, run.first + run.length
    for shift in range(run.period):
        inner = [at for at in range(first + shift, end, run.period) if at > first]
        gap = min(places[at] - places[at - 1] for at in inner)
        starts = np.array([places[at - 1] + 1 for at in inner])
        costs = [float(crossing[starts + distance].mean()) for distance in range(gap)]
        distance = gap - 1 - int(np.argmin(costs[::-1]))  # of equal ones the latest, as everywhere
        positions: list[int] = (starts + distance).tolist()
        if shift == 0 and first and (before := places[first] - (gap - 1 - distance)) > places[first - 1]:
            positions.insert(0, before)
        behind = places[end - 1] + 1 + distance
        if (run.length - shift) % run.period == 0 and end < len(places) and behind <= places[end]:
            positions.append(behind)
        found.append((costs[distance], positions))
    return found
