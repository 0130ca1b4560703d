"""A cost network that shrinks in place, and the way back to a choice for all nodes of the problem.

This module has the data and the steps that change it; which steps are worth taking is decided in ``reductions.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network import reduction_kernels
from bactrian.passes.network.hash_consing import Array, HashConsing
from bactrian.passes.network.live_memory import LiveMemory
from bactrian.passes.network.problem import FORBIDDEN, CostNetwork

_Decide = Callable[[dict[int, int]], int]  # the strategy of a node that is gone, from those of nodes that went later


class ReducedNetwork:
    """A network that shrinks in place. Costs are floats; forbidden ones infinite. Equal arrays are one object.

    Attributes:
        costs: node -> cost of each strategy left, shape (K_i,).
        pairs: edge (i, j) with i < j -> cost matrix, shape (K_i, K_j).
        neighbours: node -> its neighbours, as the keys of a dict: a set in the order of entry.
        constant: cost of what is decided, and of the cheapest of what is not: a lower bound.
        whole: all costs and usages are integers.
        limit: the most memory at any program point; None where it does not matter.
        memory: what nodes hold at program points.
        arrays: the arrays of this network and of its copies.
    """

    def __init__(self, problem: CostNetwork) -> None:
        self.whole = all(a.dtype.kind == "i" for a in (*problem.costs, *problem.edge_costs, *problem.usages))
        self.arrays = HashConsing()
        self.constant = 0.0
        self._range = 0  # of all costs together
        known: dict[tuple[object, ...], tuple[Array, float, float]] = {}
        self.costs: dict[int, Array] = {n: self._read(c, known) for n, c in enumerate(problem.costs)}
        self.pairs: dict[tuple[int, int], Array] = {}
        self.neighbours: dict[int, dict[int, None]] = {n: {} for n in self.costs}
        self.limit = problem.limit
        self._gone: list[tuple[int, _Decide]] = []  # nodes that are gone or renumbered, in order
        for (i, j), matrix in zip(problem.edges, problem.edge_costs, strict=True):
            self._add_pair(i, j, self._read(matrix, known))
        self.memory = LiveMemory.none() if problem.limit is None else LiveMemory.of(problem.usages, problem.intervals)

    def _read(self, costs: Array, known: dict[tuple[object, ...], tuple[Array, float, float]]) -> Array:
        """Costs as floats above the least of them, which is subtracted while they are integers; equal ones once."""
        key = costs.shape, costs.dtype.str, costs.tobytes()
        if key not in known:
            allowed = costs[costs < FORBIDDEN]
            least, most = (allowed.min().item(), allowed.max().item()) if allowed.size else (0, 0)
            above = np.where(costs >= FORBIDDEN, np.inf, (costs - least).astype(np.float64))
            known[key] = self.arrays.unique(above), least, most - least
        above, least, spread = known[key]
        self.constant += least
        if self.whole:
            self._range += spread
        return above

    # Queries

    @property
    def is_exact(self) -> bool:
        """Whether no sum of these integers is rounded; costs that are no integers are always rounded a little."""
        return not self.whole or self._range < 2**53

    @property
    def num_strategies(self) -> int:
        """Strategies left, of all nodes."""
        return sum(map(len, self.costs.values()))

    @property
    def num_pairs(self) -> int:
        """Entries of the cost matrices of all edges left."""
        return sum(matrix.size for matrix in self.pairs.values())

    def matrix(self, i: int, j: int) -> Array:
        """Pair costs with the strategies of ``i`` as rows."""
        return self.pairs[i, j] if i < j else self.arrays.transposed(self.pairs[j, i])

    def cost(self, choice: dict[int, int]) -> float:
        """Cost of a choice for the nodes left, what is decided included."""
        total = self.constant + sum(float(costs[choice[n]]) for n, costs in self.costs.items())
        return total + sum(float(matrix[choice[i], choice[j]]) for (i, j), matrix in self.pairs.items())

    def fits(self, choice: Mapping[int, int]) -> bool:
        """Whether a choice for the nodes left keeps the memory limit."""
        return self.limit is None or self.profile_fits(self.memory.profile(choice))

    def profile_fits(self, profile: Array) -> bool:
        """Whether memory at each program point is within the limit."""
        return self.limit is None or not (profile > self.limit).any()

    def expand(self, choice: Mapping[int, int]) -> dict[int, int]:
        """The choice for the nodes that were there at first, from one for those that are left."""
        full = dict(choice)
        for node, decide in reversed(self._gone):
            full[node] = decide(full)
        return full

    # Copies

    def restricted(self, keep: Mapping[int, Array]) -> ReducedNetwork:
        """A copy with some strategies only, by node. Its `expand` leads back to this network."""
        copy = self._copy()
        copy._gone = []
        for node, strategies in keep.items():
            if len(strategies) < len(copy.costs[node]):
                copy.restrict(node, strategies)
        return copy

    def unlimited(self) -> ReducedNetwork:
        """A copy without the memory limit. Its `expand` leads to the nodes that were there at first."""
        copy = self._copy()
        copy.limit, copy.memory = None, LiveMemory.none()
        return copy

    def tied(self, class_of: Mapping[int, int]) -> ReducedNetwork:
        """A copy in which all nodes of a class, which have as many strategies, take the same one. Its `expand` leads back
        to this network."""
        copy = self._copy()
        copy._gone = []
        first: dict[int, int] = {}
        for node, number in class_of.items():
            kept = first.setdefault(number, node)
            if kept != node:
                copy.merge(kept, node, copy.arrays.unique(np.arange(len(copy.costs[node]))))
        return copy

    def _copy(self) -> ReducedNetwork:
        copy = ReducedNetwork.__new__(ReducedNetwork)
        copy.__dict__.update(self.__dict__)
        copy.costs, copy.pairs, copy._gone = dict(self.costs), dict(self.pairs), list(self._gone)
        copy.neighbours = {node: dict(near) for node, near in self.neighbours.items()}
        copy.memory = self.memory.copy()
        return copy

    # Steps of reductions. Each leaves the optimum as it is, if its caller knows that nothing better is lost.

    def restrict(self, node: int, keep: Array) -> None:
        """Only the strategies ``keep`` of a node are left."""
        keep = self.arrays.unique(keep)
        self.costs[node] = self.arrays.apply("rows", reduction_kernels.rows, self.costs[node], keep)
        for other in self.neighbours[node]:
            rest = self.arrays.apply("rows", reduction_kernels.rows, self.matrix(node, other), keep)
            if node < other:
                self.pairs[node, other] = rest
            else:
                self.pairs[other, node] = self.arrays.transposed(rest)
        self.memory.restrict(node, keep)
        old = keep.tolist()
        self._gone.append((node, lambda choice: old[choice[node]]))

    def merge(self, i: int, j: int, partner: Array) -> None:
        """Node ``j`` follows node ``i``: strategy k of ``i`` goes with ``partner[k]`` of ``j``."""
        self.add_costs(i, self.arrays.apply("rows", reduction_kernels.rows, self.costs[j], partner))
        if j in self.neighbours[i]:
            self.add_costs(i, self.arrays.apply("along", reduction_kernels.along, self.matrix(i, j), partner))
            self.drop_pair(i, j)
        for other in list(self.neighbours[j]):
            moved = self.arrays.apply("rows", reduction_kernels.rows, self.matrix(j, other), partner)
            self.drop_pair(j, other)
            self._add_pair(i, other, moved)
        self.memory.follow(i, j, partner)
        table = partner.tolist()
        self._remove(j, lambda choice: table[choice[i]])

    def decide(self, node: int) -> None:
        """A node with a single strategy becomes part of its neighbours' costs.

        Raises:
            InfeasiblePlanError: the strategy is forbidden.
        """
        if not np.isfinite(self.costs[node][0]):
            raise no_allowed_strategy(node)
        self.constant += float(self.costs[node][0])
        for other in list(self.neighbours[node]):
            self.add_costs(other, self.arrays.apply("row", reduction_kernels.row, self.matrix(node, other), 0))
            self.drop_pair(node, other)
        self._remove(node, lambda _: 0)

    def eliminate(self, node: int, near: list[int]) -> None:
        """A node without memory of its own becomes a cost of its neighbours ``near``, of which there are at most two.

        Raises:
            InfeasiblePlanError: it has no neighbour, and all its strategies are forbidden.
        """
        costs = self.costs[node]
        if not near:
            best = int(costs.argmin())
            if not np.isfinite(costs[best]):
                raise no_allowed_strategy(node)
            self.constant += float(costs[best])
            self._remove(node, lambda _: best)
            return
        if len(near) == 1:
            least, table = self.arrays.cached("leaf", self._leaf, costs, self.matrix(node, near[0]))
            self.add_costs(near[0], least)
            self.drop_pair(node, near[0])
            self._remove(node, lambda choice: int(table[choice[near[0]]]))
            return
        between = [self.matrix(node, other) for other in near]
        made, both = self.arrays.cached("link", self._link, costs, *between)
        self.drop_pair(node, near[0])
        self.drop_pair(node, near[1])
        self._add_pair(near[0], near[1], made)
        self._remove(node, lambda choice: int(both[choice[near[0]], choice[near[1]]]))

    def _leaf(self, costs: Array, matrix: Array) -> tuple[Array, Array]:
        """What a node with one neighbour costs this at least, and with which of its strategies."""
        total = matrix + costs[:, None]
        return self.arrays.unique(total.min(0)), total.argmin(0)

    def _link(self, costs: Array, first: Array, second: Array) -> tuple[Array, Array]:
        """The same for each pair of strategies of two neighbours."""
        total = (first + costs[:, None])[:, :, None] + second[:, None, :]
        return self.arrays.unique(total.min(0)), total.argmin(0)

    def add_costs(self, node: int, costs: Array) -> None:
        """Add to the costs of a node's strategies."""
        self.costs[node] = self.arrays.apply("add", np.add, self.costs[node], costs)

    def drop_pair(self, i: int, j: int) -> None:
        """An edge costs nothing any more."""
        del self.pairs[min(i, j), max(i, j)]
        del self.neighbours[i][j], self.neighbours[j][i]

    def _add_pair(self, i: int, j: int, matrix: Array) -> None:
        if i > j:
            i, j, matrix = j, i, self.arrays.transposed(matrix)
        known = self.pairs.get((i, j))
        self.pairs[i, j] = matrix if known is None else self.arrays.apply("add", np.add, known, matrix)
        self.neighbours[i][j] = self.neighbours[j][i] = None

    def _remove(self, node: int, decide: _Decide) -> None:
        del self.costs[node], self.neighbours[node]
        self._gone.append((node, decide))


def no_allowed_strategy(node: int) -> InfeasiblePlanError:
    """The error where a node has no strategy left."""
    return InfeasiblePlanError(
        "no combination of strategies is allowed",
        why=f"every strategy of node {node} is forbidden, by itself or beside those of the nodes around it",
        fix="allow more pairs: costs from 10^18 on, and infinite ones, forbid",
    )


def nothing_combines() -> InfeasiblePlanError:
    """The error where each strategy has an allowed partner everywhere, and still no choice is allowed."""
    return InfeasiblePlanError(
        "no combination of strategies is allowed",
        why="the forbidden costs exclude each other",
        fix="allow more pairs: costs from 10^18 on, and infinite ones, forbid",
    )
