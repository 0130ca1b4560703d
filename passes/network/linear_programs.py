"""Linear and mixed-integer programs, solved by HiGHS (Huangfu and Hall 2018) through OR-tools' MathOpt.

HiGHS runs with a fixed seed and without the presolve rules that watch the clock, so that a solve that ends before its
deadline gives the same solution on every machine.
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
from ortools.math_opt.solvers import highs_pb2

from bactrian.passes.network.hash_consing import Array

_OBJECTIVE = 1e6  # the largest coefficient after scaling
# Bits of HiGHS's presolve rules that are left out: those for dependent equations and dependent free columns give up after a
# second, so that the solution would depend on what else the machine does. Without them it is also faster.
_TIMED_PRESOLVE_RULES = 1 << 10 | 1 << 11


@dataclass(frozen=True)
class ProgramResult:
    """How a solve ended.

    Attributes:
        is_infeasible, is_optimal: proved.
        values: of the columns, if any were found.
        lower_bound: on the objective.
        duals: of the rows, where they were asked for: an increase of a row's bounds by one changes the optimum by that.
    """

    is_infeasible: bool
    is_optimal: bool
    values: Array | None
    lower_bound: float
    duals: Array | None = None


class LinearProgram:
    """Minimise ``objective @ x`` for ``low <= matrix @ x <= high`` and ``0 <= x <= 1``.

    Args:
        objective: of each column.
        triples: values, rows and columns of the matrix.
        low, high: of each row.
        num_binary: so many columns, the first, are 0 or 1 where integers are asked for.
    """

    def __init__(
        self, objective: Array, triples: tuple[Array, Array, Array], low: Array, high: Array, num_binary: int
    ) -> None:
        self.factor = _OBJECTIVE / max(float(np.abs(objective).max(initial=0.0)), 1e-300)
        self._objective = objective * self.factor
        values, rows, columns = triples
        self._matrix = scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(low), len(objective)))
        self._low, self._high, self._num_binary = low, high, num_binary

    @property
    def largest(self) -> float:
        """The largest coefficient of the objective."""
        return float(np.abs(self._objective).max(initial=0.0)) / self.factor

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self._low)

    def add_rows(
        self, values: Sequence[Array], rows: Sequence[Array], columns: Sequence[Array], high: list[float]
    ) -> None:
        """Add rows with an upper bound each; ``rows`` count from 0."""
        shape = len(high), len(self._objective)
        triples = (concatenated(values, float), (concatenated(rows, int), concatenated(columns, int)))
        more = scipy.sparse.csr_matrix(triples, shape=shape)
        self._matrix = scipy.sparse.vstack([self._matrix, more], format="csr")
        self._low = np.concatenate([self._low, np.full(len(high), -np.inf)])
        self._high = np.concatenate([self._high, high])

    def solve(
        self,
        deadline: float,
        *,
        integer: bool,
        relative_gap: float = 0.0,
        absolute_gap: float | None = None,
        target: float = -np.inf,
        duals: bool = False,
    ) -> ProgramResult:
        """Solve it, as far as it gets until the deadline (`time.monotonic`).

        Args:
            deadline: passed by little.
            integer: whether the first columns must be 0 or 1; else the linear relaxation.
            relative_gap: between the objective and its lower bound, at which a solution is called optimal.
            absolute_gap: the same, in the unit of the objective; None for the solver's default.
            target: an integral solution that costs no more ends the search.
            duals: whether to return those of the rows; of linear programs only.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            return ProgramResult(False, False, None, -np.inf)
        result = mathopt.solve(
            mathopt.Model.from_model_proto(self._proto(integer)),
            mathopt.SolverType.HIGHS,
            params=mathopt.SolveParameters(
                time_limit=datetime.timedelta(seconds=left),
                relative_gap_tolerance=relative_gap,
                absolute_gap_tolerance=None if absolute_gap is None else absolute_gap * self.factor,
                random_seed=0,
                highs=highs_pb2.HighsOptionsProto(
                    int_options={"presolve_rule_off": _TIMED_PRESOLVE_RULES},
                    double_options={"objective_target": target * self.factor},
                ),
            ),
        )
        found = result.has_primal_feasible_solution()
        values = np.fromiter(result.variable_values().values(), float, len(self._objective)) if found else None
        reason, multipliers = result.termination.reason, None
        if duals and result.has_dual_feasible_solution():
            multipliers = np.fromiter(result.dual_values().values(), float, len(self._low)) / self.factor
        return ProgramResult(
            is_infeasible=reason == mathopt.TerminationReason.INFEASIBLE,
            is_optimal=reason == mathopt.TerminationReason.OPTIMAL,
            values=values,
            lower_bound=float(result.best_objective_bound()) / self.factor,
            duals=multipliers,
        )

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


@dataclass(frozen=True)
class EqualRows:
    """Classes of equal rows: the ``first`` row of each class, and the class ``number`` of each row."""

    first: Array
    number: Array

    @classmethod
    def of(cls, matrix: Array, finest: float | None) -> EqualRows:
        """The equal rows of a matrix; numbers that differ by less than ``finest`` are equal."""
        keys = matrix if finest is None else np.round(np.where(np.isfinite(matrix), matrix, 0.0) / finest)
        keys = np.where(np.isfinite(matrix), keys, -1.0)  # costs are not negative
        _, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        return cls(first, number.reshape(-1))


def resolution_of(matrices: Sequence[Array], whole: bool) -> float | None:
    """Costs that differ by less are equal: all together, far less than the gap that is proved. None for integers."""
    if whole:
        return None
    largest = max((float(m[np.isfinite(m)].max(initial=0.0)) for m in matrices), default=0.0)
    return max(1e-14 * largest, 1e-300)


def concatenated(parts: Sequence[Array], kind: type) -> Array:
    """The parts one after another."""
    return np.concatenate(parts) if parts else np.zeros(0, kind)
