"""The reduced network as a mixed-integer linear program (MILP) over the local polytope.

Each node has a binary variable per strategy, each edge a variable per pair, and the pairs' sums over either side equal the
node variables: the local polytope (Wainwright and Jordan, "Graphical models, exponential families, and variational inference",
2008), whose linear relaxation is tight on most real instances, where XLA's ``e >= s_p + s_q - 1`` is not. Strategies of a node
with equal rows in a cost matrix share that edge's pair variables. Memory rows, one for a program point, are added when a
solution violates them (lazy constraints).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.linear_programs import EqualRows, LinearProgram, ProgramResult, concatenated, resolution_of
from bactrian.passes.network.min_marginals import DualMultipliers
from bactrian.passes.network.reduced_network import ReducedNetwork, nothing_combines

_ROWS_AT_ONCE = 12  # memory rows added after one solve
_GAP = 1e-9  # relative, at which a solution of costs that are no integers is called optimal
_INTEGRAL = 1e-6  # as far from 0 and 1, HiGHS calls a variable integral
UNIT_GAP = 0.99
"""For integers: what is left of a gap below 1 is none."""
# Beside larger integers HiGHS's tolerances hide a difference of 1; nothing is called optimal then.
MOST_EXACT = 10**12


@dataclass(frozen=True)
class IntegerResult:
    """How an integer program ended.

    Attributes:
        choice: by node of the network, if one was found.
        lower_bound: no feasible choice costs less.
        optimal: whether the choice is proved optimal.
        memory_rows: how many the program has.
    """

    choice: dict[int, int] | None
    lower_bound: float
    optimal: bool
    memory_rows: int


@dataclass(frozen=True)
class RelaxationResult:
    """How a linear relaxation ended.

    Attributes:
        choice: by node of the network, if the solution is integral: then it is the best one.
        lower_bound: no feasible choice costs less.
        duals: the multipliers that prove it, if it was solved in time.
        is_solved: whether it was.
    """

    choice: dict[int, int] | None
    lower_bound: float
    duals: DualMultipliers | None
    is_solved: bool


class IntegerProgram:
    """The program of one reduced network, which grows by memory rows.

    Args:
        network: reduced.
        times: some of those at which there are memory rows from the start, the most important first.
    """

    def __init__(self, network: ReducedNetwork, times: Sequence[int] = ()) -> None:
        self._network = network
        self._nodes = sorted(network.costs)
        sizes = [len(network.costs[node]) for node in self._nodes]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._start = dict(zip(self._nodes, starts.tolist(), strict=False))
        self._num_binary = int(starts[-1])
        self._rows: dict[int, tuple[int, float]] = {}  # points with a memory constraint -> its row, and its unit
        # Edge -> the first row of either end, and the number of each strategy's row from there.
        self._edges: dict[tuple[int, int], tuple[tuple[int, Array], tuple[int, Array]]] = {}
        self._build()
        if times and network.limit is not None:
            memory = network.memory
            self._append(_spread_out([memory.point_at(time) for time in times], len(memory.times)))

    def solve(self, deadline: float, target: float = -np.inf) -> IntegerResult:
        """Relax, then solve with integers, until proved optimal, a choice costs no more than a target, or the deadline
        (`time.monotonic`).

        Raises:
            InfeasiblePlanError: there is no choice within the memory limit.
        """
        relaxed = self.relax(deadline)  # its violated memory rows are most of those that bind
        if relaxed.choice is not None or not relaxed.is_solved:
            return IntegerResult(
                relaxed.choice, relaxed.lower_bound, relaxed.choice is not None and self.is_exact, len(self._rows)
            )
        return self.solve_integer(deadline, relaxed.lower_bound, target)

    def relax(self, deadline: float) -> RelaxationResult:
        """The linear relaxation, with all memory rows that it needs.

        Raises:
            InfeasiblePlanError: there is no choice within the memory limit.
        """
        bound = self._network.constant
        while True:
            result = self._run(deadline, integer=False)
            values, bound = self._checked(result), max(bound, result.lower_bound + self._network.constant)
            if values is None:
                return RelaxationResult(None, bound, None, is_solved=False)
            if self._add_rows(self._fractional_profile(values)):
                continue
            duals = None if result.duals is None else self._multipliers(result.duals)
            if result.is_optimal and self._is_tight(values, result.lower_bound + self._network.constant):
                choice = self._choice(values)
                profile = self._network.memory.profile(choice)
                if not len(self._over(profile)):
                    return RelaxationResult(choice, bound, duals, is_solved=True)
            return RelaxationResult(None, bound, duals, is_solved=True)

    def solve_integer(self, deadline: float, bound: float, target: float = -np.inf) -> IntegerResult:
        """With the integers, and the memory rows of before, until proved optimal or as `solve`.

        Args:
            deadline, target: as of `solve`.
            bound: a lower bound that is known.

        Raises:
            InfeasiblePlanError: there is no choice within the memory limit.
        """
        while True:
            result = self._run(deadline, integer=True, target=target)
            values, bound = self._checked(result), max(bound, result.lower_bound + self._network.constant)
            if values is None:
                return IntegerResult(None, bound, optimal=False, memory_rows=len(self._rows))
            choice = self._choice(values)
            profile = self._network.memory.profile(choice)
            if not self._add_rows(profile) and not self._add_covers(choice, profile):
                return IntegerResult(choice, bound, result.is_optimal and self.is_exact, len(self._rows))

    def _checked(self, result: ProgramResult) -> Array | None:
        if result.is_infeasible:
            raise self._infeasible()
        return result.values

    def _multipliers(self, duals: Array) -> DualMultipliers:
        """The rows' duals, by edge and program point."""
        edges = {
            edge: (duals[first + own], duals[second + others])
            for edge, ((first, own), (second, others)) in self._edges.items()
        }
        memory = {point: max(0.0, -float(duals[row])) / unit for point, (row, unit) in self._rows.items()}
        return DualMultipliers(edges, {point: multiplier for point, multiplier in memory.items() if multiplier})

    def _is_tight(self, values: Array, bound: float) -> bool:
        """Whether the relaxed program's solution is a choice, as it mostly is: then it is the best one."""
        least = float(values[: self._num_binary][values[: self._num_binary] > 0.5].min(initial=1.0))
        if least < 1 - _INTEGRAL or np.count_nonzero(values[: self._num_binary] > 0.5) != len(self._nodes):
            return False
        return is_gap_closed(self._network, self._network.cost(self._choice(values)), bound)

    @property
    def times(self) -> list[int]:
        """Those at which there are memory rows."""
        return [self._network.memory.times[point] for point in self._rows]

    @property
    def is_exact(self) -> bool:
        """Whether HiGHS's tolerances are finer than the costs' differences."""
        return not self._network.whole or self._program.largest <= MOST_EXACT

    def _infeasible(self) -> InfeasiblePlanError:
        if self._network.limit is None or not self._rows:
            return nothing_combines()
        return InfeasiblePlanError(
            f"no choice fits into a memory of {self._network.limit:,}",
            why="every allowed combination needs more at some time, though the leanest strategies alone would fit",
            fix="raise the limit, or allow strategies that use less memory",
        )

    def _build(self) -> None:
        network = self._network
        finest = resolution_of(list(network.pairs.values()), network.whole)
        costs = [network.costs[node] for node in self._nodes]
        rows, columns, values, low = list[Array](), list[Array](), list[Array](), list[float]()
        for node, own in zip(self._nodes, costs, strict=True):
            rows.append(np.full(len(own), len(low)))
            columns.append(self._start[node] + np.arange(len(own)))
            values.append(np.ones(len(own)))
            low.append(1.0)
        at = self._num_binary
        for (i, j), matrix in network.pairs.items():
            own, others = EqualRows.of(matrix, finest), EqualRows.of(matrix.T, finest)
            small = matrix[np.ix_(own.first, others.first)]
            first, second = np.nonzero(np.isfinite(small))
            pairs = at + np.arange(len(first))
            at += len(first)
            base, middle = len(low), len(low) + small.shape[0]
            self._edges[i, j] = (base, own.number), (middle, others.number)
            rows += [base + first, middle + second, base + own.number, middle + others.number]
            columns += [pairs, pairs]
            columns.append(self._start[i] + np.arange(matrix.shape[0]))
            columns.append(self._start[j] + np.arange(matrix.shape[1]))
            values += [
                np.ones(len(first)),
                np.ones(len(first)),
                -np.ones(len(own.number)),
                -np.ones(len(others.number)),
            ]
            low += [0.0] * (small.shape[0] + small.shape[1])
            costs.append(small[first, second])
        triples = concatenated(values, float), concatenated(rows, int), concatenated(columns, int)
        bounds = np.array(low)
        self._program = LinearProgram(concatenated(costs, float), triples, bounds, bounds, self._num_binary)

    def _run(self, deadline: float, *, integer: bool, target: float = -np.inf) -> ProgramResult:
        whole = self._network.whole
        return self._program.solve(
            deadline,
            integer=integer,
            relative_gap=0.0 if whole else _GAP,
            absolute_gap=UNIT_GAP if whole else None,
            target=target - self._network.constant,
            duals=not integer,
        )

    def _choice(self, values: Array) -> dict[int, int]:
        return {
            node: int(values[start : start + len(self._network.costs[node])].argmax())
            for node, start in self._start.items()
        }

    def _fractional_profile(self, values: Array) -> Array:
        network = self._network
        total = network.memory.fixed
        for node, start in self._start.items():
            for begin, end, usage in network.memory.spans(node):
                total[begin:end] += values[start : start + len(usage)] @ usage
        return total

    def _add_rows(self, profile: Array) -> bool:
        """Add rows for the worst times that are over the limit, some way apart; false if there are none."""
        limit = self._network.limit
        if limit is None:
            return False
        over = self._over(profile)
        over = over[np.argsort(-profile[over], kind="stable")]
        chosen = _spread_out([point for point in over.tolist() if point not in self._rows], len(profile))
        if not chosen:
            return False
        self._append(chosen)
        return True

    def _append(self, points: Sequence[int]) -> None:
        network = self._network
        assert network.limit is not None
        rows, columns, values, high = list[Array](), list[Array](), list[Array](), list[float]()
        fixed = network.memory.fixed
        for number, point in enumerate(points):
            held = [
                (start, usage)
                for node, start in self._start.items()
                for begin, end, usage in network.memory.spans(node)
                if begin <= point < end
            ]
            unit = max((float(np.abs(usage).max()) for _, usage in held), default=0.0) or 1.0
            for start, usage in held:
                rows.append(np.full(len(usage), number))
                columns.append(start + np.arange(len(usage)))
                values.append(usage / unit)
            high.append((network.limit - float(fixed[point])) / unit)
            self._rows[point] = self._program.num_rows + number, unit
        self._program.add_rows(values, rows, columns, high)

    def _over(self, profile: Array) -> Array:
        """Places where there is too much memory."""
        limit = self._network.limit
        if limit is None:
            return np.zeros(0, int)
        return np.flatnonzero(profile > (limit if self._network.whole else limit * (1 + 1e-12)))

    def _add_covers(self, choice: dict[int, int], profile: Array) -> bool:
        """Exclude a choice that is over the limit by less than the solver's tolerance, and all that hold no less.

        A cover inequality: of the strategies that hold at least as much as the chosen ones, not one in every node.
        """
        over = self._over(profile)
        rows, columns, high = list[Array](), list[Array](), list[float]()
        for number, point in enumerate(over[:_ROWS_AT_ONCE].tolist()):
            nodes = 0
            for node, start in self._start.items():
                for begin, end, usage in self._network.memory.spans(node):
                    mine = usage[choice[node]]
                    if begin <= point < end and mine > usage.min():
                        nodes += 1
                        found = start + np.flatnonzero(usage >= mine)
                        rows.append(np.full(len(found), number))
                        columns.append(found)
            high.append(nodes - 1.0)
        if high:
            self._program.add_rows([np.ones(len(found)) for found in columns], rows, columns, high)
        return bool(high)


def _spread_out(points: Sequence[int], count: int) -> list[int]:
    """The first of some points, out of so many, that are not close to each other."""
    chosen: list[int] = []
    for point in points:
        if all(abs(point - other) > count // 200 for other in chosen):
            chosen.append(point)
        if len(chosen) == _ROWS_AT_ONCE:
            break
    return chosen


def is_gap_closed(network: ReducedNetwork, cost: float, bound: float) -> bool:
    """Whether a choice of this cost is proved to be the best one."""
    if not np.isfinite(cost):
        return False
    return cost - bound < UNIT_GAP if network.whole else cost - bound <= _GAP * abs(cost - network.constant)
