"""Exact reductions of a cost network: a smaller one with the same optimum, and the way back.

Each reduction is a known one: arc consistency; contraction of edges that force a bijection; Goldstein's dead-end
elimination (1994), here with memory; min-plus elimination of nodes with at most two neighbours (bucket elimination).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network import reduction_kernels
from bactrian.passes.network.hash_consing import Array, Interner
from bactrian.passes.network.live_memory import Memory
from bactrian.passes.network.problem import FORBIDDEN, CostNetwork

_Undo = Callable[[dict[int, int]], None]

_MOST_PAIRS = 4096  # entries of an edge that an elimination may make
_ROUNDS_OF_TIMES = 2  # of all reductions, in which times are left out; later ones leave out few
_MOST_DOMINANCE = 300  # strategies of a node for which dominance is looked at: the test is cubic

_Key = TypeVar("_Key", int, tuple[int, int])  # a node or an edge


class ReducedNetwork:
    """A network that shrinks in place. Costs are floats; forbidden ones infinite. Equal arrays are one object.

    Attributes:
        costs: node -> cost of each strategy left.
        pairs: (i, j) with i < j -> cost matrix.
        constant: cost of what is decided, and of the cheapest of what is not: a lower bound.
        whole: all costs and usages are integers.
        limit: the most memory at any time; None where it does not matter.
        memory: what is held over time.
    """

    def __init__(self, problem: CostNetwork) -> None:
        self.whole = all(a.dtype.kind == "i" for a in (*problem.costs, *problem.edge_costs, *problem.usages))
        self.arrays = Interner()
        self.constant = 0.0
        self._range = 0  # of all costs together
        known: dict[tuple[object, ...], tuple[Array, float, float]] = {}
        self.costs: dict[int, Array] = {n: self._read(c, known) for n, c in enumerate(problem.costs)}
        self.pairs: dict[tuple[int, int], Array] = {}
        self.neighbours: dict[int, dict[int, None]] = {n: {} for n in self.costs}  # sets, in the order of entry
        self.limit = problem.limit
        self._undo: list[_Undo] = []
        for (i, j), matrix in zip(problem.edges, problem.edge_costs, strict=True):
            self._add_pair(i, j, self._read(matrix, known))
        self.memory = Memory.none() if problem.limit is None else Memory.of(problem.usages, problem.intervals)

    # What it is

    @property
    def is_exact(self) -> bool:
        """Whether no sum of these integers is rounded; costs that are no integers are always rounded a little."""
        return not self.whole or self._range < 2**53

    @property
    def num_strategies(self) -> int:
        """Strategies left, of nodes that have a choice."""
        return sum(map(len, self.costs.values()))

    @property
    def num_pairs(self) -> int:
        """Entries of all edges left."""
        return sum(matrix.size for matrix in self.pairs.values())

    def matrix(self, i: int, j: int) -> Array:
        """Pair costs with the strategies of ``i`` as rows."""
        return self.pairs[i, j] if i < j else self.arrays.turned(self.pairs[j, i])

    def cost(self, choice: dict[int, int]) -> float:
        """Cost of a choice for the nodes left, what is decided included."""
        total = self.constant + sum(float(costs[choice[n]]) for n, costs in self.costs.items())
        return total + sum(float(matrix[choice[i], choice[j]]) for (i, j), matrix in self.pairs.items())

    def expand(self, choice: Mapping[int, int]) -> dict[int, int]:
        """The choice for the nodes that were there at first."""
        whole = dict(choice)
        for undo in reversed(self._undo):
            undo(whole)
        return whole

    def restricted(self, keep: Mapping[int, Array]) -> ReducedNetwork:
        """A copy with some strategies only, by node. Its `expand` leads back to this network."""
        copy = self._copy()
        copy._undo = []
        for node, strategies in keep.items():
            if len(strategies) < len(copy.costs[node]):
                copy._restrict(node, strategies)
        return copy

    def unlimited(self) -> ReducedNetwork:
        """A copy without the memory limit. Its `expand` leads to the nodes that were there at first."""
        copy = self._copy()
        copy.limit, copy.memory = None, Memory.none()
        return copy

    def tied(self, class_of: Mapping[int, int]) -> ReducedNetwork:
        """A copy in which all nodes of a class, which have as many strategies, take the same one. Its `expand` leads back
        to this network."""
        copy = self._copy()
        copy._undo = []
        first: dict[int, int] = {}
        for node, number in class_of.items():
            kept = first.setdefault(number, node)
            if kept != node:
                copy._merge(kept, node, copy.arrays.array(np.arange(len(copy.costs[node]))))
        return copy

    def _copy(self) -> ReducedNetwork:
        copy = ReducedNetwork.__new__(ReducedNetwork)
        copy.__dict__.update(self.__dict__)
        copy.costs, copy.pairs, copy._undo = dict(self.costs), dict(self.pairs), list(self._undo)
        copy.neighbours = {node: dict(near) for node, near in self.neighbours.items()}
        copy.memory = self.memory.copy()
        return copy

    # Reductions

    def reduce(self, deadline: float = float("inf")) -> None:
        """All of them, until nothing changes or the deadline (`time.monotonic`): what is left is equal at any time.

        Raises:
            InfeasiblePlanError: no choice is allowed.
        """
        self.contract()  # mostly leaves little to look at
        self.forbid()
        self.contract()
        for number in itertools.count():
            before = len(self.costs), self.num_strategies, len(self.pairs)
            self.forbid()
            if number < _ROUNDS_OF_TIMES:
                self.leave_out_times()
            self.forbid_by_memory()
            self.separate()
            self.eliminate()
            self.forbid()
            self.dominate(deadline)
            self.normalise()
            if before == (len(self.costs), self.num_strategies, len(self.pairs)) or time.monotonic() > deadline:
                return

    def normalise(self) -> None:
        """Take the least cost of every node and edge to the constant: what is left is what a choice can save."""
        self._take_least(self.costs)
        self._take_least(self.pairs)

    def _take_least(self, table: dict[_Key, Array]) -> None:
        for key, values in table.items():
            least = self.arrays.known("least", reduction_kernels.least, values)
            self.constant += least
            if least:
                table[key] = self.arrays.made("above least", reduction_kernels.above_least, values)

    def leave_out_times(self) -> None:
        """Look at memory only when it can bind; if it never can, there is no limit any more."""
        if self.limit is None:
            return
        self.memory.leave_out(self.limit)
        if not self.memory.times:
            self.limit = None

    def forbid_by_memory(self) -> None:
        """Drop strategies that don't fit even if everything else takes its least.

        Raises:
            InfeasiblePlanError: not even the leanest strategies fit; the message says how much is missing.
        """
        if self.limit is None:
            return
        slack = self.limit - self.memory.least
        if slack.min() < 0:
            raise InfeasiblePlanError(
                f"no choice fits into a memory of {self.limit:,}",
                why=f"at the worst time even the leanest strategies need {-slack.min():,.0f} more",
                fix="raise the limit, or allow strategies that use less memory",
            )
        for node in list(self.memory.nodes):
            keep = self.memory.fitting(node, slack)
            if not keep.any():
                raise InfeasiblePlanError(
                    f"no choice fits into a memory of {self.limit:,}",
                    why=f"each strategy of node {node} is too much at some time, whatever the other nodes choose",
                    fix="raise the limit, or allow strategies that use less memory",
                )
            if not keep.all():
                self._restrict(node, np.flatnonzero(keep))

    def forbid(self) -> None:
        """Drop strategies without a finite partner on some edge (arc consistency)."""
        todo = reduction_kernels.Queue(self.costs)
        while todo:
            node = todo.take()
            keep = self.arrays.known("possible", reduction_kernels.possible, self.costs[node], *self._around(node))
            if keep is not None:
                if not len(keep):
                    raise _nothing_allowed(node)
                self._restrict(node, keep)
                todo.add(self.neighbours[node])

    def contract(self) -> None:
        """Merge the ends of edges on which each strategy goes with exactly one of the other end."""
        todo = reduction_kernels.Queue(self.pairs)
        while todo:
            i, j = todo.take()
            if (i, j) not in self.pairs:
                continue
            if len(self.neighbours[i]) < len(self.neighbours[j]):
                i, j = j, i  # the one with fewer neighbours goes
            partner = self.arrays.known("partners", reduction_kernels.partners, self.matrix(i, j))
            if partner is not None:
                near = [other for other in self.neighbours[j] if other != i]
                self._merge(i, j, self.arrays.array(partner))
                todo.add((min(i, other), max(i, other)) for other in near)

    def separate(self) -> None:
        """Give edges that are sums of a row and a column to their ends."""
        for i, j in list(self.pairs):
            parts = self.arrays.known("separated", reduction_kernels.separated, self.pairs[i, j], int(self.whole))
            if parts is not None:
                for node, part in zip((i, j), parts, strict=True):
                    self._raise(node, self.arrays.array(part))
                self._drop_pair(i, j)

    def eliminate(self) -> None:
        """Decide nodes that hold no memory of their own and have at most two neighbours, as functions of these."""
        todo = reduction_kernels.Queue(self.costs)
        while todo:
            node = todo.take()
            if node not in self.costs:
                continue
            if len(self.costs[node]) == 1:
                near = list(self.neighbours[node])
                self._decide(node)
                todo.add(near)
                continue
            near = sorted(self.neighbours[node])
            if node in self.memory.nodes or len(near) > 2:
                continue
            if len(near) == 2:
                made = len(self.costs[near[0]]) * len(self.costs[near[1]])
                paid = self.matrix(node, near[0]).size + self.matrix(node, near[1]).size
                if made > max(paid, 64) and (made > _MOST_PAIRS or tuple(near) not in self.pairs):
                    continue
            self._eliminate(node, near)
            todo.add(near)

    def dominate(self, deadline: float = float("inf")) -> None:
        """Drop strategies that another one of the same node can always replace, at no more cost and memory."""
        todo = reduction_kernels.Queue(self.costs)
        while todo and time.monotonic() < deadline:
            node = todo.take()
            keep = self._undominated(node)
            if keep is not None:
                self._restrict(node, keep)
                todo.add(self.neighbours[node])

    def _undominated(self, node: int) -> Array | None:
        costs = self.costs[node]
        if not 1 < len(costs) <= _MOST_DOMINANCE:
            return None
        usages = [self.arrays.array(usage) for usage in self.memory.usages(node)]
        return self.arrays.known(
            "undominated", reduction_kernels.undominated, len(usages), costs, *usages, *self._around(node)
        )

    def _around(self, node: int) -> list[Array]:
        """The matrices to a node's neighbours, in an order that is equal where they are."""
        found = [self.matrix(node, other) for other in self.neighbours[node]]
        return sorted(found, key=self.arrays.number) if len(found) > 1 else found

    # Steps

    def _add_pair(self, i: int, j: int, matrix: Array) -> None:
        if i > j:
            i, j, matrix = j, i, self.arrays.turned(matrix)
        known = self.pairs.get((i, j))
        self.pairs[i, j] = matrix if known is None else self.arrays.made("add", np.add, known, matrix)
        self.neighbours[i][j] = self.neighbours[j][i] = None

    def _raise(self, node: int, costs: Array) -> None:
        """Add to a node's costs."""
        self.costs[node] = self.arrays.made("add", np.add, self.costs[node], costs)

    def _drop_pair(self, i: int, j: int) -> None:
        del self.pairs[min(i, j), max(i, j)]
        del self.neighbours[i][j], self.neighbours[j][i]

    def _restrict(self, node: int, keep: Array) -> None:
        """Only the strategies ``keep`` of a node are left."""
        keep = self.arrays.array(keep)
        self.costs[node] = self.arrays.made("rows", reduction_kernels.rows, self.costs[node], keep)
        for other in self.neighbours[node]:
            rest = self.arrays.made("rows", reduction_kernels.rows, self.matrix(node, other), keep)
            if node < other:
                self.pairs[node, other] = rest
            else:
                self.pairs[other, node] = self.arrays.turned(rest)
        self.memory.restrict(node, keep)
        old = keep.tolist()

        def undo(choice: dict[int, int]) -> None:
            choice[node] = old[choice[node]]

        self._undo.append(undo)

    def _read(self, costs: Array, known: dict[tuple[object, ...], tuple[Array, float, float]]) -> Array:
        """Costs as floats above the least of them, which is subtracted while they are integers; equal ones once."""
        key = costs.shape, costs.dtype.str, costs.tobytes()
        if key not in known:
            allowed = costs[costs < FORBIDDEN]
            least, most = (allowed.min().item(), allowed.max().item()) if allowed.size else (0, 0)
            above = np.where(costs >= FORBIDDEN, np.inf, (costs - least).astype(np.float64))
            known[key] = self.arrays.array(above), least, most - least
        above, least, spread = known[key]
        self.constant += least
        if self.whole:
            self._range += spread
        return above

    def _merge(self, i: int, j: int, partner: Array) -> None:
        """Node ``j`` follows node ``i``: strategy k of ``i`` goes with ``partner[k]`` of ``j``."""
        self._raise(i, self.arrays.made("rows", reduction_kernels.rows, self.costs[j], partner))
        if j in self.neighbours[i]:
            self._raise(i, self.arrays.made("along", reduction_kernels.along, self.matrix(i, j), partner))
            self._drop_pair(i, j)
        for other in list(self.neighbours[j]):
            moved = self.arrays.made("rows", reduction_kernels.rows, self.matrix(j, other), partner)
            self._drop_pair(j, other)
            self._add_pair(i, other, moved)
        self.memory.follow(i, j, partner)
        del self.costs[j], self.neighbours[j]
        table = partner.tolist()

        def undo(choice: dict[int, int]) -> None:
            choice[j] = table[choice[i]]

        self._undo.append(undo)

    def _decide(self, node: int) -> None:
        """A node with a single strategy becomes part of its neighbours' costs."""
        if not np.isfinite(self.costs[node][0]):
            raise _nothing_allowed(node)
        self.constant += float(self.costs[node][0])
        for other in list(self.neighbours[node]):
            self._raise(other, self.arrays.made("row", reduction_kernels.row, self.matrix(node, other), 0))
            self._drop_pair(node, other)
        self._forget(node, lambda _: 0)

    def _eliminate(self, node: int, near: list[int]) -> None:
        costs = self.costs[node]
        if not near:
            best = int(costs.argmin())
            if not np.isfinite(costs[best]):
                raise _nothing_allowed(node)
            self.constant += float(costs[best])
            self._forget(node, lambda _: best)
            return
        if len(near) == 1:
            least, table = self.arrays.known("leaf", self._leaf, costs, self.matrix(node, near[0]))
            self._raise(near[0], least)
            self._drop_pair(node, near[0])
            self._forget(node, lambda choice: int(table[choice[near[0]]]))
            return
        between = [self.matrix(node, other) for other in near]
        made, both = self.arrays.known("link", self._link, costs, *between)
        self._drop_pair(node, near[0])
        self._drop_pair(node, near[1])
        self._add_pair(near[0], near[1], made)
        self._forget(node, lambda choice: int(both[choice[near[0]], choice[near[1]]]))

    def _leaf(self, costs: Array, matrix: Array) -> tuple[Array, Array]:
        """What a node with one neighbour costs this at least, and with which of its strategies."""
        total = matrix + costs[:, None]
        return self.arrays.array(total.min(0)), total.argmin(0)

    def _link(self, costs: Array, first: Array, second: Array) -> tuple[Array, Array]:
        """The same for each pair of strategies of two neighbours."""
        total = (first + costs[:, None])[:, :, None] + second[:, None, :]
        return self.arrays.array(total.min(0)), total.argmin(0)

    def _forget(self, node: int, choose: Callable[[dict[int, int]], int]) -> None:
        del self.costs[node], self.neighbours[node]

        def undo(choice: dict[int, int]) -> None:
            choice[node] = choose(choice)

        self._undo.append(undo)


def _nothing_allowed(node: int) -> InfeasiblePlanError:
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
