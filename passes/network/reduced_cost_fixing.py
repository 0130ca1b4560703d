"""One program after the other, each narrower: what costs more than a known choice leaves the network.

The relaxation's prices say what every strategy and pair costs at least. Those that cost little above the bound are few, and
among them a good choice is soon found, often the best one; what costs more than that choice is dropped, and the reductions
begin anew. What is left is a small program, or none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.milp import UNIT_GAP, IntegerProgram, is_gap_closed
from bactrian.passes.network.min_marginals import Marginals, Prices
from bactrian.passes.network.reductions import ReducedNetwork
from bactrian.passes.network.trws import first_prices

_FIRST_PAIRS = 4000  # of the first program; twice as many where it has no choice
_FEW_PAIRS = 8000  # a program of its own, whatever they cost
_FIRST_SHARE = 0.3  # of the time that is left, at most, for a program that can prove nothing
_WORTH = 0.7  # of the pairs: where more are left after dropping, the next program is of all that are left
_MOST_ROUNDS = 6


@dataclass
class Narrowed:
    """``choice`` by node of the problem, if one was found, and its ``cost``; no allowed choice costs less than that and the
    ``bound``; ``optimal``: proved; ``times`` at which there are memory rows."""

    choice: dict[int, int] | None
    cost: float
    bound: float
    optimal: bool = False
    times: Sequence[int] = ()


def solve_narrowing(
    network: ReducedNetwork,
    deadline: float,
    choice: dict[int, int] | None = None,
    cost: float = np.inf,
) -> Narrowed:
    """The best choice, or what was found until the deadline (`time.monotonic`).

    Args:
        network: reduced, with something to choose. Loses what no better choice than the one found contains.
        deadline: not passed by much.
        choice: one that is known, by node of the problem.
        cost: of it.

    Raises:
        InfeasiblePlanError: no choice is allowed.
    """
    found = Narrowed(choice, cost, network.constant)
    before = np.inf
    try:
        for number in range(_MOST_ROUNDS):
            few = network.num_pairs <= _FEW_PAIRS or network.num_pairs > _WORTH * before
            before = network.num_pairs
            if number == 0 and not few:
                prices, before = first_prices(network, deadline), np.inf
                found.times = [network.memory.times[place] for place in prices.memory]
                done = _narrow(network, prices, found, deadline, _FIRST_PAIRS)
            else:
                done = _relax(network, found, deadline, np.inf if few else _FIRST_PAIRS)
            if done:
                break
    except InfeasiblePlanError:  # nothing is better than the best
        if found.choice is None:
            raise
        found.optimal = True
    return found


def _relax(network: ReducedNetwork, found: Narrowed, deadline: float, most_pairs: float) -> bool:
    """A round with the prices of the relaxation; whether the best choice is proved, or time is up."""
    program = IntegerProgram(network, found.times)
    relaxed = program.relax(deadline)
    found.bound, found.times = max(found.bound, relaxed.bound), program.times
    if relaxed.choice is not None:
        fits = _take(network, found, relaxed.choice)
        found.optimal = fits and program.is_exact and is_gap_closed(network, found.cost, found.bound)
    if found.optimal or relaxed.prices is None:
        return True
    return _narrow(network, relaxed.prices, found, deadline, 0 if relaxed.choice is not None else most_pairs)


def _narrow(network: ReducedNetwork, prices: Prices, found: Narrowed, deadline: float, most_pairs: float) -> bool:
    """Look for a choice among so many pairs, if any, and drop what costs more; whether that was all to be done."""
    marginals = Marginals(network, prices)
    found.bound = max(found.bound, marginals.bound)
    if most_pairs:
        _search(network, marginals, found, deadline, most_pairs)
    if found.optimal or time.monotonic() > deadline:
        return True
    marginals.drop(network, _gap(network, marginals, found))
    network.reduce(deadline)
    if not network.costs:
        found.optimal = _take(network, found, {})
    return found.optimal


def _search(network: ReducedNetwork, marginals: Marginals, found: Narrowed, deadline: float, most_pairs: float) -> None:
    """Look for a better choice within about so many pairs, those that cost least, or more if there is none."""
    while time.monotonic() < deadline:
        gap, within = _gap(network, marginals, found), marginals.gap_of(most_pairs)
        complete = within >= gap
        small = network.restricted({})
        marginals.drop(small, min(gap, within))
        now = time.monotonic()
        try:
            small.reduce(deadline)
            until = deadline if complete else now + _FIRST_SHARE * (deadline - now)
            outcome = IntegerProgram(small, found.times).solve(until) if small.costs else None
        except InfeasiblePlanError:
            if complete:
                raise
            most_pairs *= 2
            continue
        choice = {} if outcome is None else outcome.choice
        fits = choice is not None and _take(network, found, small.expand(choice))
        if outcome is None or outcome.optimal:  # what is not among these costs more than ``within`` above the bound
            found.optimal = fits and (complete or found.cost - marginals.bound <= within)
        elif complete:
            found.bound = max(found.bound, outcome.bound)
        return


def _gap(network: ReducedNetwork, marginals: Marginals, found: Narrowed) -> float:
    """What a better choice than the one found costs above the bound at most."""
    return found.cost - marginals.bound - (UNIT_GAP if network.whole else 0.0)


def _take(network: ReducedNetwork, found: Narrowed, choice: dict[int, int]) -> bool:
    """Keep a choice if it fits and costs less; whether it fits."""
    cost = network.cost(choice)
    fits = network.limit is None or not (network.memory.profile(choice) > network.limit).any()
    if fits and cost < found.cost:
        found.choice, found.cost = network.expand(choice), cost
    return fits
