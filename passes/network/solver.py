"""Solve a cost network: reduce it, solve what is left, and say how good the answer is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.network.bucket_elimination import elimination_order, solve_by_tables
from bactrian.passes.network.local_search import LocalSearch
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reductions import ReducedNetwork, nothing_combines

_REDUCTION_SHARE = 0.5  # of the time, at most
_RELAXED_SHARE = 0.25  # of the time, at most, for a first try without the memory limit
_RELAXED_PAIRS = 0.8  # it is made if that leaves less than this part of the pairs
_LIFTED_SHARE = 0.5  # of the time, at most, for classes of nodes that look alike
_TIED_SHARE = 0.5  # of the time that is left, at most, for a choice that is the same for nodes that look alike
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
    begin = time.monotonic()
    network = ReducedNetwork(problem)
    network.reduce(begin + _REDUCTION_SHARE * time_limit)
    attempt = _Attempt(problem, network, begin, time_limit)
    relaxed = _relaxed(problem, network, begin + _RELAXED_SHARE * time_limit)
    if relaxed is not None and relaxed.proved and problem.is_allowed(relaxed.choice or ()):
        attempt = relaxed
    else:
        attempt.run()
    return replace(attempt.solution(), seconds=time.monotonic() - begin)


class _Attempt:
    """One network on the way to its answer.

    Attributes:
        choice: the best allowed one that was found, in the order of the problem's nodes.
        bound: on the cost of all.
        proved: the choice is the best one, as far as numbers are exact.
    """

    def __init__(self, problem: CostNetwork, network: ReducedNetwork, begin: float, time_limit: float) -> None:
        self.problem, self.network = problem, network
        self.begin, self.time_limit = begin, time_limit
        self.choice: list[int] | None = None
        self.bound, self.proved = network.constant, False
        self.figures = {
            "nodes": len(problem.costs),
            "strategies": problem.num_strategies,
            "nodes left": len(network.costs),
            "strategies left": network.num_strategies,
            "pairs left": network.num_pairs,
            "memory rows": 0,
        }

    def run(self, *, only_proved: bool = False) -> None:
        """Find an answer; with ``only_proved`` not by a long search for a good one without proof."""
        network = self.network
        if not network.costs:
            self.proved = self._take(network.expand({}))
            return
        order = elimination_order(network) if network.limit is None else None
        if order is not None:
            found = solve_by_tables(network, order)
            if found is None:
                raise nothing_combines()
            self.proved = self._take(network.expand(found))
            return
        self._by_classes()
        if self.proved:
            return
        if self.choice is None and not only_proved:
            self._by_ties()
        if network.num_pairs <= _PROGRAM_PAIRS:
            self._by_programs()
        elif not only_proved:
            self._by_search()

    def solution(self) -> Solution:
        """The answer.

        Raises:
            ConfigError: there is none.
        """
        if self.choice is None:
            raise ConfigError(
                f"no allowed choice was found in {self.time_limit:g} s",
                why=f"the network has {self.network.num_strategies:,} strategies and {self.network.num_pairs:,} pairs left",
                fix="give it more time; whether there is one is not known",
            )
        cost = self.problem.cost(self.choice)
        proved = self.proved and self.network.is_exact
        return Solution(
            choice=tuple(self.choice),
            cost=cost,
            bound=float(cost) if proved else min(float(self.bound), float(cost)),
            optimal=proved,
            memory=self.problem.peak(self.choice),
            seconds=0.0,
            figures=self.figures,
        )

    @property
    def _deadline(self) -> float:
        return self.begin + self.time_limit

    def _take(self, found: Mapping[int, int]) -> bool:
        """Keep a choice that is allowed, if it is the cheapest; whether it is allowed."""
        choice = [found[node] for node in sorted(found)]
        if not self.problem.is_allowed(choice):
            return False
        if self.choice is None or self.problem.cost(choice) < self.problem.cost(self.choice):
            self.choice = choice
        return True

    def _by_classes(self) -> None:
        from bactrian.passes.network.lifted_lp import solve_lifted  # imports a solver

        lifted = solve_lifted(self.network, self.begin + _LIFTED_SHARE * self.time_limit)
        if lifted is None:
            return
        self.bound = lifted.bound
        self.figures["classes"] = lifted.num_classes
        self.proved = lifted.choice is not None and self._take(lifted.choice) and lifted.optimal

    def _by_ties(self) -> None:
        from bactrian.passes.network.tied_classes import solve_tied

        now = time.monotonic()
        found = solve_tied(self.network, now + _TIED_SHARE * (self._deadline - now))
        if found is not None:
            self._take(found)

    def _by_programs(self) -> None:
        from bactrian.passes.network.reduced_cost_fixing import solve_narrowing

        until = self._deadline - _SEARCH_SHARE * self.time_limit
        best = None if self.choice is None else dict(enumerate(self.choice))
        cost = np.inf if self.choice is None else float(self.problem.cost(self.choice))
        found = solve_narrowing(self.network, until, best, cost)
        self.bound = max(self.bound, found.bound)
        self.figures["memory rows"] = len(found.times)
        if found.choice is not None:
            self.proved = self._take(found.choice) and found.optimal
        if self.choice is None and (simple := LocalSearch(self.network).search(self._deadline)) is not None:
            self._take(self.network.expand(simple))

    def _by_search(self) -> None:
        from bactrian.passes.network.trws import search

        found = search(self.network, self._deadline)
        self.bound = max(self.bound, found.bound)
        self.figures |= {"sweeps": found.sweeps, "neighbourhoods": found.neighbourhoods}
        if found.choice is not None:
            self._take(self.network.expand(found.choice))


def _relaxed(problem: CostNetwork, network: ReducedNetwork, deadline: float) -> _Attempt | None:
    """The answer without the memory limit: if it keeps the limit, nothing that does can cost less.

    Without memory, nodes with few edges can be eliminated that otherwise have to stay; None where that gains little.
    """
    if network.limit is None or not network.costs:
        return None
    now = time.monotonic()
    smaller = network.unlimited()
    smaller.reduce(deadline)
    if time.monotonic() > deadline:
        return None
    if smaller.num_pairs > _RELAXED_PAIRS * network.num_pairs and elimination_order(smaller) is None:
        return None
    attempt = _Attempt(replace(problem, limit=None), smaller, now, deadline - now)
    attempt.run(only_proved=True)
    return attempt
