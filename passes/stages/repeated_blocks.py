"""Where blocks repeat in a row of ops, and where to cut between them: numbers only, no MLIR.

A model of equal blocks is planned best if its layers are equal: what one of them takes is known for all. So cuts should lie
at the same place of each block. What repeats is found among the anchors, the ops that carry the model's weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bactrian.passes.stages import layer_partitioning
from bactrian.passes.stages.layer_partitioning import Floats, Ints

_LEAST_REST = 0.1  # of the weight of a block, for a layer of its own between runs
_SLACK_OF_REST = 0.5  # by which a layer between runs may exceed an even share


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
class RunCuts:
    """The cuts of one run, in order: its ends as well, where its blocks are as long there as elsewhere.

    Attributes:
        between: its blocks.
        within: these, and places in its blocks where no more bytes cross.
    """

    between: tuple[int, ...]
    within: tuple[int, ...]


@dataclass(frozen=True)
class OpsInOrder:
    """Forward ops in a row.

    Attributes:
        weights: of each op: the predicted time of a step that goes with it.
        is_anchor: whether each op is one.
        crossing: bytes that live across each position, as `layer_partitioning.cut_bytes` gives them.
    """

    weights: Sequence[float]
    is_anchor: Sequence[bool]
    crossing: Ints

    @property
    def places(self) -> list[int]:
        """The positions of the anchors."""
        return [place for place, heavy in enumerate(self.is_anchor) if heavy]


def run_cuts(runs: Sequence[RepeatedRun], places: Sequence[int], crossing: Ints) -> list[RunCuts]:
    """Where to cut runs so that their blocks are equal.

    Args:
        runs: of anchors.
        places: the position of each anchor among the ops.
        crossing: bytes that live across each position.
    """
    found = list[RunCuts]()
    for run in runs:
        classes = _classes(run, places, crossing)
        least = min(cost for cost, _ in classes)
        cheapest = [positions for cost, positions in classes if cost <= least]
        within = sorted({position for positions in cheapest for position in positions})
        found.append(RunCuts(tuple(cheapest[0]), tuple(within)))
    return found


def allowed_cuts(cuts: Sequence[RunCuts], num_ops: int) -> list[int]:
    """All positions where cuts keep repeated blocks equal: between them, and anywhere outside of runs."""
    found = set(range(1, num_ops))
    for each in cuts:
        found -= set(range(each.between[0], each.between[-1] + 1))
        found |= set(each.between)
    return sorted(found & set(range(1, num_ops)))


def block_layers(cuts: Sequence[RunCuts], ops: OpsInOrder, most: int) -> list[int]:
    """The first position of each layer, if there is a layer for each block.

    Parts of blocks are layers where there are few of them, several blocks where there are many. What lies between runs is
    as many layers as it has weights of a block: a small part belongs to the block beside it.

    Args:
        cuts: of the runs, in their order.
        ops: that are cut.
        most: layers in runs.
    """
    num_ops, before = len(ops.weights), np.concatenate([[0.0], np.cumsum(np.asarray(ops.weights, np.float64))])
    fine = sum(len(each.within) for each in cuts) <= most
    positions = [each.within if fine else each.between for each in cuts]
    together = max(1, -(-sum(map(len, positions)) // most))
    positions = [(each[0], *each[1:-1][together - 1 :: together], each[-1]) for each in positions]
    blocks = [before[end] - before[first] for each in positions for first, end in itertools.pairwise(each)]
    block = float(np.mean(blocks)) if blocks else 0.0
    starts, inner, first = {0}, [list(dict.fromkeys(each)) for each in positions], 0
    for number, own in enumerate([*inner, []]):
        end = own[0] if own else num_ops
        if before[end] - before[first] >= _LEAST_REST * block:
            starts.update(_rest(ops, first, end, block, most))
        elif number and len(inner[number - 1]) > 1:
            starts.discard(first)  # it goes with the block before it
        elif own:
            own.pop(0)
        starts.update(own)
        first = own[-1] if own else first
    return sorted(start for start in starts if start < num_ops)


def _rest(ops: OpsInOrder, first: int, end: int, block: float, most: int) -> list[int]:
    """The first position of each layer of what lies between runs, or of all where nothing repeats."""
    anchors = ops.is_anchor[first:end]
    weights = ops.weights[first:end]
    count = min(sum(anchors), most if not block else max(1, round(sum(weights) / block)))
    crossing = ops.crossing[first : end + 1]
    made = layer_partitioning.cut(weights, anchors, crossing, count, _SLACK_OF_REST) if count > 1 else None
    return [first] if made is None else [first + start for start in made.starts]


def _classes(run: RepeatedRun, places: Sequence[int], crossing: Ints) -> list[tuple[float, list[int]]]:
    """For each anchor of a period, the cheapest place for cuts before it: the mean of their bytes inside of the run, and the
    positions of the cuts, also before the first block and behind the last one."""
    found = list[tuple[float, list[int]]]()
    first, end, num_ops = run.first, run.first + run.length, len(crossing) - 1
    for shift in range(run.period):
        inner = [at for at in range(first + shift, end, run.period) if at > first]
        gap = min(places[at] - places[at - 1] for at in inner)
        starts = np.array([places[at - 1] + 1 for at in inner])
        costs = [float(crossing[starts + distance].mean()) for distance in range(gap)]
        distance = gap - 1 - int(np.argmin(costs[::-1]))  # of equal ones the latest, as everywhere
        positions: list[int] = (starts + distance).tolist()
        before, behind = places[first] - (gap - 1 - distance), places[end - 1] + 1 + distance
        if shift == 0 and before > (places[first - 1] if first else -1):
            positions.insert(0, before)
        if (run.length - shift) % run.period == 0 and behind <= (places[end] if end < len(places) else num_ops):
            positions.append(behind)
        found.append((costs[distance], positions))
    return found
