"""Message passing: lower bounds and choices for networks of any size, with a Lagrangian for memory.

The algorithm is TRW-S (Kolmogorov, "Convergent tree-reweighted message passing for energy minimization", PAMI 2006): nodes in
one order, then in the other, send their neighbours the least cost for each strategy of these. Messages are a
reparametrization: the least costs of all nodes and edges that are left add up to a lower bound on any choice, whichever
messages were sent, and the bound does not fall from sweep to sweep. On a tree it is the optimum.

The memory limit is relaxed (Held and Karp 1971): each unit of memory costs a multiplier at program points where decoded
choices are over the limit. Any multipliers that are not negative give a lower bound on choices within the limit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.min_marginals import DualMultipliers
from bactrian.passes.network.reduced_network import ReducedNetwork

SWEEPS_PER_CHOICE = 3
"""Messages change little in one sweep: after so many a choice is decoded."""
_MOST_SWEEPS = 60  # of `trws_multipliers`: linear programs follow
_LAST_SWEEPS = 15  # of these, with the same multipliers
_SMALL_STEP = 1e-6  # of the bound: where a sweep gains less, the next ones will too
_MOST_POINTS = 30  # with a multiplier
_FIRST_STEP = 0.05  # of the cost, for all of the memory


class MessagePassing:
    """The messages of a network, with a multiplier on memory at some program points."""

    def __init__(self, network: ReducedNetwork) -> None:
        self._network = network
        self._nodes = sorted(network.costs)
        number = {node: at for at, node in enumerate(self._nodes)}
        self._own = [network.costs[node] for node in self._nodes]
        self._penalized = self._own
        self._later: list[list[int]] = [[] for _ in self._nodes]  # edges to later nodes
        self._earlier: list[list[int]] = [[] for _ in self._nodes]
        self._ends: list[tuple[int, int]] = []
        self._forth: list[Array] = []  # strategies of the later end as rows
        self._back: list[Array] = []
        for (i, j), matrix in sorted(network.pairs.items()):
            first, second = number[i], number[j]
            if first > second:
                first, second, matrix = second, first, network.arrays.transposed(matrix)
            self._later[first].append(len(self._ends))
            self._earlier[second].append(len(self._ends))
            self._ends.append((first, second))
            self._forth.append(np.ascontiguousarray(matrix.T))
            self._back.append(np.ascontiguousarray(matrix))
        self._to_later = [np.zeros(len(matrix)) for matrix in self._forth]
        self._to_earlier = [np.zeros(len(matrix)) for matrix in self._back]
        self._share = [
            1.0 / max(len(later), len(earlier), 1) for later, earlier in zip(self._later, self._earlier, strict=True)
        ]
        self._multipliers: dict[int, float] = {}
        self._constant = network.constant

    def set_multipliers(self, multipliers: Mapping[int, float]) -> None:
        """Set what a unit of memory costs at some program points (indices of ``network.memory.times``)."""
        self._multipliers = {point: multiplier for point, multiplier in multipliers.items() if multiplier > 0}
        network = self._network
        if not self._multipliers:
            self._penalized, self._constant = self._own, network.constant
            return
        fixed, limit = network.memory.fixed, float(network.limit or 0)
        self._constant = network.constant + sum(m * (float(fixed[at]) - limit) for at, m in self._multipliers.items())
        points = np.array(sorted(self._multipliers))
        total = np.concatenate([[0.0], np.cumsum([self._multipliers[at] for at in points.tolist()])])
        self._penalized = list(self._own)
        for number, node in enumerate(self._nodes):
            for start, end, usage in network.memory.spans(node):
                multiplier = total[np.searchsorted(points, end)] - total[np.searchsorted(points, start)]
                if multiplier:
                    self._penalized[number] = self._penalized[number] + multiplier * usage

    def sweep(self) -> float:
        """Pass messages to all later nodes, then to all earlier ones; returns a lower bound on the cost."""
        later, earlier = self._to_later, self._to_earlier
        for at, edges in enumerate(self._later):
            if edges:
                ahead = self._share[at] * self._sum(at)
                for edge in edges:
                    message = (self._forth[edge] + (ahead - earlier[edge])).min(axis=1)
                    later[edge] = message - message.min()
        bound = self._constant
        for at in range(len(self._nodes) - 1, -1, -1):
            total = self._sum(at)
            least = total.min()
            bound += float(least)
            back = self._share[at] * (total - least)
            for edge in self._earlier[at]:
                message = (self._back[edge] + (back - later[edge])).min(axis=1)
                least = message.min()
                bound += float(least)
                earlier[edge] = message - least
        return bound

    def decode(self) -> dict[int, int]:
        """A choice, node by node: the best beside what earlier nodes have taken, given the messages of later ones.

        It may exceed the memory limit, which counts by its multipliers only.
        """
        return self._decoded(None)

    def decode_within_limit(self) -> dict[int, int] | None:
        """The same, but a strategy that leaves too little memory for the leanest ones of all later nodes is not taken.

        None where even the leanest strategies don't fit. Forbidden pairs may make the cost infinite.
        """
        room = float(self._network.limit or 0) - self._network.memory.least
        return None if (room < 0).any() else self._decoded(room)

    def _decoded(self, room: Array | None) -> dict[int, int]:
        chosen = list[int]()
        for at, node in enumerate(self._nodes):
            total = self._penalized[at]
            for edge in self._later[at]:
                total = total + self._to_earlier[edge]
            for edge in self._earlier[at]:
                total = total + self._forth[edge][:, chosen[self._ends[edge][0]]]
            spans = self._network.memory.spans(node) if room is not None else []
            if room is None or not spans:
                chosen.append(int(total.argmin()))
                continue
            above = [(start, end, usage - usage.min()) for start, end, usage in spans if np.ptp(usage)]
            fits = np.isfinite(total)
            for start, end, usage in above:
                fits &= usage <= room[start:end].min()
            if not fits.any():
                for _, _, usage in above:
                    fits = fits | (usage == 0)
            k = int(np.where(fits, total, np.inf).argmin())
            for start, end, usage in above:
                room[start:end] -= usage[k]
            chosen.append(k)
        return dict(zip(self._nodes, chosen, strict=True))

    def multipliers(self) -> DualMultipliers:
        """The reparametrization after the last sweep: its lower bound is that of the sweep.

        A node that has sent messages to earlier ones has lent each of them its share, which is part of their edges.
        """
        moved = dict[tuple[int, int], tuple[Array, Array]]()
        lent = list[Array]()
        for at in range(len(self._nodes)):
            total = self._sum(at)
            lent.append(self._share[at] * (total - total.min()))
        for edge, (first, second) in enumerate(self._ends):
            ends = self._nodes[first], self._nodes[second]
            to_first, to_second = self._to_earlier[edge], self._to_later[edge] - lent[second]
            moved[min(ends), max(ends)] = (to_first, to_second) if ends[0] < ends[1] else (to_second, to_first)
        return DualMultipliers(moved, dict(self._multipliers))

    def reduced_costs(self) -> dict[int, Array]:
        """About what each strategy costs above the best of its node: a low one is likely in a good choice."""
        found = dict[int, Array]()
        for at, node in enumerate(self._nodes):
            total = self._sum(at)
            found[node] = total - total.min()
        return found

    def _sum(self, at: int) -> Array:
        total = self._penalized[at]
        for edge in self._later[at]:
            total = total + self._to_earlier[edge]
        for edge in self._earlier[at]:
            total = total + self._to_later[edge]
        return total


def trws_multipliers(network: ReducedNetwork, deadline: float) -> DualMultipliers:
    """What a few sweeps give, with multipliers on memory that follow the decoded choices.

    Args:
        network: reduced.
        deadline: of `time.monotonic`.
    """
    messages, memory, bound = MessagePassing(network), MemoryMultipliers(network), -np.inf
    for number in range(_MOST_SWEEPS):
        before, bound = bound, messages.sweep()
        if time.monotonic() > deadline:
            break
        if number >= _MOST_SWEEPS - _LAST_SWEEPS or network.limit is None:
            if bound - before < _SMALL_STEP * abs(bound):
                break
        elif number % SWEEPS_PER_CHOICE == 0:
            choice = messages.decode()
            memory.update(network.memory.profile(choice), network.cost(choice))
            messages.set_multipliers(memory.values)
    return messages.multipliers()


class MemoryMultipliers:
    """Multipliers of the program points at which choices exceed the memory limit.

    They change by resilient steps (Rprop: Riedmiller and Braun 1993): longer while memory stays on one side of the limit,
    half as long when it has crossed it.

    Attributes:
        values: by program point, in cost per unit of memory.
    """

    def __init__(self, network: ReducedNetwork) -> None:
        self._network = network
        self.values: dict[int, float] = {}
        self._steps: dict[int, float] = {}
        self._sides: dict[int, bool] = {}

    def update(self, profile: Array, cost: float) -> None:
        """A step after a choice with this memory at each program point, and this cost."""
        limit = float(self._network.limit or 0)
        unit = max(limit, 1.0)
        self._add_points(profile, limit, _FIRST_STEP * abs(cost) / unit)
        for point in self.values:
            over = float(profile[point]) - limit
            if over <= 0 and not self.values[point]:
                continue
            side = over > 0
            if point in self._sides:
                self._steps[point] *= 1.25 if side == self._sides[point] else 0.5
            self._sides[point] = side
            length = self._steps[point] * min(1.0, max(abs(over) / unit * 10, 0.1))
            self.values[point] = max(0.0, self.values[point] + (length if side else -length))

    def _add_points(self, profile: Array, limit: float, step: float) -> None:
        apart, taken = len(profile) // 100, 0
        if len(self.values) >= _MOST_POINTS or not np.isfinite(step):
            return
        for point in np.argsort(-profile, kind="stable")[:2000].tolist():
            if taken == 4 or profile[point] <= limit:
                return
            if all(abs(point - other) > apart for other in self.values):
                self.values[point], self._steps[point] = 0.0, step
                taken += 1
