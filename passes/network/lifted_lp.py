"""Lifted linear program: repeated layers as one, in a small program whose lower bound holds for the whole network.

Nodes that look alike up to some distance (``colour_refinement.py``) are a class, with one variable per strategy: the part of
the class that takes it. The sums of the local polytope's equations over a class, one for each way in which its members are
joined to others, are equations between these variables. So whatever solves the whole network's relaxation solves this one,
and its optimum is a lower bound. Where every class takes one strategy, the solution is a choice for the network, and the best
one. (Lifted linear programs: Mladenov, Ahmadi and Kersting, AISTATS 2012, with exact symmetries; here classes may be coarser,
which makes the bound weaker and never wrong.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.colour_refinement import ColourClasses, usages_at
from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.linear_programs import EqualRows, LinearProgram, ProgramResult, concatenated, resolution_of
from bactrian.passes.network.milp import IntegerProgram, is_gap_closed
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import reduce_network

_RADII = (2, 4, 8)
_WORTH = 0.7  # of the nodes: with more classes, nothing is gained
_TAKEN = 1e-7  # parts below are none
_NOTHING = 1e-8  # of the bound
_ROUNDING = 1e-15  # of all that is added
_MOST_HOPS = 3
_SMALL_PAIRS = 20_000  # of a network that is solved without classes
_SEARCH_SHARE = 0.2  # of the time that is left, at most, for one search for a choice


@dataclass(frozen=True)
class LiftedResult:
    """What was found.

    Attributes:
        choice: the incumbent by node of the problem, if there is one.
        cost: of it; infinite without one.
        lower_bound: no feasible choice costs less.
        optimal: whether the incumbent is proved optimal.
        num_classes: of the finest relaxation.
    """

    choice: dict[int, int] | None
    cost: float
    lower_bound: float
    optimal: bool
    num_classes: int = 0


def solve_lifted(
    network: ReducedNetwork, deadline: float, times: Sequence[int] = (), tolerance: float = 0.0
) -> LiftedResult | None:
    """A choice and a lower bound from classes of nodes that look alike; None where few do.

    A relaxation over classes gives the lower bound, and the reduced cost of every strategy and pair. A choice is searched
    with those classes fixed that take one strategy in the relaxation, and the others free to take whatever has no reduced
    cost; then with the classes around these free as well, and so on. What would cost more than the incumbent is dropped from
    the network (reduced-cost fixing), and what is left is looked at with finer classes.

    Args:
        network: reduced. Loses strategies that no better choice than the incumbent contains.
        deadline: of `time.monotonic`.
        times: program points at which memory is likely to bind.
        tolerance: the part of its cost by which the incumbent may be above the lower bound.
    """
    points = [network.memory.point_at(time) for time in times] if network.memory.times else []
    best, best_cost, bound, classes = None, np.inf, network.constant, 0
    for number, radius in enumerate(_RADII):
        while True:
            program = _LiftedProgram(network, ColourClasses.of(network, radius, points))
            if program.num_classes > _WORTH * len(network.costs):
                return None if number == 0 else LiftedResult(best, best_cost, bound, False, classes)
            classes = program.num_classes
            result = program.run(deadline)
            if result.values is None or result.duals is None:
                return None if number == 0 else LiftedResult(best, best_cost, bound, False, classes)
            over = _most_violated(network, program.profile(result.values), points)
            if not over:
                break
            points += over
        reduced = program.reduced_costs(result.duals)
        bound = max(bound, reduced.lower_bound)
        for hops in range(_MOST_HOPS):
            keep = program.candidates(result.values, reduced, hops)
            until = time.monotonic() + _SEARCH_SHARE * (deadline - time.monotonic())
            choice = _solve_restricted(network, keep, until, bound / (1 - tolerance) if tolerance else -np.inf)
            if choice is not None and not network.fits(choice):
                choice = None
            if choice is not None and (cost := network.cost(choice)) < best_cost:
                best, best_cost = network.expand(choice), cost
            if is_gap_closed(network, best_cost, bound):
                return LiftedResult(best, best_cost, bound, True, classes)
            if best_cost * (1 - tolerance) <= bound:
                return LiftedResult(best, best_cost, bound, False, classes)
        if best is not None:
            program.fix(reduced, best_cost * (1 - tolerance) - reduced.lower_bound)
            times = [network.memory.times[point] for point in points]
            try:
                reduce_network(network, deadline)
                points = sorted({network.memory.point_at(time) for time in times})
            except InfeasiblePlanError:  # nothing is better
                return _exhausted(best, best_cost, tolerance, classes)
            if not network.costs:
                last = network.expand({})
                if network.constant < best_cost:
                    best, best_cost = last, network.constant
                return _exhausted(best, best_cost, tolerance, classes)
    return LiftedResult(best, best_cost, bound, False, classes)


def _exhausted(best: dict[int, int], cost: float, tolerance: float, num_classes: int) -> LiftedResult:
    """Nothing is left that is cheaper by more than the tolerance."""
    return LiftedResult(best, cost, cost * (1 - tolerance), not tolerance, num_classes)


def _solve_restricted(
    network: ReducedNetwork, keep: dict[int, Array], deadline: float, target: float
) -> dict[int, int] | None:
    """A feasible choice, mostly the best one, among some strategies of each node, if one is found; what costs no more than a
    target is good enough."""
    try:
        small = network.restricted(keep)
        reduce_network(small, deadline)
        if not small.costs:
            return small.expand({})
        if small.num_pairs > _SMALL_PAIRS:
            found = solve_lifted(small, deadline)
            if found is not None and found.choice is not None:
                return found.choice
        result = IntegerProgram(small).solve(deadline, target)
    except InfeasiblePlanError:
        return None
    return None if result.choice is None else small.expand(result.choice)


def _most_violated(network: ReducedNetwork, profile: Array, known: Sequence[int]) -> list[int]:
    """The program points that are most over the limit, some way apart: as many as there are already, or one.

    Each point takes classes apart, and mostly one decides.
    """
    if network.limit is None:
        return []
    over = np.flatnonzero(profile > network.limit * (1 + 1e-9))
    chosen: list[int] = []
    for point in over[np.argsort(-profile[over], kind="stable")].tolist():
        if point not in known and all(abs(point - other) > len(profile) // 50 for other in chosen):
            chosen.append(point)
        if len(chosen) == max(1, len(known)):
            break
    return chosen


# Class of a node, number of the matrix from its side, and what the neighbour was one refinement earlier: all members of the
# class have equally many edges of one role.
_Role = tuple[int, int, int]


@dataclass
class _EdgeClass:
    """The edges that join two classes of nodes in the same roles; the matrix has the first one's strategies as rows."""

    roles: tuple[_Role, _Role]
    matrix: Array
    count: int = 0


@dataclass(frozen=True)
class _ReducedCosts:
    """What a choice costs at least.

    Attributes:
        lower_bound: on all choices.
        nodes: of each class, what a choice with a strategy costs above it at least.
        edges: of each class of edges, the same of each pair.
    """

    lower_bound: float
    nodes: list[Array]
    edges: list[Array]


class _LiftedProgram:
    """The relaxation over classes."""

    def __init__(self, network: ReducedNetwork, classes: ColourClasses) -> None:
        self._network, self._classes = network, classes
        self._reps = classes.first
        sizes = [len(network.costs[node]) for node in self._reps]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._start, self._num_binary = starts[:-1].tolist(), int(starts[-1])
        self._build()

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self._reps)

    def run(self, deadline: float) -> ProgramResult:
        """Solve it."""
        return self._program.solve(deadline, integer=False, duals=True)

    def candidates(self, values: Array, reduced: _ReducedCosts, hops: int) -> dict[int, Array]:
        """For each node, strategies that a best choice may take: where its class takes one in the relaxation, that one;
        elsewhere, and so many edges around, all that have no reduced cost."""
        taken = [
            np.flatnonzero(values[start : start + len(self._network.costs[node])] > _TAKEN)
            for start, node in zip(self._start, self._reps, strict=True)
        ]
        free = {number for number, strategies in enumerate(taken) if len(strategies) > 1}
        for _ in range(hops):
            ends = [{role[0] for role in edge_class.roles} for edge_class in self._edges]
            free = free.union(*(pair for pair in ends if not free.isdisjoint(pair)))
        most = _NOTHING * max(abs(reduced.lower_bound), abs(reduced.lower_bound - self._network.constant))
        kept = [
            np.union1d(strategies, np.flatnonzero(above <= most)) if number in free else strategies
            for number, (strategies, above) in enumerate(zip(taken, reduced.nodes, strict=True))
        ]
        return {node: kept[number] for node, number in self._classes.of_node.items()}

    def reduced_costs(self, duals: Array) -> _ReducedCosts:
        """Reduced costs, and a lower bound, from any multipliers of the rows.

        Multipliers of equations move costs between an edge and its ends, equally for all members of a class, so that the
        least costs of all nodes and edges add up to a lower bound, whether or not the multipliers are optimal.
        """
        network, sizes = self._network, self._classes.sizes
        nodes = [network.costs[node].copy() for node in self._reps]
        for role, own in self._twins.items():
            first = self._base[role]
            nodes[role[0]] += duals[first : first + len(own.first)][own.number] / sizes[role[0]]
        bound = network.constant
        for number, (point, row, unit) in enumerate(self._memory):
            assert network.limit is not None
            multiplier = max(0.0, -float(duals[row])) / unit
            bound -= multiplier * (network.limit - float(network.memory.fixed[point]))
            for node, costs in zip(self._reps, nodes, strict=True):
                costs += multiplier * usages_at(network, node, self._classes.points)[number]
        edges = list[Array]()
        for edge_class in self._edges:
            matrix = edge_class.matrix
            for role, axis in zip(edge_class.roles, (1, 0), strict=True):
                own, first = self._twins[role], self._base[role]
                multipliers = duals[first : first + len(own.first)][own.number] / self._edges_of[role]
                matrix = matrix - np.expand_dims(multipliers, axis)
            edges.append(matrix)
        bound += sum(size * float(costs.min()) for size, costs in zip(sizes, nodes, strict=True))
        bound += sum(
            edge_class.count * float(matrix.min()) for edge_class, matrix in zip(self._edges, edges, strict=True)
        )
        largest = sum(size * float(np.abs(costs).max()) for size, costs in zip(sizes, nodes, strict=True))
        bound -= _ROUNDING * (largest + abs(bound))
        return _ReducedCosts(
            bound, [costs - costs.min() for costs in nodes], [matrix - matrix.min() for matrix in edges]
        )

    def fix(self, reduced: _ReducedCosts, gap: float) -> None:
        """Forbid what costs more than the gap above the lower bound: no better choice contains it."""
        network = self._network
        most = gap * (1 + 1e-9) + _ROUNDING * abs(reduced.lower_bound)
        nodes = [
            network.arrays.unique(np.where(above > most, np.inf, network.costs[node]))
            for node, above in zip(self._reps, reduced.nodes, strict=True)
        ]
        edge_classes = {
            edge_class.roles: network.arrays.unique(np.where(above > most, np.inf, edge_class.matrix))
            for edge_class, above in zip(self._edges, reduced.edges, strict=True)
        }
        for node, number in self._classes.of_node.items():
            network.costs[node] = nodes[number]
        for (i, j), matrix in list(network.pairs.items()):
            key, turned = self._key_of(i, j, matrix)
            network.pairs[i, j] = network.arrays.transposed(edge_classes[key]) if turned else edge_classes[key]

    def profile(self, values: Array) -> Array:
        """Memory at each program point, with each member taking its class's parts."""
        network = self._network
        total = network.memory.fixed
        for node, number in self._classes.of_node.items():
            start = self._start[number]
            for begin, end, usage in network.memory.spans(node):
                total[begin:end] += values[start : start + len(usage)] @ usage
        return total

    def _key_of(self, i: int, j: int, matrix: Array) -> tuple[tuple[_Role, _Role], bool]:
        """The roles of an edge, the same for all edges of a kind, and whether its ends are the other way round."""
        now, before, arrays = self._classes.of_node, self._classes.before, self._network.arrays
        first = now[i], arrays.number(matrix), before[j]
        second = now[j], arrays.number(arrays.transposed(matrix)), before[i]
        return ((second, first), True) if first > second else ((first, second), False)

    def _edge_classes(self) -> list[_EdgeClass]:
        found: dict[tuple[_Role, _Role], _EdgeClass] = {}
        for (i, j), matrix in self._network.pairs.items():
            key, turned = self._key_of(i, j, matrix)
            edge_class = found.get(key)
            if edge_class is None:
                edge_class = found[key] = _EdgeClass(key, self._network.arrays.transposed(matrix) if turned else matrix)
            edge_class.count += 1
        return list(found.values())

    def _build(self) -> None:
        network, sizes = self._network, self._classes.sizes
        edge_classes = self._edges = self._edge_classes()
        finest = resolution_of([edge_class.matrix for edge_class in edge_classes], network.whole)
        costs = [network.costs[node] * size for node, size in zip(self._reps, sizes, strict=True)]
        rows, columns, values, low = list[Array](), list[Array](), list[Array](), list[float]()

        def equation(parts: Sequence[tuple[Array, Array]], right: float) -> None:
            for where, factors in parts:
                rows.append(np.full(len(where), len(low)))
                columns.append(where)
                values.append(factors)
            low.append(right)

        for start, node in zip(self._start, self._reps, strict=True):
            count = len(network.costs[node])
            equation([(start + np.arange(count), np.ones(count))], 1.0)
        at = self._num_binary
        edges_of: Counter[_Role] = Counter()
        variables = list[tuple[Array, Array, Array]]()
        twins = dict[_Role, EqualRows]()
        for edge_class in edge_classes:
            for role, matrix in zip(edge_class.roles, (edge_class.matrix, edge_class.matrix.T), strict=True):
                edges_of[role] += edge_class.count
                if role not in twins:
                    twins[role] = EqualRows.of(matrix, finest)
            small = edge_class.matrix[np.ix_(twins[edge_class.roles[0]].first, twins[edge_class.roles[1]].first)]
            first, second = np.nonzero(np.isfinite(small))
            pairs = at + np.arange(len(first))
            at += len(first)
            variables.append((pairs, first, second))
            costs.append(small[first, second] * edge_class.count)
        base = dict[_Role, int]()
        self._base, self._twins, self._edges_of = base, twins, edges_of
        for role, own in twins.items():
            base[role] = len(low)
            start = self._start[role[0]]
            rows.append(len(low) + own.number)
            columns.append(start + np.arange(len(own.number)))
            values.append(-np.ones(len(own.number)))
            low += [0.0] * len(own.first)
        parts: Counter[_Role] = Counter(role for edge_class in edge_classes for role in set(edge_class.roles))
        for edge_class, (pairs, first, second) in zip(edge_classes, variables, strict=True):
            for role, which in zip(edge_class.roles, (first, second), strict=True):
                rows.append(base[role] + which)
                columns.append(pairs)
                values.append(np.full(len(pairs), edge_class.count / edges_of[role]))
            if all(parts[role] > 1 for role in edge_class.roles):
                equation([(pairs, np.ones(len(pairs)))], 1.0)
        high = list(low)
        self._memory = list[tuple[int, int, float]]()  # point, row, unit
        if self._classes.points:
            self._add_memory(rows, columns, values, low, high)
        triples = concatenated(values, float), concatenated(rows, int), concatenated(columns, int)
        self._program = LinearProgram(
            concatenated(costs, float), triples, np.array(low), np.array(high), self._num_binary
        )

    def _add_memory(
        self,
        rows: list[Array],
        columns: list[Array],
        values: list[Array],
        low: list[float],
        high: list[float],
    ) -> None:
        network, points = self._network, self._classes.points
        assert network.limit is not None
        fixed = network.memory.fixed
        used = [usages_at(network, node, points) for node in self._reps]
        for number, point in enumerate(points):
            held = [
                (start, usages[number] * size)
                for start, usages, size in zip(self._start, used, self._classes.sizes, strict=True)
                if usages[number].any()
            ]
            unit = max((float(np.abs(usage).max()) for _, usage in held), default=0.0) or 1.0
            self._memory.append((point, len(low), unit))
            for start, usage in held:
                rows.append(np.full(len(usage), len(low)))
                columns.append(start + np.arange(len(usage)))
                values.append(usage / unit)
            low.append(-np.inf)
            high.append((network.limit - float(fixed[point])) / unit)
