"""Reduced-cost fixing: strategies and pairs that cost more than the incumbent leave the network, round by round.

The dual multipliers of a relaxation give a lower bound for every strategy and pair (``min_marginals.py``). Those that cost
little above the lower bound on all choices are few, and an integer program of them soon has a good choice, often the best
one: a restricted integer program as primal heuristic. What costs more than that incumbent is dropped, and the exact reductions
begin anew. What is left is a small program, or nothing; then the incumbent is optimal. (Reduced-cost variable fixing is
standard in branch and bound; here it is iterated together with problem reductions.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.milp import UNIT_GAP, IntegerProgram, is_gap_closed
from bactrian.passes.network.min_marginals import DualMultipliers, MinMarginals
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import reduce_network
from bactrian.passes.network.trws import trws_multipliers

_FIRST_PAIRS = 4000  # of the first program; twice as many where it has no choice
_FEW_PAIRS = 8000  # a program of its own, whatever they cost
_FIRST_SHARE = 0.3  # of the time that is left, at most, for a program that can prove nothing
_WORTH = 0.7  # of the pairs: where more are left after dropping, the next program is of all that are left
_MOST_ROUNDS = 6


@dataclass
class FixingResult:
    """What is known so far.

    Attributes:
        choice: the incumbent by node of the problem, if there is one.
        cost: of it; infinite without one.
        lower_bound: no feasible choice costs less than the lesser of this and ``cost``.
        optimal: whether it is proved that nothing costs less than the incumbent by more than the tolerance.
        tolerance: as a part of the incumbent's cost.
        times: the program points at which there are memory rows.
    """

    choice: dict[int, int] | None
    cost: float
    lower_bound: float
    optimal: bool = False
    tolerance: float = 0.0
    times: Sequence[int] = ()


def solve_by_fixing(
    network: ReducedNetwork,
    deadline: float,
    choice: dict[int, int] | None = None,
    cost: float = np.inf,
    tolerance: float = 0.0,
) -> FixingResult:
    """The best choice up to a tolerance, or what was found until the deadline (`time.monotonic`).

    Args:
        network: reduced, with something to choose. Loses what no better choice than the incumbent contains.
        deadline: not passed by much.
        choice: a feasible one that is known, by node of the problem.
        cost: of it.
        tolerance: the part of its cost by which the choice may be above the best one.

    Raises:
        InfeasiblePlanError: no choice is feasible.
    """
    found = FixingResult(choice, cost, network.constant, tolerance=tolerance)
    before = np.inf
    try:
        for number in range(_MOST_ROUNDS):
            few = network.num_pairs <= _FEW_PAIRS or network.num_pairs > _WORTH * before
            before = network.num_pairs
            if number == 0 and not few:
                duals, before = trws_multipliers(network, deadline), np.inf
                found.times = [network.memory.times[point] for point in duals.memory]
                done = _fix(network, duals, found, deadline, _FIRST_PAIRS)
            else:
                done = _relax_and_fix(network, found, deadline, np.inf if few else _FIRST_PAIRS)
            if done:
                break
    except InfeasiblePlanError:  # nothing is better than the incumbent
        if found.choice is None:
            raise
        found.optimal = True
    return found


def _relax_and_fix(network: ReducedNetwork, found: FixingResult, deadline: float, most_pairs: float) -> bool:
    """A round with the duals of the linear relaxation; whether the incumbent is proved optimal, or time is up."""
    program = IntegerProgram(network, found.times)
    relaxed = program.relax(deadline)
    found.lower_bound, found.times = max(found.lower_bound, relaxed.lower_bound), program.times
    if relaxed.choice is not None:
        fits = _update(network, found, relaxed.choice)
        found.optimal = fits and program.is_exact and is_gap_closed(network, found.cost, found.lower_bound)
    if found.optimal or relaxed.duals is None:
        return True
    return _fix(network, relaxed.duals, found, deadline, 0 if relaxed.choice is not None else most_pairs)


def _fix(
    network: ReducedNetwork, duals: DualMultipliers, found: FixingResult, deadline: float, most_pairs: float
) -> bool:
    """Look for a choice among so many pairs, if any, and drop what costs more; whether that was all to be done."""
    bounds = MinMarginals(network, duals)
    found.lower_bound = max(found.lower_bound, bounds.lower_bound)
    if most_pairs:
        _search(network, bounds, found, deadline, most_pairs)
    if found.optimal or time.monotonic() > deadline:
        return True
    bounds.fix(network, _gap(network, bounds, found))
    reduce_network(network, deadline)
    if not network.costs:
        found.optimal = _update(network, found, {})
    return found.optimal


def _search(
    network: ReducedNetwork, bounds: MinMarginals, found: FixingResult, deadline: float, most_pairs: float
) -> None:
    """Look for a better choice within about so many pairs, those that cost least, or more if there is none."""
    while time.monotonic() < deadline:
        gap, within = _gap(network, bounds, found), bounds.gap_for(most_pairs)
        complete = within >= gap
        small = network.restricted({})
        bounds.fix(small, min(gap, within))
        now = time.monotonic()
        try:
            reduce_network(small, deadline)
            until = deadline if complete else now + _FIRST_SHARE * (deadline - now)
            target = bounds.lower_bound / (1 - found.tolerance) if found.tolerance else -np.inf
            result = IntegerProgram(small, found.times).solve(until, target) if small.costs else None
        except InfeasiblePlanError:
            if complete:
                raise
            most_pairs *= 2
            continue
        choice = {} if result is None else result.choice
        fits = choice is not None and _update(network, found, small.expand(choice))
        if result is None or result.optimal:  # what is not among these costs more than ``within`` above the bound
            found.optimal = fits and (complete or found.cost - bounds.lower_bound <= within)
        elif complete:
            found.lower_bound = max(found.lower_bound, result.lower_bound)
        return


def _gap(network: ReducedNetwork, bounds: MinMarginals, found: FixingResult) -> float:
    """What a choice that is better by more than the tolerance costs above the lower bound at most."""
    allowed = found.tolerance * found.cost if math.isfinite(found.cost) else 0.0
    return found.cost - bounds.lower_bound - max(allowed, UNIT_GAP if network.whole else 0.0)


def _update(network: ReducedNetwork, found: FixingResult, choice: dict[int, int]) -> bool:
    """Make a choice the incumbent if it fits and costs less; whether it fits."""
    cost = network.cost(choice)
    fits = network.fits(choice)
    if fits and cost < found.cost:
        found.choice, found.cost = network.expand(choice), cost
    return fits
