"""Repeated layers as one: a small program whose bound holds for the whole network.

Nodes that look alike up to some distance (colour refinement of bounded radius) are a class, with one variable per strategy:
the part of the class that takes it. The sums of the local polytope's equations over a class, one for each way in which its
members are joined to others, are equations between these variables; so whatever solves the whole network's relaxation
solves this one, and its optimum is a bound. Where every class takes one strategy, the solution is a choice for the network,
and it is the best one. (Lifted linear programs: Mladenov, Ahmadi and Kersting, AISTATS 2012, with exact symmetries;
here classes may be coarser.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.colour_refinement import Classes, usages_at
from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.linear_programs import LinearProgram, Result, Twins, finest_of, joined
from bactrian.passes.network.milp import IntegerProgram, is_gap_closed
from bactrian.passes.network.reductions import ReducedNetwork

_RADII = (2, 4, 8)
_WORTH = 0.7  # of the nodes: with more classes, nothing is gained
_TAKEN = 1e-7  # parts below are none
_NOTHING = 1e-8  # of the bound
_ROUNDING = 1e-15  # of all that is added
_MOST_HOPS = 3
_SMALL_PAIRS = 20_000  # of a network that is solved without classes
_SEARCH_SHARE = 0.2  # of the time that is left, at most, for one search for a choice
_ROWS_AT_ONCE = 12


@dataclass(frozen=True)
class Lifted:
    """``choice`` by node of the problem, if one was found, and its ``cost``; no allowed choice costs less than ``bound``;
    ``optimal``: proved; ``num_classes``: of the finest relaxation."""

    choice: dict[int, int] | None
    cost: float
    bound: float
    optimal: bool
    num_classes: int = 0


def solve_lifted(network: ReducedNetwork, deadline: float) -> Lifted | None:
    """A choice and a bound from classes of nodes that look alike; None where few do.

    A relaxation over classes gives the bound, and what every strategy and pair costs above it at least (its reduced cost).
    A choice is searched with those classes fixed that take one strategy in the relaxation, and the others free to take
    whatever costs nothing above the bound; then with the classes around these free as well, and so on. What would cost
    more than the best choice is dropped from the network, and what is left is looked at more finely.

    Args:
        network: reduced. Loses strategies that no better choice than the one found contains.
        deadline: of `time.monotonic`.
    """
    places: list[int] = []
    best, best_cost, bound, classes = None, np.inf, network.constant, 0
    for number, radius in enumerate(_RADII):
        while True:
            program = _Program(network, Classes.of(network, radius, places))
            if program.num_classes > _WORTH * len(network.costs):
                return None if number == 0 else Lifted(best, best_cost, bound, False, classes)
            classes = program.num_classes
            result = program.run(deadline)
            if result.values is None or result.duals is None:
                return None if number == 0 else Lifted(best, best_cost, bound, False, classes)
            over = _worst_places(network, program.profile(result.values), places)
            if not over:
                break
            places += over
        excess = program.excess(result.duals)
        bound = max(bound, excess.bound)
        for hops in range(_MOST_HOPS):
            keep = program.likely(result.values, excess, hops)
            choice = _within(network, keep, time.monotonic() + _SEARCH_SHARE * (deadline - time.monotonic()))
            if choice is not None and not _fits(network, choice):
                choice = None
            if choice is not None and (cost := network.cost(choice)) < best_cost:
                best, best_cost = network.expand(choice), cost
            if is_gap_closed(network, best_cost, bound):
                return Lifted(best, best_cost, bound, True, classes)
        if best is not None:
            program.drop(excess, best_cost - excess.bound)
            times = [network.memory.times[place] for place in places]
            try:
                network.reduce(deadline)
                places = sorted({network.memory.place_at(time) for time in times})
            except InfeasiblePlanError:  # nothing is better
                return Lifted(best, best_cost, best_cost, True, classes)
            if not network.costs:
                last = network.expand({})
                if network.constant < best_cost:
                    best, best_cost = last, network.constant
                return Lifted(best, best_cost, best_cost, True, classes)
    return Lifted(best, best_cost, bound, False, classes)


def _fits(network: ReducedNetwork, choice: Mapping[int, int]) -> bool:
    return network.limit is None or not (network.memory.profile(dict(choice)) > network.limit).any()


def _within(network: ReducedNetwork, keep: dict[int, Array], deadline: float) -> dict[int, int] | None:
    """A good allowed choice, mostly the best one, among some strategies of each node, if there is one."""
    try:
        small = network.restricted(keep)
        small.reduce(deadline)
        if not small.costs:
            return small.expand({})
        if small.num_pairs > _SMALL_PAIRS:
            found = solve_lifted(small, deadline)
            if found is not None and found.choice is not None:
                return found.choice
        outcome = IntegerProgram(small).solve(deadline)
    except InfeasiblePlanError:
        return None
    return None if outcome.choice is None else small.expand(outcome.choice)


def _worst_places(network: ReducedNetwork, profile: Array, known: Sequence[int]) -> list[int]:
    """The places that are most over the limit, some way apart."""
    if network.limit is None:
        return []
    over = np.flatnonzero(profile > network.limit * (1 + 1e-9))
    chosen: list[int] = []
    for place in over[np.argsort(-profile[over], kind="stable")].tolist():
        if place not in known and all(abs(place - other) > len(profile) // 50 for other in chosen):
            chosen.append(place)
        if len(chosen) == _ROWS_AT_ONCE:
            break
    return chosen


# Class of a node, number of the matrix from its side, and what the neighbour was one refinement earlier: all members of the
# class have equally many edges of one role.
_Role = tuple[int, int, int]


@dataclass
class _Joint:
    """The edges that join two classes in the same roles; the matrix has the first one's strategies as rows."""

    roles: tuple[_Role, _Role]
    matrix: Array
    count: int = 0


@dataclass(frozen=True)
class _Excess:
    """A bound on all choices, and what each strategy of a class, and each pair of a joint, costs at least above it."""

    bound: float
    nodes: list[Array]
    edges: list[Array]


class _Program:
    """The relaxation over classes."""

    def __init__(self, network: ReducedNetwork, classes: Classes) -> None:
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

    def run(self, deadline: float) -> Result:
        """Solve it."""
        return self._program.solve(deadline, integer=False, duals=True)

    def likely(self, values: Array, excess: _Excess, hops: int) -> dict[int, Array]:
        """For each node, strategies that a best choice may take: where its class takes one in the relaxation, that one;
        elsewhere, and so many edges around, all that cost nothing above the bound."""
        taken = [
            np.flatnonzero(values[start : start + len(self._network.costs[node])] > _TAKEN)
            for start, node in zip(self._start, self._reps, strict=True)
        ]
        free = {number for number, strategies in enumerate(taken) if len(strategies) > 1}
        for _ in range(hops):
            ends = [{role[0] for role in joint.roles} for joint in self._joined]
            free = free.union(*(pair for pair in ends if not free.isdisjoint(pair)))
        most = _NOTHING * max(abs(excess.bound), abs(excess.bound - self._network.constant))
        kept = [
            np.union1d(strategies, np.flatnonzero(above <= most)) if number in free else strategies
            for number, (strategies, above) in enumerate(zip(taken, excess.nodes, strict=True))
        ]
        return {node: kept[number] for node, number in self._classes.of_node.items()}

    def excess(self, duals: Array) -> _Excess:
        """What strategies and pairs cost above a bound, with any prices on the rows.

        Prices of equations move costs between an edge and its ends, equally for all members of a class, so that the sum
        of the least costs of all nodes and edges is a bound, whether or not the prices are the best ones.
        """
        network, sizes = self._network, self._classes.sizes
        nodes = [network.costs[node].copy() for node in self._reps]
        for role, own in self._twins.items():
            first = self._base[role]
            nodes[role[0]] += duals[first : first + len(own.first)][own.number] / sizes[role[0]]
        bound = network.constant
        for number, (place, row, unit) in enumerate(self._memory):
            assert network.limit is not None
            price = max(0.0, -float(duals[row])) / unit
            bound -= price * (network.limit - float(network.memory.fixed[place]))
            for node, costs in zip(self._reps, nodes, strict=True):
                costs += price * usages_at(network, node, self._classes.places)[number]
        edges = list[Array]()
        for joint in self._joined:
            matrix = joint.matrix
            for role, axis in zip(joint.roles, (1, 0), strict=True):
                own, first = self._twins[role], self._base[role]
                prices = duals[first : first + len(own.first)][own.number] / self._edges_of[role]
                matrix = matrix - np.expand_dims(prices, axis)
            edges.append(matrix)
        bound += sum(size * float(costs.min()) for size, costs in zip(sizes, nodes, strict=True))
        bound += sum(joint.count * float(matrix.min()) for joint, matrix in zip(self._joined, edges, strict=True))
        largest = sum(size * float(np.abs(costs).max()) for size, costs in zip(sizes, nodes, strict=True))
        bound -= _ROUNDING * (largest + abs(bound))
        return _Excess(bound, [costs - costs.min() for costs in nodes], [matrix - matrix.min() for matrix in edges])

    def drop(self, excess: _Excess, gap: float) -> None:
        """Forbid what costs more than the gap above the bound: no better choice contains it."""
        network = self._network
        most = gap * (1 + 1e-9) + _ROUNDING * abs(excess.bound)
        nodes = [
            network.arrays.array(np.where(above > most, np.inf, network.costs[node]))
            for node, above in zip(self._reps, excess.nodes, strict=True)
        ]
        joints = {
            joint.roles: network.arrays.array(np.where(above > most, np.inf, joint.matrix))
            for joint, above in zip(self._joined, excess.edges, strict=True)
        }
        for node, number in self._classes.of_node.items():
            network.costs[node] = nodes[number]
        for (i, j), matrix in list(network.pairs.items()):
            key, turned = self._key_of(i, j, matrix)
            network.pairs[i, j] = network.arrays.turned(joints[key]) if turned else joints[key]

    def profile(self, values: Array) -> Array:
        """Memory from each of the network's times on, with each member taking its class's parts."""
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
        second = now[j], arrays.number(arrays.turned(matrix)), before[i]
        return ((second, first), True) if first > second else ((first, second), False)

    def _joints(self) -> list[_Joint]:
        found: dict[tuple[_Role, _Role], _Joint] = {}
        for (i, j), matrix in self._network.pairs.items():
            key, turned = self._key_of(i, j, matrix)
            joint = found.get(key)
            if joint is None:
                joint = found[key] = _Joint(key, self._network.arrays.turned(matrix) if turned else matrix)
            joint.count += 1
        return list(found.values())

    def _build(self) -> None:
        network, sizes = self._network, self._classes.sizes
        joints = self._joined = self._joints()
        finest = finest_of([joint.matrix for joint in joints], network.whole)
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
        twins = dict[_Role, Twins]()
        for joint in joints:
            for role, matrix in zip(joint.roles, (joint.matrix, joint.matrix.T), strict=True):
                edges_of[role] += joint.count
                if role not in twins:
                    twins[role] = Twins.of(matrix, finest)
            small = joint.matrix[np.ix_(twins[joint.roles[0]].first, twins[joint.roles[1]].first)]
            first, second = np.nonzero(np.isfinite(small))
            pairs = at + np.arange(len(first))
            at += len(first)
            variables.append((pairs, first, second))
            costs.append(small[first, second] * joint.count)
        base = dict[_Role, int]()
        self._base, self._twins, self._edges_of = base, twins, edges_of
        for role, own in twins.items():
            base[role] = len(low)
            start = self._start[role[0]]
            rows.append(len(low) + own.number)
            columns.append(start + np.arange(len(own.number)))
            values.append(-np.ones(len(own.number)))
            low += [0.0] * len(own.first)
        parts: Counter[_Role] = Counter(role for joint in joints for role in set(joint.roles))
        for joint, (pairs, first, second) in zip(joints, variables, strict=True):
            for role, which in zip(joint.roles, (first, second), strict=True):
                rows.append(base[role] + which)
                columns.append(pairs)
                values.append(np.full(len(pairs), joint.count / edges_of[role]))
            if all(parts[role] > 1 for role in joint.roles):
                equation([(pairs, np.ones(len(pairs)))], 1.0)
        high = list(low)
        self._memory = list[tuple[int, int, float]]()  # place, row, unit
        if self._classes.places:
            self._add_memory(rows, columns, values, low, high)
        triples = joined(values, float), joined(rows, int), joined(columns, int)
        self._program = LinearProgram(joined(costs, float), triples, np.array(low), np.array(high), self._num_binary)

    def _add_memory(
        self,
        rows: list[Array],
        columns: list[Array],
        values: list[Array],
        low: list[float],
        high: list[float],
    ) -> None:
        network, places = self._network, self._classes.places
        assert network.limit is not None
        fixed = network.memory.fixed
        used = [usages_at(network, node, places) for node in self._reps]
        for number, place in enumerate(places):
            held = [
                (start, usages[number] * size)
                for start, usages, size in zip(self._start, used, self._classes.sizes, strict=True)
                if usages[number].any()
            ]
            unit = max((float(np.abs(usage).max()) for _, usage in held), default=0.0) or 1.0
            self._memory.append((place, len(low), unit))
            for start, usage in held:
                rows.append(np.full(len(usage), len(low)))
                columns.append(start + np.arange(len(usage)))
                values.append(usage / unit)
            low.append(-np.inf)
            high.append((network.limit - float(fixed[place])) / unit)
