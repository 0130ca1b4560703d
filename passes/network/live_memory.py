"""What nodes hold in memory over time, as far as it depends on their choice and matters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bactrian.passes.network.hash_consing import Array

_TOLERANCE = 1e-12  # of the limit: so near to it, rounding decides


@dataclass(frozen=True)
class _Table:
    """A node's changes: at ``places``, in order, the memory of its strategies changes by the rows of ``changes``, and is
    ``held`` from there on, above that of the first strategy."""

    places: Array
    changes: Array
    held: Array


@dataclass
class Memory:
    """Memory at some times, told by their places in ``times``.

    Attributes:
        times: in order; where a choice is over the limit, it is so at one of these, and nowhere by more.
    """

    times: list[int]
    # What changes at each place: whatever is chosen, and by strategy, above or below the node's first strategy.
    _fixed: Array
    _changes: dict[int, dict[int, Array]] = field(default_factory=dict)
    _tables: dict[int, _Table] = field(default_factory=dict)
    _spans: dict[int, list[tuple[int, int, Array]]] = field(default_factory=dict)
    _usages: dict[int, list[Array]] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Memory:
        """Where it does not matter."""
        return cls([], np.zeros(1))

    @classmethod
    def of(cls, usages: Sequence[Array], intervals: Sequence[tuple[int, int]]) -> Memory:
        """Nodes, numbered from 0, that hold what their strategy uses from the first time of their interval to its end."""
        lasting = [(node, first, end) for node, (first, end) in enumerate(intervals) if first < end]
        times = sorted({time for _, first, end in lasting for time in (first, end)})
        place = {time: number for number, time in enumerate(times)}
        memory = cls(times, np.zeros(max(len(times), 1)))
        for node, first, end in lasting:
            usage = usages[node].astype(np.float64)
            memory._hold(node, {place[first]: usage, place[end]: -usage})
        return memory

    def copy(self) -> Memory:
        """One that can be changed by itself."""
        changes = {node: dict(own) for node, own in self._changes.items()}
        return Memory(
            self.times, self._fixed.copy(), changes, dict(self._tables), dict(self._spans), dict(self._usages)
        )

    @property
    def nodes(self) -> Collection[int]:
        """Those whose choice changes the memory."""
        return self._changes.keys()

    def spans(self, node: int) -> list[tuple[int, int, Array]]:
        """``(start, end, usage)``: memory of each strategy between two places, above that of the first strategy."""
        if node not in self._changes:
            return []
        if node not in self._spans:
            table = self._table(node)
            ends = [*table.places[1:].tolist(), len(self._fixed)]
            self._spans[node] = [
                (start, end, held)
                for start, end, held in zip(table.places.tolist(), ends, table.held, strict=True)
                if held.any()
            ]
        return self._spans[node]

    def usages(self, node: int) -> list[Array]:
        """The different ones among what a node's strategies hold at any place, above that of the first strategy."""
        if node not in self._changes:
            return []
        if node not in self._usages:
            self._usages[node] = list({row.tobytes(): row for row in self._table(node).held}.values())
        return self._usages[node]

    @property
    def fixed(self) -> Array:
        """At each place, with every node's first strategy."""
        return np.cumsum(self._fixed)

    @property
    def least(self) -> Array:
        """A lower bound at each place."""
        change = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            change[table.places] += _steps(table.held.min(axis=1))
        return np.cumsum(change)

    @property
    def most(self) -> Array:
        """An upper bound at each place."""
        change = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            change[table.places] += _steps(table.held.max(axis=1))
        return np.cumsum(change)

    def profile(self, choice: Mapping[int, int]) -> Array:
        """At each place."""
        change = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            change[table.places] += table.changes[:, choice[node]]
        return np.cumsum(change)

    def fitting(self, node: int, slack: Array) -> Array:
        """Which strategies of a node hold no more above its leanest than there is slack, at each place."""
        table = self._table(node)
        room = np.minimum.reduceat(slack, table.places)
        return (table.held - table.held.min(axis=1)[:, None] <= room[:, None]).all(axis=0)

    def place_at(self, time: int) -> int:
        """The place of a time, or one beside it."""
        return min(bisect_left(self.times, time), len(self.times) - 1)

    def _table(self, node: int) -> _Table:
        table = self._tables.get(node)
        if table is None:
            changes = self._changes[node]
            places = sorted(changes)
            rows = np.array([changes[place] for place in places])
            table = self._tables[node] = _Table(np.array(places), rows, np.cumsum(rows, axis=0))
        return table

    # Changes

    def restrict(self, node: int, keep: Array) -> None:
        """Only some strategies of a node are left."""
        if node in self._changes:
            self._hold(node, {place: values[keep] for place, values in self._changes[node].items()})

    def follow(self, i: int, j: int, partner: Array) -> None:
        """Node ``j`` follows node ``i``, which holds its memory from now on: strategy k goes with ``partner[k]``.

        Touches only the places that change, since nodes are merged by the thousand.
        """
        if j not in self._changes:
            return
        own = self._changes.setdefault(i, {})
        for place, values in self._changes.pop(j).items():
            values = values[partner]
            self._fixed[place] += values[0]
            total = own[place] + (values - values[0]) if place in own else values - values[0]
            if total.any():
                own[place] = total
            else:
                own.pop(place, None)
        if not own:
            del self._changes[i]
        self._forget(i)
        self._forget(j)

    def _hold(self, node: int, changes: dict[int, Array]) -> None:
        """Set how a node's memory changes; that of its first strategy is fixed."""
        left: dict[int, Array] = {}
        for place, values in changes.items():
            self._fixed[place] += values[0]
            values = values - values[0]
            if values.any():
                left[place] = values
        self._forget(node)
        if left:
            self._changes[node] = left
        else:
            self._changes.pop(node, None)

    def _forget(self, node: int) -> None:
        self._tables.pop(node, None)
        self._spans.pop(node, None)
        self._usages.pop(node, None)

    def leave_out(self, limit: float) -> None:
        """Leave out places at which no choice is over the limit, or none by more than at a place beside them."""
        if not self.times:
            return
        self._keep(self.most > limit * (1 - _TOLERANCE))
        low = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            low[table.places] += table.changes.min(axis=1)
        self._keep(np.append(low[1:] < 0, True))  # else there is no less at the next place
        high = self._fixed.copy()
        for node in self._changes:
            table = self._table(node)
            high[table.places] += table.changes.max(axis=1)
        self._keep(np.append(True, high[1:] > 0))  # else there was no less at the place before

    def _keep(self, kept: Array) -> None:
        """Leave out places; what changes there changes at the next one that is left, if there is one."""
        if kept.all() or not self.times:
            return
        number = np.cumsum(kept) - kept  # of the next place that is left
        count = int(kept.sum())
        self._fixed = np.bincount(number, weights=self._fixed, minlength=count)[: max(count, 1)] * bool(count)
        self.times = [time for time, keep in zip(self.times, kept.tolist(), strict=True) if keep]
        for node in list(self._changes):
            table = self._table(node)
            moved = number[table.places]  # in order
            first = np.concatenate([[0], np.flatnonzero(moved[1:] != moved[:-1]) + 1])
            places, changes = moved[first], np.add.reduceat(table.changes, first, axis=0)
            left = (places < count) & changes.any(axis=1)
            if left.any():
                self._changes[node] = dict(zip(places[left].tolist(), changes[left], strict=True))
            else:
                del self._changes[node]
        self._tables, self._spans, self._usages = {}, {}, {}


def _steps(values: Array) -> Array:
    """How much each is above the one before it; the first one above 0."""
    steps = values.copy()
    steps[1:] -= values[:-1]
    return steps
