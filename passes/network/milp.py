"""The reduced network as a mixed-integer program, solved by HiGHS through OR-tools.

Each node has a binary variable per strategy, each edge a variable per pair, and the pairs' sums over either side equal the
node variables: the local polytope of Wainwright and Jordan (2008), whose relaxation is tight on most real instances where
XLA's ``e >= s_p + s_q - 1`` is not. Memory rows are added when a solution violates them.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from bactrian.passes.errors import InfeasiblePlanError
from bactrian.passes.network.reduce import Array, ReducedNetwork

_ROWS_AT_ONCE = 12  # memory rows added after one solve
_OBJECTIVE = 1e6  # the largest coefficient after scaling
_GAP = 1e-9  # relative, at which HiGHS may call a solution optimal


@dataclass(frozen=True)
class Outcome:
    """``choice`` by node, if one was found; ``bound`` no solution's cost is below; ``optimal``: proved."""

    choice: dict[int, int] | None
    bound: float
    optimal: bool
    memory_rows: int


class IntegerProgram:
    """The program of one reduced network, which grows by memory rows."""

    def __init__(self, network: ReducedNetwork) -> None:
        self._network = network
        self._nodes = sorted(network.costs)
        sizes = [len(network.costs[node]) for node in self._nodes]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._start = dict(zip(self._nodes, starts.tolist(), strict=False))
        self._num_binary = int(starts[-1])
        self._rows: dict[int, int] = {}  # place -> row of its memory constraint
        self._build()

    def solve(self, deadline: float) -> Outcome:
        """Until proved optimal or the deadline (`time.monotonic`).

        Raises:
            InfeasiblePlanError: there is no choice within the memory limit; the message says how much is missing.
        """
        bound = -np.inf
        while True:  # relaxed: its violated memory rows are most of those that bind
            status, values, bound_here = self._run(deadline, integer=False)
            if status == mathopt.TerminationReason.INFEASIBLE:
                raise _infeasible(self._network)
            if values is None:
                return Outcome(None, bound, optimal=False, memory_rows=len(self._rows))
            bound = max(bound, bound_here)
            if not self._add_rows(self._relaxed_profile(values)):
                break
        exact, relaxed = True, bound
        while True:
            status, values, bound_here = self._run(deadline, integer=True)
            if status == mathopt.TerminationReason.INFEASIBLE:
                raise _infeasible(self._network)
            bound = max(bound, bound_here)
            if values is None:
                return Outcome(None, bound, optimal=False, memory_rows=len(self._rows))
            choice = self._choice(values)
            profile = self._network.profile(choice)
            if self._add_rows(profile):
                continue
            if self._tighten(profile):
                exact = False
                continue
            optimal = exact and status == mathopt.TerminationReason.OPTIMAL
            return Outcome(choice, bound if exact else relaxed, optimal, len(self._rows))

    def _build(self) -> None:
        network = self._network
        costs = [network.costs[node] for node in self._nodes]
        rows, columns, values, low = list[Array](), list[Array](), list[Array](), list[float]()
        for node, own in zip(self._nodes, costs, strict=True):
            rows.append(np.full(len(own), len(low)))
            columns.append(self._start[node] + np.arange(len(own)))
            values.append(np.ones(len(own)))
            low.append(1.0)
        at = self._num_binary
        for (i, j), matrix in network.pairs.items():
            first, second = np.nonzero(np.isfinite(matrix))
            pairs = at + np.arange(len(first))
            at += len(first)
            count = matrix.shape[0] + matrix.shape[1]
            base = len(low)
            rows += [base + first, base + matrix.shape[0] + second, base + np.arange(count)]
            columns += [pairs, pairs]
            columns.append(
                np.concatenate(
                    [self._start[i] + np.arange(matrix.shape[0]), self._start[j] + np.arange(matrix.shape[1])]
                )
            )
            values += [np.ones(len(first)), np.ones(len(first)), -np.ones(count)]
            low += [0.0] * count
            costs.append(matrix[first, second])
        objective = np.concatenate(costs) if costs else np.zeros(0)
        self._factor = _OBJECTIVE / max(float(np.abs(objective).max(initial=0.0)), 1e-300)
        self._objective = objective * self._factor
        shape = len(low), len(objective)
        triples = (_joined(values, float), (_joined(rows, int), _joined(columns, int)))
        self._matrix = scipy.sparse.csr_matrix(triples, shape=shape)
        self._low, self._high = np.array(low), np.array(low)

    def _run(self, deadline: float, *, integer: bool) -> tuple[Any, Array | None, float]:
        left = deadline - time.monotonic()
        if left <= 0:
            return None, None, -np.inf
        model = mathopt.Model.from_model_proto(self._proto(integer))
        result = mathopt.solve(
            model,
            mathopt.SolverType.HIGHS,
            params=mathopt.SolveParameters(
                time_limit=datetime.timedelta(seconds=left), relative_gap_tolerance=_GAP, random_seed=0
            ),
        )
        found = result.has_primal_feasible_solution()
        values = np.fromiter(result.variable_values().values(), float, len(self._objective)) if found else None
        bound = float(result.best_objective_bound())
        return result.termination.reason, values, bound / self._factor + self._network.constant

    def _proto(self, integer: bool) -> Any:
        """The program as MathOpt reads it: building it variable by variable in Python would take longer than solving."""
        count, rows = len(self._objective), len(self._low)
        proto = model_pb2.ModelProto()
        proto.variables.ids.extend(range(count))
        proto.variables.lower_bounds.extend([0.0] * count)
        proto.variables.upper_bounds.extend([1.0] * count)
        proto.variables.integers.extend([integer and column < self._num_binary for column in range(count)])
        used = np.flatnonzero(self._objective)
        proto.objective.linear_coefficients.ids.extend(used.tolist())
        proto.objective.linear_coefficients.values.extend(self._objective[used].tolist())
        proto.linear_constraints.ids.extend(range(rows))
        proto.linear_constraints.lower_bounds.extend(self._low.tolist())
        proto.linear_constraints.upper_bounds.extend(self._high.tolist())
        matrix = self._matrix.tocsr()
        matrix.sort_indices()
        matrix = matrix.tocoo()
        proto.linear_constraint_matrix.row_ids.extend(matrix.row.tolist())
        proto.linear_constraint_matrix.column_ids.extend(matrix.col.tolist())
        proto.linear_constraint_matrix.coefficients.extend(matrix.data.tolist())
        return proto

    def _choice(self, values: Array) -> dict[int, int]:
        return {
            node: int(values[start : start + len(self._network.costs[node])].argmax())
            for node, start in self._start.items()
        }

    def _relaxed_profile(self, values: Array) -> Array:
        network = self._network
        total = network.fixed
        for node, start in self._start.items():
            for begin, end, usage in network.spans(node):
                total[begin:end] += values[start : start + len(usage)] @ usage
        return total

    def _add_rows(self, profile: Array) -> bool:
        """Add rows for the worst times that are over the limit, some way apart; false if there are none."""
        limit = self._network.limit
        if limit is None:
            return False
        over = np.flatnonzero(profile > limit * (1 + 1e-12))
        over = over[np.argsort(-profile[over], kind="stable")]
        chosen: list[int] = []
        for place in over.tolist():
            if place not in self._rows and all(abs(place - other) > len(profile) // 200 for other in chosen):
                chosen.append(place)
            if len(chosen) == _ROWS_AT_ONCE:
                break
        if not chosen:
            return False
        self._append(chosen)
        return True

    def _append(self, places: Sequence[int]) -> None:
        network = self._network
        assert network.limit is not None
        unit, fixed = self._memory_unit(), network.fixed
        rows, columns, values, high = list[Array](), list[Array](), list[Array](), list[float]()
        for number, place in enumerate(places):
            for node, start in self._start.items():
                for begin, end, usage in network.spans(node):
                    if begin <= place < end:
                        rows.append(np.full(len(usage), number))
                        columns.append(start + np.arange(len(usage)))
                        values.append(usage / unit)
            high.append((network.limit - float(fixed[place])) / unit)
        shape = len(places), len(self._objective)
        triples = (_joined(values, float), (_joined(rows, int), _joined(columns, int)))
        more = scipy.sparse.csr_matrix(triples, shape=shape)
        self._matrix = scipy.sparse.vstack([self._matrix, more], format="csr")
        self._low = np.concatenate([self._low, np.full(len(places), -np.inf)])
        self._high = np.concatenate([self._high, high])
        first = len(self._low) - len(places)
        self._rows.update({place: first + number for number, place in enumerate(places)})

    def _memory_unit(self) -> float:
        """What memory is divided by: a solver's tolerance of 1e-6 is then 1e-10 of the limit."""
        return max(float(self._network.limit or 0), 1e-300) / 1e4

    def _tighten(self, profile: Array) -> bool:
        """Rows that are in the program and yet violated, within the solver's tolerance, get so much less memory."""
        limit = self._network.limit
        over = [] if limit is None else np.flatnonzero(profile > limit * (1 + 1e-12)).tolist()
        for place in over:
            if place in self._rows:
                self._high[self._rows[place]] -= 2 * (profile[place] - limit) / self._memory_unit()
        return any(place in self._rows for place in over)


def _joined(parts: Sequence[Array], kind: type) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def _infeasible(network: ReducedNetwork) -> InfeasiblePlanError:
    """How far the least possible memory is above the limit."""
    assert network.limit is not None
    missing = float(network.least.max(initial=0.0)) - network.limit  # each node at its leanest, together or not
    amount = f"at least {missing:,.0f} more" if missing > 0 else "more"
    return InfeasiblePlanError(
        f"no choice fits into a memory of {network.limit:,}",
        why=f"every combination needs {amount} at some time",
        fix="raise the limit, or allow strategies that use less memory",
    )
