"""Solve a cost network: reduce it, solve what is left, and say how good the answer is."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bactrian.passes.errors import InfeasiblePlanError
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduce import ReducedNetwork


@dataclass(frozen=True)
class Solution:
    """An answer with its proof.

    Attributes:
        choice: the strategy of each node.
        cost: its exact cost.
        bound: no allowed choice costs less (up to the solver's tolerance, 1e-9 of the largest cost).
        optimal: whether it is proved that none does.
        memory: its peak.
        seconds: of the whole solve.
        figures: sizes on the way, for people.
    """

    choice: tuple[int, ...]
    cost: int | float
    bound: float
    optimal: bool
    memory: int | float
    seconds: float
    figures: dict[str, int]


def solve(problem: CostNetwork, time_limit: float = 60.0) -> Solution:
    """The cheapest choice within the memory limit, or the best found in ``time_limit`` seconds.

    Raises:
        InfeasiblePlanError: there is no allowed choice, or none was found in time.
    """
    begin = time.monotonic()
    network = ReducedNetwork(problem)
    network.reduce()
    figures = {
        "nodes": len(problem.costs),
        "strategies": problem.num_strategies,
        "nodes left": len(network.costs),
        "strategies left": network.num_strategies,
        "pairs left": network.num_pairs,
        "memory rows": 0,
    }
    count = len(problem.costs)
    if not network.costs:
        choice, bound, optimal = network.expand({}, count), network.constant, True
        _check_memory(problem, choice)
    else:
        from bactrian.passes.network.milp import IntegerProgram  # imports a solver

        outcome = IntegerProgram(network).solve(begin + time_limit)
        figures["memory rows"] = outcome.memory_rows
        if outcome.choice is None:
            raise InfeasiblePlanError(
                f"no allowed choice was found in {time_limit:g} s",
                why=f"the network has {network.num_strategies:,} strategies and {network.num_pairs:,} pairs left",
                fix="give it more time",
            )
        choice, bound, optimal = network.expand(outcome.choice, count), outcome.bound, outcome.optimal
    cost = problem.cost(choice)
    bound = min(float(bound), float(cost)) if np.isfinite(bound) else float("-inf")
    if optimal:
        bound = float(cost)
    return Solution(tuple(choice), cost, bound, optimal, problem.peak(choice), time.monotonic() - begin, figures)


def _check_memory(problem: CostNetwork, choice: list[int]) -> None:
    """With nothing left to decide, memory is what it is."""
    if problem.limit is not None and (peak := problem.peak(choice)) > problem.limit:
        raise InfeasiblePlanError(
            f"no choice fits into a memory of {problem.limit:,}",
            why=f"every allowed one needs {peak:,} at some time",
            fix="raise the limit, or allow strategies that use less memory",
        )
