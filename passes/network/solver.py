"""Solve a cost network: reduce it exactly, solve what is left, and say how good the answer is.

The order of attempts, each on the network that the ones before have left:

1. exact reductions (``reductions.py``);
2. the same without the memory limit, where that makes the network much smaller: an optimum that fits is the optimum;
3. bucket elimination, where the network is nearly a tree and has no limit (``bucket_elimination.py``);
4. the lifted linear program, where layers repeat (``lifted_lp.py``), and tied classes (``tied_classes.py``);
5. integer programs with reduced-cost fixing (``reduced_cost_fixing.py``), or for networks too large for a program message
   passing and large neighbourhood search (``large_neighbourhood.py``);
6. local search, where no program gave a feasible choice in time (``local_search.py``).

The time limit is wall-clock time, and each attempt has a share of it. Where none reaches its share, everything but 5's
neighbourhoods is deterministic: the same problem gives the same choice. Where time ends an attempt, a slower machine may
return another choice, with a lower bound of its own.

``docs/solver.md`` has the formulation and the proofs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.processes import Workers
from bactrian.passes.network.bucket_elimination import elimination_order, solve_by_elimination
from bactrian.passes.network.local_search import LocalSearch
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduced_network import ReducedNetwork, nothing_combines
from bactrian.passes.network.reductions import reduce_network

_REDUCTION_SHARE = 0.5  # of the time, at most
_UNLIMITED_SHARE = 0.25  # of the time, at most, for a first try without the memory limit
_UNLIMITED_PAIRS = 0.8  # it is made if that leaves at most this part of the pairs
_UNLIMITED_MEMORY = 0.7  # and if the leanest strategies fill at most this part of the limit
_LIFTED_SHARE = 0.5  # of the time, at most, for classes of nodes that look alike
_TIED_SHARE = 0.5  # of the time that is left, at most, for a choice that is the same for nodes that look alike
_MOST_PROGRAM_PAIRS = 400_000  # more don't go into one program: its relaxation alone would take minutes
_ROUNDING = 1e-9  # of a cost
_SEARCH_SHARE = 0.15  # of the time, kept for a local search where the programs have given no choice


@dataclass(frozen=True)
class Solution:
    """An answer with its proof.

    Attributes:
        choice: the strategy of each node.
        cost: its exact cost.
        lower_bound: no feasible choice costs less.
        optimal: whether it is proved that none costs less than this one: for integers exactly (as far as floating point proves anything;
            never where their sums leave 2^53), for other costs up to 1e-9 of the cost that a choice can save.
        memory: its peak: the most that it holds at any program point.
        seconds: of the whole solve.
        figures: sizes on the way, for reports.
    """

    choice: tuple[int, ...]
    cost: int | float
    lower_bound: float
    optimal: bool
    memory: int | float
    seconds: float
    figures: dict[str, int]

    def is_near(self, tolerance: float) -> bool:
        """Whether it is proved to be within a tolerance, a part of its cost, of the cheapest choice."""
        return self.optimal or self.cost * (1 - tolerance) <= self.lower_bound + _ROUNDING * abs(self.cost)


def solve(problem: CostNetwork, time_limit: float = 60.0, tolerance: float = 0.0) -> Solution:
    """The cheapest choice within the memory limit, or the best one found in time.

    Args:
        problem: is not changed.
        time_limit: seconds; see the module's documentation for what depends on it.
        tolerance: the part of its cost by which a choice may be above the cheapest: a lower bound that is as near ends the
            search.

    Raises:
        InfeasiblePlanError: there is no feasible choice.
        ConfigError: none was found in time.
    """
    begin = time.monotonic()
    network = ReducedNetwork(problem)
    reduce_network(network, begin + _REDUCTION_SHARE * time_limit)
    attempt = _Attempt(problem, network, begin, time_limit, tolerance)
    unlimited = _solve_unlimited(problem, network, begin + _UNLIMITED_SHARE * time_limit)
    if unlimited is not None and unlimited.proved and problem.is_feasible(unlimited.choice or ()):
        attempt = unlimited
    else:
        choice = None if unlimited is None else unlimited.choice
        attempt.run(problem.fullest(choice or problem.leanest()))
    return replace(attempt.solution(), seconds=time.monotonic() - begin)


class Solved:
    """Networks that are solved, for equal ones, and for those that differ from them in memory alone."""

    def __init__(self) -> None:
        self._by_costs: dict[bytes, list[tuple[CostNetwork, Solution]]] = {}
        self._unproved = list[tuple[CostNetwork, Solution]]()

    def solve(self, problems: Sequence[CostNetwork], time_limit: float, tolerance: float, workers: Workers) -> None:
        """Solve problems, those of equal costs in their order, as far as what is found for one is not good for the next.

        Args:
            problems, time_limit, tolerance: as of `solve`. A problem for which no choice is found in time is left out.
            workers: solve problems of different costs at once.

        Raises:
            InfeasiblePlanError: one of them has no feasible choice.
        """
        waiting: dict[bytes, list[CostNetwork]] = {}
        for problem in problems:
            waiting.setdefault(problem.costs_digest, []).append(problem)
        attempt = partial(_solve_in_time, time_limit=time_limit, tolerance=tolerance)
        while any(waiting.values()):
            asked = list[CostNetwork]()
            for alike in waiting.values():
                while alike and (self.find(alike[0], tolerance) or self.unproved(alike[0])):
                    alike.pop(0)
                if alike:
                    asked.append(alike.pop(0))
            asked.sort(key=lambda problem: -problem.num_strategies)  # what takes longest first
            for problem, solution in zip(asked, workers.map(attempt, asked), strict=True):
                if solution is not None and solution.is_near(tolerance):
                    self.add(problem, solution)
                elif solution is not None:
                    self._unproved.append((problem, solution))

    def find(self, problem: CostNetwork, tolerance: float = 0.0) -> Solution | None:
        """The optimum, up to a tolerance, of a network that allows whatever this one allows, if it fits here too: nothing is
        cheaper here. Of an equal network whatever was added."""
        for known, solution in self._by_costs.get(problem.costs_digest, ()):
            if not problem.is_tighter_than(known) or not problem.is_feasible(solution.choice):
                continue
            if solution.is_near(tolerance) or known.is_tighter_than(problem):
                return replace(solution, memory=problem.peak(solution.choice), seconds=0.0)
        return None

    def unproved(self, problem: CostNetwork) -> Solution | None:
        """What `solve` has found for an equal network, if it is not near enough to its bound."""
        digest = problem.costs_digest if self._unproved else b""
        for known, solution in self._unproved:
            if known.costs_digest == digest and problem.is_tighter_than(known) and known.is_tighter_than(problem):
                return solution
        return None

    def add(self, problem: CostNetwork, solution: Solution) -> None:
        """Keep a solution: nothing better is looked for."""
        self._by_costs.setdefault(problem.costs_digest, []).append((problem, solution))


def _solve_in_time(problem: CostNetwork, time_limit: float, tolerance: float) -> Solution | None:
    try:
        return solve(problem, time_limit, tolerance)
    except ConfigError:
        return None


class _Attempt:
    """One network on the way to its answer.

    Attributes:
        choice: the incumbent, in the order of the problem's nodes.
        lower_bound: on the cost of all feasible choices.
        proved: the incumbent is optimal, as far as numbers are exact.
    """

    def __init__(
        self, problem: CostNetwork, network: ReducedNetwork, begin: float, time_limit: float, tolerance: float = 0.0
    ) -> None:
        self.problem, self.network = problem, network
        self.begin, self.time_limit, self.tolerance = begin, time_limit, tolerance
        self.choice: list[int] | None = None
        self.lower_bound, self.proved = network.constant, False
        self.figures = {
            "nodes": len(problem.costs),
            "strategies": problem.num_strategies,
            "nodes left": len(network.costs),
            "strategies left": network.num_strategies,
            "pairs left": network.num_pairs,
            "memory rows": 0,
        }

    def run(self, times: Sequence[int] = (), *, only_proved: bool = False) -> None:
        """Find an answer.

        Args:
            times: program points at which memory is likely to bind.
            only_proved: not by heuristics that prove nothing.
        """
        network = self.network
        if not network.costs:
            self.proved = self._update(network.expand({}))
            return
        order = elimination_order(network) if network.limit is None else None
        if order is not None:
            found = solve_by_elimination(network, order)
            if found is None:
                raise nothing_combines()
            self.proved = self._update(network.expand(found))
            return
        self._solve_lifted(times)
        if self.proved or self._is_near:
            return
        if self.choice is None and not only_proved:
            self._solve_tied()
        if network.num_pairs <= _MOST_PROGRAM_PAIRS:
            self._solve_by_fixing()
        elif not only_proved:
            self._search_neighbourhoods()

    def solution(self) -> Solution:
        """The answer.

        Raises:
            ConfigError: there is none.
        """
        if self.choice is None:
            raise ConfigError(
                f"no feasible choice was found in {self.time_limit:g} s",
                why=f"the network has {self.network.num_strategies:,} strategies and {self.network.num_pairs:,} pairs left",
                fix="raise the time limit; the problem may still be feasible",
            )
        cost = self.problem.cost(self.choice)
        proved = self.proved and self.network.is_exact
        return Solution(
            choice=tuple(self.choice),
            cost=cost,
            lower_bound=float(cost) if proved else min(float(self.lower_bound), float(cost)),
            optimal=proved,
            memory=self.problem.peak(self.choice),
            seconds=0.0,
            figures=self.figures,
        )

    @property
    def _is_near(self) -> bool:
        """Whether the incumbent is as near to the lower bound as it must be."""
        if self.choice is None or not self.tolerance:
            return False
        return self.problem.cost(self.choice) * (1 - self.tolerance) <= self.lower_bound

    @property
    def _deadline(self) -> float:
        return self.begin + self.time_limit

    def _update(self, found: Mapping[int, int]) -> bool:
        """Make a feasible choice the incumbent if it costs less; whether it is feasible."""
        choice = [found[node] for node in sorted(found)]
        if not self.problem.is_feasible(choice):
            return False
        if self.choice is None or self.problem.cost(choice) < self.problem.cost(self.choice):
            self.choice = choice
        return True

    def _solve_lifted(self, times: Sequence[int]) -> None:
        from bactrian.passes.network.lifted_lp import solve_lifted  # imports a solver

        lifted = solve_lifted(self.network, self.begin + _LIFTED_SHARE * self.time_limit, times, self.tolerance)
        if lifted is None:
            return
        self.lower_bound = lifted.lower_bound
        self.figures["classes"] = lifted.num_classes
        self.proved = lifted.choice is not None and self._update(lifted.choice) and lifted.optimal

    def _solve_tied(self) -> None:
        from bactrian.passes.network.tied_classes import solve_tied

        now = time.monotonic()
        found = solve_tied(self.network, now + _TIED_SHARE * (self._deadline - now))
        if found is not None:
            self._update(found)

    def _solve_by_fixing(self) -> None:
        from bactrian.passes.network.reduced_cost_fixing import solve_by_fixing

        until = self._deadline - _SEARCH_SHARE * self.time_limit
        best = None if self.choice is None else dict(enumerate(self.choice))
        cost = np.inf if self.choice is None else float(self.problem.cost(self.choice))
        found = solve_by_fixing(self.network, until, best, cost, self.tolerance)
        self.lower_bound = max(self.lower_bound, found.lower_bound)
        self.figures["memory rows"] = len(found.times)
        if found.choice is not None:
            self.proved = self._update(found.choice) and found.optimal and not self.tolerance
            if found.optimal:
                self.lower_bound = max(self.lower_bound, found.cost * (1 - self.tolerance))
        if self.choice is None and (choice := LocalSearch(self.network).search(self._deadline)) is not None:
            self._update(self.network.expand(choice))

    def _search_neighbourhoods(self) -> None:
        from bactrian.passes.network.large_neighbourhood import search

        found = search(self.network, self._deadline)
        self.lower_bound = max(self.lower_bound, found.lower_bound)
        self.figures |= {"sweeps": found.sweeps, "neighbourhoods": found.neighbourhoods}
        if found.choice is not None:
            self._update(self.network.expand(found.choice))


def _solve_unlimited(problem: CostNetwork, network: ReducedNetwork, deadline: float) -> _Attempt | None:
    """The optimum without the memory limit: if it keeps the limit, it is the optimum with it.

    Without memory, nodes with few edges can be eliminated that otherwise have to stay; None where that gains little, or where
    the leanest strategies fill so much that what is cheapest will hardly fit.
    """
    if network.limit is None or not network.costs:
        return None
    if problem.least_peak() > _UNLIMITED_MEMORY * network.limit:
        return None
    now = time.monotonic()
    smaller = network.unlimited()
    reduce_network(smaller, deadline)
    if time.monotonic() > deadline:
        return None
    if smaller.num_pairs > _UNLIMITED_PAIRS * network.num_pairs and elimination_order(smaller) is None:
        return None
    attempt = _Attempt(replace(problem, limit=None), smaller, now, deadline - now)
    attempt.run(only_proved=True)
    return attempt
