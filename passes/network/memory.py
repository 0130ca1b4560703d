"""What nodes hold in memory over time, as far as it depends on their choice."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bactrian.passes.network.interned import Array


@dataclass
class Memory:
    """Memory at each of some times, told by their places in ``times``.

    Attributes:
        times: in order; at all other times there is no more than at one of these.
    """

    times: list[int]
    # What changes at each place: whatever is chosen, and by strategy, above or below the node's first strategy.
    _fixed: Array
    _changes: dict[int, dict[int, Array]] = field(default_factory=dict)
    _spans: dict[int, list[tuple[int, int, Array]]] = field(default_factory=dict)

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
        return Memory(self.times, self._fixed.copy(), changes)

    @property
    def nodes(self) -> Iterable[int]:
        """Those whose choice changes the memory."""
        return self._changes.keys()

    def spans(self, node: int) -> list[tuple[int, int, Array]]:
        """``(start, end, usage)``: memory of each strategy between two places, above that of the first strategy."""
        if node not in self._changes:
            return []
        if node not in self._spans:
            self._spans[node] = self._spans_of(self._changes[node])
        return self._spans[node]

    def _spans_of(self, changes: Mapping[int, Array]) -> list[tuple[int, int, Array]]:
        places = sorted(changes)
        found: list[tuple[int, int, Array]] = []
        held: Array = np.zeros_like(changes[places[0]])
        for start, end in itertools.pairwise([*places, len(self._fixed)]):
            held = held + changes[start]
            if held.any() and start < end:
                found.append((start, end, held))
        return found

    @property
    def fixed(self) -> Array:
        """At each place, with every node's first strategy."""
        return np.cumsum(self._fixed)

    @property
    def least(self) -> Array:
        """A lower bound at each place."""
        total = self.fixed
        for node in self._changes:
            for start, end, usage in self.spans(node):
                total[start:end] += usage.min()
        return total

    def profile(self, choice: Mapping[int, int]) -> Array:
        """At each place."""
        change = self._fixed.copy()
        for node, changes in self._changes.items():
            for place, values in changes.items():
                change[place] += values[choice[node]]
        return np.cumsum(change)

    def place_at(self, time: int) -> int:
        """The place of a time, or one beside it."""
        return min(bisect_left(self.times, time), len(self.times) - 1)

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
        self._spans.pop(i, None)
        self._spans.pop(j, None)

    def _hold(self, node: int, changes: dict[int, Array]) -> None:
        """Set how a node's memory changes; that of its first strategy is fixed."""
        left: dict[int, Array] = {}
        for place, values in changes.items():
            self._fixed[place] += values[0]
            values = values - values[0]
            if values.any():
                left[place] = values
        self._spans.pop(node, None)
        if left:
            self._changes[node] = left
        else:
            self._changes.pop(node, None)

    def merge_places(self) -> None:
        """Leave out places at which there is never more than at a place beside them, whatever is chosen."""
        low = self._fixed.copy()
        for changes in self._changes.values():
            for place, values in changes.items():
                low[place] += values.min()
        self._keep(np.append(low[1:] < 0, True))  # else there is no less at the next place
        high = self._fixed.copy()
        for changes in self._changes.values():
            for place, values in changes.items():
                high[place] += values.max()
        self._keep(np.append(True, high[1:] > 0))  # else there was no less at the place before

    def _keep(self, kept: Array) -> None:
        """Leave out places; what changes there changes at the next one that is left, if there is one."""
        if kept.all() or not self.times:
            return
        number = np.concatenate([[0], np.cumsum(kept)[:-1]])  # of the next place that is left
        count = int(kept.sum())
        self._fixed = np.bincount(number, weights=self._fixed, minlength=count + 1)[:count]
        self.times = [time for time, keep in zip(self.times, kept.tolist(), strict=True) if keep]
        numbers = number.tolist()
        for node, changes in list(self._changes.items()):
            moved: dict[int, Array] = {}
            for place, values in changes.items():
                at = numbers[place]
                if at < count:
                    moved[at] = moved[at] + values if at in moved else values
            moved = {place: values for place, values in moved.items() if values.any()}
            if moved:
                self._changes[node] = moved
            else:
                del self._changes[node]
        self._spans = {}
