"""Solve a cost network: reduce it, solve what is left, and say how good the answer is."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from bactrian.passes.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.network.local import LocalSearch
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduce import ReducedNetwork, nothing_combines
from bactrian.passes.network.tables import elimination_order, solve_by_tables

_REDUCTION_SHARE = 0.5  # of the time, at most
_RELAXED_SHARE = 0.25  # of the time, at most, for a first try without the memory limit
_RELAXED_PAIRS = 0.8  # it is made if that leaves less than this part of the pairs
_LIFTED_SHARE = 0.5  # of the time, at most, for classes of nodes that look alike
_FIRST_SHARE = 0.05  # of the time, at most, for a first choice
_MOST_PRUNINGS = 4
_PROGRAM_PAIRS = 400_000  # more don't go into one program: its relaxation alone would take minutes
_SEARCH_SHARE = 0.15  # of the time, kept for a choice without proof where the program has given none


@dataclass(frozen=True)
class Solution:
    """An answer with its proof.

    Attributes:
        choice: the strategy of each node.
        cost: its exact cost.
        bound: no allowed choice costs less.
        optimal: whether it is proved that none does: for integers exactly (as far as floating point proves anything;
            never where their sums leave 2^53), for other costs up to 1e-9 of the cost that a choice can save.
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
        InfeasiblePlanError: there is no allowed choice.
        ConfigError: none was found in time.
    """
    return _solve(problem, time_limit, only_proved=False)


def _solve(problem: CostNetwork, time_limit: float, *, only_proved: bool) -> Solution:
    """`solve`, or with ``only_proved`` an error instead of the long search for a good choice without proof."""
    begin = time.monotonic()
    deadline = begin + time_limit
    network = ReducedNetwork(problem)
    network.reduce(begin + _REDUCTION_SHARE * time_limit)
    relaxed = _relaxed(problem, network, begin + _RELAXED_SHARE * time_limit)
    if relaxed is not None:
        return replace(relaxed, seconds=time.monotonic() - begin)
    count, rows = len(problem.costs), 0
    figures = {
        "nodes": count,
        "strategies": problem.num_strategies,
        "nodes left": len(network.costs),
        "strategies left": network.num_strategies,
        "pairs left": network.num_pairs,
    }
    choice, bound, proved = None, network.constant, True
    order = elimination_order(network) if network.limit is None else None
    if network.costs and order is not None:
        found = solve_by_tables(network, order)
        if found is None:
            raise nothing_combines()
        choice = _in_order(network.expand(found))
    elif network.costs:
        from bactrian.passes.network.lifted import solve_lifted  # imports a solver

        lifted = solve_lifted(network, begin + _LIFTED_SHARE * time_limit)
        if lifted is not None:
            bound, proved = lifted.bound, lifted.optimal
            if lifted.choice is not None:
                choice = _allowed(problem, _in_order(lifted.choice))
            figures["classes"] = lifted.num_classes
    if not network.costs:
        choice = choice or _allowed(problem, _in_order(network.expand({})))
    elif not (choice is not None and proved) and network.num_pairs > _PROGRAM_PAIRS:
        if only_proved:
            raise ConfigError("the network is too large for one program")
        from bactrian.passes.network.messages import search

        proved, anytime = False, search(network, deadline)
        bound = max(bound, anytime.bound)
        figures |= {"sweeps": anytime.sweeps, "neighbourhoods": anytime.neighbourhoods}
        if anytime.choice is not None:
            other = _allowed(problem, _in_order(network.expand(anytime.choice)))
            if choice is None or (other is not None and problem.cost(other) < problem.cost(choice)):
                choice = other
    elif choice is None or not proved:
        from bactrian.passes.network.milp import IntegerProgram

        proved = True
        best = choice
        if not IntegerProgram(network).is_exact:
            # Some costs are so large that they hide small differences: those that any answer rules out can go.
            found = LocalSearch(network).search(time.monotonic() + _FIRST_SHARE * time_limit)
            if found is not None and network.profile(found).max(initial=0) <= (problem.limit or np.inf):
                network.prune(network.cost(found))
                network.reduce(deadline)
        for _ in range(_MOST_PRUNINGS):
            program = IntegerProgram(network)
            try:
                outcome = program.solve(deadline - _SEARCH_SHARE * time_limit)
            except InfeasiblePlanError:
                if best is None:
                    raise
                proved = True  # what is better than the best was looked for, and is not there
                break
            bound, proved, rows = max(bound, outcome.bound), outcome.optimal, rows + outcome.memory_rows
            if outcome.choice is not None:
                choice = _allowed(problem, _in_order(network.expand(outcome.choice)))
                proved = proved and choice is not None
            if outcome.choice is None or choice is None or proved or program.is_exact:
                break
            # Costs that the answer rules out are so large that they hide small differences: once more without them.
            network.prune(network.cost(outcome.choice))
            network.reduce(deadline)
            if not network.costs:
                choice, proved = _allowed(problem, _in_order(network.expand({}))), True
                break
        if best is not None and (choice is None or problem.cost(best) < problem.cost(choice)):
            choice = best
        if choice is None and (found := LocalSearch(network).search(deadline)) is not None:
            choice, proved = _allowed(problem, _in_order(network.expand(found))), False
    if choice is None:
        raise ConfigError(
            f"no allowed choice was found in {time_limit:g} s",
            why=f"the network has {network.num_strategies:,} strategies and {network.num_pairs:,} pairs left",
            fix="give it more time; whether there is one is not known",
        )
    proved = proved and network.is_exact
    cost = problem.cost(choice)
    figures["memory rows"] = rows
    return Solution(
        choice=tuple(choice),
        cost=cost,
        bound=float(cost) if proved else min(float(bound), float(cost)),
        optimal=proved,
        memory=problem.peak(choice),
        seconds=time.monotonic() - begin,
        figures=figures,
    )


def _relaxed(problem: CostNetwork, network: ReducedNetwork, deadline: float) -> Solution | None:
    """The answer without the memory limit, if it keeps the limit: nothing that does can cost less.

    Without memory, nodes with few edges can be eliminated that otherwise have to stay.
    """
    if problem.limit is None or not network.costs:
        return None
    free = replace(problem, limit=None)
    smaller = ReducedNetwork(free)
    smaller.reduce(deadline)
    if time.monotonic() > deadline:
        return None
    if smaller.num_pairs > _RELAXED_PAIRS * network.num_pairs and elimination_order(smaller) is None:
        return None
    try:
        found = _solve(free, deadline - time.monotonic(), only_proved=True)
    except ConfigError:  # none in time
        return None
    return found if problem.is_allowed(found.choice) and found.optimal else None


def _in_order(choice: dict[int, int]) -> list[int]:
    return [choice[node] for node in sorted(choice)]


def _allowed(problem: CostNetwork, choice: list[int]) -> list[int] | None:
    return choice if problem.is_allowed(choice) else None
