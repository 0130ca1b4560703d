"""Live memory: what nodes hold at each program point, as far as it depends on their choice and can exceed the limit.

A node holds the memory of its strategy over its live range, from the first program point of its interval to its end. Program
points at which the limit can't bind, or never before it binds at another one, are dropped (`LiveMemory.drop_points`): whether a
choice keeps the limit stays the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bactrian.passes.network.hash_consing import Array

_TOLERANCE = 1e-12  # of the limit: so near to it, rounding decides


@dataclass(frozen=True)
class _UsageSteps:
    """A node's changes: at ``points``, in order, the memory of its strategies changes by the rows of ``changes``, and is
    ``held`` from there on, above that of the first strategy."""

    points: Array
    changes: Array
    held: Array


@dataclass
class LiveMemory:
    """Memory at the program points that are left. A point is told by its index in ``times``.

    Attributes:
        times: of the program points, in order; where a choice is over the limit, it is so at one of these, and nowhere by
            more.
    """

    times: list[int]
    # What changes at each point: whatever is chosen, and by strategy, above or below the node's first strategy.
    _fixed: Array
    _changes: dict[int, dict[int, Array]] = field(default_factory=dict)
    _tables: dict[int, _UsageSteps] = field(default_factory=dict)
    _spans: dict[int, list[tuple[int, int, Array]]] = field(default_factory=dict)
    _usages: dict[int, list[Array]] = field(default_factory=dict)

    @classmethod
    def none(cls) -> LiveMemory:
        """Where it does not matter."""
        return cls([], np.zeros(1))

    @classmethod
    def of(cls, usages: Sequence[Array], intervals: Sequence[tuple[int, int]]) -> LiveMemory:
        """Of nodes, numbered from 0.

        Args:
            usages: of each node, the memory of each strategy, shape (K_i,).
            intervals: of each node, ``(first, end)``: its live range is ``first <= t < end``.
        """
        live = [(node, first, end) for node, (first, end) in enumerate(intervals) if first < end]
        times = sorted({time for _, first, end in live for time in (first, end)})
        point = {time: number for number, time in enumerate(times)}
        memory = cls(times, np.zeros(max(len(times), 1)))
        for node, first, end in live:
            usage = usages[node].astype(np.float64)
            memory._hold(node, {point[first]: usage, point[end]: -usage})
        return memory

    def copy(self) -> LiveMemory:
        """One that can be changed by itself."""
        changes = {node: dict(own) for node, own in self._changes.items()}
        return LiveMemory(
            self.times, self._fixed.copy(), changes, dict(self._tables), dict(self._spans), dict(self._usages)
        )

    @property
    def nodes(self) -> Collection[int]:
        """Those whose choice changes the memory."""
        return self._changes.keys()

    def spans(self, node: int) -> list[tuple[int, int, Array]]:
        """``(start, end, usage)``: memory of each strategy at the points ``start <= p < end``, above that of the first one."""
        if node not in self._changes:
            return []
        if node not in self._spans:
            table = self._table(node)
            ends = [*table.points[1:].tolist(), len(self._fixed)]
            self._spans[node] = [
                (start, end, held)
                for start, end, held in zip(table.points.tolist(), ends, table.held, strict=True)
                if held.any()
            ]
        return self._spans[node]

    def usages(self, node: int) -> list[Array]:
        """The different ones among what a node's strategies hold at any point, above that of the first strategy."""
        if node not in self._changes:
            return []
        if node not in self._usages:
            self._usages[node] = list({row.tobytes(): row for row in self._table(node).held}.values())
        return self._usages[node]

    @property
    def fixed(self) -> Array:
        """At each point, with every node's first strategy."""
        return np.cumsum(self._fixed)

    @property
    def least(self) -> Array:
        """At each point, with every node's leanest strategy there: a lower bound."""
        change = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            change[table.points] += _differences(table.held.min(axis=1))
        return np.cumsum(change)

    @property
    def most(self) -> Array:
        """An upper bound at each point."""
        change = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            change[table.points] += _differences(table.held.max(axis=1))
        return np.cumsum(change)

    def profile(self, choice: Mapping[int, int]) -> Array:
        """What a choice holds at each point."""
        change = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            change[table.points] += table.changes[:, choice[node]]
        return np.cumsum(change)

    def fitting(self, node: int, slack: Array) -> Array:
        """Which strategies of a node hold no more above its leanest than there is slack, at each point."""
        table = self._table(node)
        room = np.minimum.reduceat(slack, table.points)
        return (table.held - table.held.min(axis=1)[:, None] <= room[:, None]).all(axis=0)

    def point_at(self, time: int) -> int:
        """The point of a time, or one beside it."""
        return min(bisect_left(self.times, time), len(self.times) - 1)

    def _table(self, node: int) -> _UsageSteps:
        table = self._tables.get(node)
        if table is None:
            changes = self._changes[node]
            points = sorted(changes)
            rows = np.array([changes[point] for point in points])
            table = self._tables[node] = _UsageSteps(np.array(points), rows, np.cumsum(rows, axis=0))
        return table

    # Changes

    def restrict(self, node: int, keep: Array) -> None:
        """Only some strategies of a node are left."""
        if node in self._changes:
            self._hold(node, {point: values[keep] for point, values in self._changes[node].items()})

    def follow(self, i: int, j: int, partner: Array) -> None:
        """Node ``j`` follows node ``i``, which holds its memory from now on: strategy k goes with ``partner[k]``.

        Touches only the points that change, since nodes are merged by the thousand.
        """
        if j not in self._changes:
            return
        own = self._changes.setdefault(i, {})
        for point, values in self._changes.pop(j).items():
            values = values[partner]
            self._fixed[point] += values[0]
            total = own[point] + (values - values[0]) if point in own else values - values[0]
            if total.any():
                own[point] = total
            else:
                own.pop(point, None)
        if not own:
            del self._changes[i]
        self._forget(i)
        self._forget(j)

    def _hold(self, node: int, changes: dict[int, Array]) -> None:
        """Set how a node's memory changes; that of its first strategy is fixed."""
        left: dict[int, Array] = {}
        for point, values in changes.items():
            self._fixed[point] += values[0]
            values = values - values[0]
            if values.any():
                left[point] = values
        self._forget(node)
        if left:
            self._changes[node] = left
        else:
            self._changes.pop(node, None)

    def _forget(self, node: int) -> None:
        self._tables.pop(node, None)
        self._spans.pop(node, None)
        self._usages.pop(node, None)

    def drop_points(self, limit: float) -> None:
        """Drop points at which no choice is over the limit, or none by more than at a point beside them."""
        if not self.times:
            return
        self._keep(self.most > limit * (1 - _TOLERANCE))
        low = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            low[table.points] += table.changes.min(axis=1)
        self._keep(np.append(low[1:] < 0, True))  # else there is no less at the next point
        high = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            high[table.points] += table.changes.max(axis=1)
        self._keep(np.append(True, high[1:] > 0))  # else there was no less at the point before

    def _keep(self, kept: Array) -> None:
        """Drop the other points; what changes there changes at the next one that is left, if there is one."""
        if kept.all() or not self.times:
            return
        number = np.cumsum(kept) - kept  # of the next point that is left
        count = int(kept.sum())
        self._fixed = np.bincount(number, weights=self._fixed, minlength=count)[: max(count, 1)] * bool(count)
        self.times = [time for time, keep in zip(self.times, kept.tolist(), strict=True) if keep]
        for node in list(self._changes):
            table = self._table(node)
            moved = number[table.points]  # in order
            first = np.concatenate([[0], np.flatnonzero(moved[1:] != moved[:-1]) + 1])
            points, changes = moved[first], np.add.reduceat(table.changes, first, axis=0)
            left = (points < count) & changes.any(axis=1)
            if left.any():
                self._changes[node] = dict(zip(points[left].tolist(), changes[left], strict=True))
            else:
                del self._changes[node]
        self._tables, self._spans, self._usages = {}, {}, {}


def _differences(values: Array) -> Array:
    """How much each is above the one before it; the first one above 0."""
    differences = values.copy()
    differences[1:] -= values[:-1]
    return differences
