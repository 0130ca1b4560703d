"""Large neighbourhood search (Shaw, "Using constraint programming and local search methods to solve vehicle routing
problems", CP 1998), for networks that are too large for one integer program.

Message passing (``trws.py``) gives a lower bound and decodes first choices. The best of them is the incumbent, which is then
improved by exact searches: the nodes of a neighbourhood are free, all others keep their strategies, and an integer program
solves what is left. Nothing proves the result but the bound of the messages. How far the search gets depends on the clock and
the processor, so that two runs may end with different choices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.machine.host_cores import num_cores
from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.local_search import LocalSearch
from bactrian.passes.network.milp import IntegerProgram
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import forbid, reduce_network
from bactrian.passes.network.trws import SWEEPS_PER_CHOICE, MemoryMultipliers, MessagePassing

_SWEEPS_PER_REPAIR = 9
_NEAR = 1.05  # a choice that costs at most so much more than the incumbent is worth improving
_MESSAGES_SHARE = 0.4  # of the time; the rest is for neighbourhoods
_POLISH_SECONDS = 5.0
_ROUNDING = 1e-9  # of a bound, which is a sum of many rounded numbers
_FREE_PAIRS = 60_000  # pairs of a neighbourhood's first program; grows and shrinks with what it takes
_NEIGHBOURHOOD_SECONDS = 8.0
_MOST_WORKERS = 4  # what is between their programs is Python, which only one of them runs at a time
_SHARES = (0.3, 0.1, 1.0)  # of the gap: the reduced cost that a strategy of a neighbourhood may have, in turn


@dataclass
class SearchResult:
    """What was found in the time.

    Attributes:
        choice: the incumbent, for the network's nodes; None if no feasible choice was found.
        cost: of it, infinite without one.
        lower_bound: no choice within the memory limit costs less.
        sweeps, neighbourhoods: how much was tried.
    """

    choice: dict[int, int] | None
    cost: float
    lower_bound: float
    sweeps: int = 0
    neighbourhoods: int = 0


def search(network: ReducedNetwork, deadline: float) -> SearchResult:
    """The best choice and the best lower bound that the time until the deadline (`time.monotonic`) gives.

    Args:
        network: reduced. Loses strategies without an allowed partner.
        deadline: may be passed by the time that building a neighbourhood takes.
    """
    begin = time.monotonic()
    forbid(network)  # then every strategy has an allowed partner, and messages are finite
    found = SearchResult(None, np.inf, -np.inf)
    local = LocalSearch(network)
    reduced_costs = _pass_messages(network, found, local, begin + _MESSAGES_SHARE * (deadline - begin))
    found.lower_bound -= _ROUNDING * abs(found.lower_bound)
    if found.choice is None:
        found.choice = local.search(deadline)
        if found.choice is None:
            return found
        found.cost = network.cost(found.choice)
    NeighbourhoodSearch(network, found, reduced_costs, deadline).run(min(_MOST_WORKERS, num_cores()))
    return found


def _pass_messages(
    network: ReducedNetwork, found: SearchResult, local: LocalSearch, deadline: float
) -> dict[int, Array]:
    """Sweep, decode and update multipliers until the deadline; returns the last reduced costs of all strategies."""
    messages, memory = MessagePassing(network), MemoryMultipliers(network)
    while time.monotonic() < deadline:
        found.sweeps += 1
        found.lower_bound = max(found.lower_bound, messages.sweep())
        if found.sweeps % SWEEPS_PER_CHOICE:
            continue
        choice = messages.decode()
        cost, profile = network.cost(choice), network.memory.profile(choice)
        if network.limit is not None:
            memory.update(profile, cost)
            messages.set_multipliers(memory.values)
        if not network.profile_fits(profile):
            if found.sweeps % _SWEEPS_PER_REPAIR:
                continue
            choice = messages.decode_within_limit() or choice
            cost = network.cost(choice)
        if cost < found.cost * _NEAR and cost != found.cost and network.fits(choice):
            local.polish(choice, min(deadline, time.monotonic() + _POLISH_SECONDS))
            cost = network.cost(choice)
            if cost < found.cost:
                found.choice, found.cost = choice, cost
    return messages.reduced_costs()


class NeighbourhoodSearch:
    """Frees one neighbourhood after the other and solves it as well as a few seconds allow; several at once in threads.

    A neighbourhood grows around a node that pays much more than its best strategy would. What a thread finds is combined
    with what others have found since it began, and replaces the incumbent if the whole fits and costs less.
    """

    def __init__(
        self, network: ReducedNetwork, found: SearchResult, reduced_costs: Mapping[int, Array], deadline: float
    ) -> None:
        self._network, self._found, self._reduced_costs = network, found, reduced_costs
        self._deadline = deadline
        self._random = np.random.default_rng(0)
        self._nodes = sorted(network.costs)
        self._pairs = float(_FREE_PAIRS)
        self._lock = threading.Lock()

    def run(self, workers: int) -> None:
        """Until the deadline, or until the incumbent is proved optimal."""
        if workers == 1:
            self._work()
            return
        with ThreadPoolExecutor(workers) as pool:
            for each in [pool.submit(self._work) for _ in range(workers)]:
                each.result()

    def _work(self) -> None:
        while self._deadline - time.monotonic() > 1.0 and self._found.cost > self._found.lower_bound:
            now = time.monotonic()
            with self._lock:
                free, keep = self._next()
            better = _best_within(self._network, keep, min(self._deadline, now + _NEIGHBOURHOOD_SECONDS))
            with self._lock:
                self._adapt(time.monotonic() - now)
                if better is not None:
                    self.take({node: better[node] for node in free})

    def _next(self) -> tuple[set[int], dict[int, Array]]:
        """The nodes of a neighbourhood, and the strategies that each node of the network keeps."""
        found, choice = self._found, self._found.choice
        assert choice is not None
        gap = found.cost - found.lower_bound
        paid = np.array([min(float(self._reduced_costs[node][choice[node]]), gap) for node in self._nodes])
        chances = paid + (paid.mean() if paid.any() else 1.0)
        seed = self._nodes[int(self._random.choice(len(self._nodes), p=chances / chances.sum()))]
        most = _SHARES[found.neighbourhoods % len(_SHARES)] * gap
        found.neighbourhoods += 1
        likely = {
            node: np.union1d(np.flatnonzero(self._reduced_costs[node] <= most), [k]) for node, k in choice.items()
        }
        free = _neighbourhood(self._network, seed, likely, self._pairs)
        return free, {node: likely[node] if node in free else np.array([k]) for node, k in choice.items()}

    def _adapt(self, took: float) -> None:
        """Larger neighbourhoods where they are solved at once, smaller ones where time is up."""
        fast, slow = took < _NEIGHBOURHOOD_SECONDS / 4, took > 0.9 * _NEIGHBOURHOOD_SECONDS
        self._pairs *= 1.2 if fast else 0.6 if slow else 1.0

    def take(self, part: Mapping[int, int]) -> None:
        """Change the incumbent for some nodes, if all of it together fits and costs less."""
        assert self._found.choice is not None
        choice = {**self._found.choice, **part}
        cost = self._network.cost(choice)
        if cost < self._found.cost and self._network.fits(choice):
            self._found.choice, self._found.cost = choice, cost


def _neighbourhood(network: ReducedNetwork, seed: int, likely: Mapping[int, Array], most: float) -> set[int]:
    """The nodes nearest to one, so many that the pairs of their likely strategies come to a number."""
    chosen, total = set[int](), 0.0
    for node in _by_distance(network, seed):
        count = len(likely[node])
        total += sum(count * len(likely[other]) for other in network.neighbours[node] if other in chosen)
        chosen.add(node)
        if total > most:
            break
    return chosen


def _by_distance(network: ReducedNetwork, seed: int) -> Iterator[int]:
    """The nodes that are connected with one, breadth first."""
    seen, front = {seed}, [seed]
    while front:
        yield from front
        following = list[int]()
        for node in front:
            for other in network.neighbours[node]:
                if other not in seen:
                    seen.add(other)
                    following.append(other)
        front = following


def _best_within(network: ReducedNetwork, keep: Mapping[int, Array], deadline: float) -> dict[int, int] | None:
    """A choice among some strategies of each node, the best one if there is time; None if none was found."""
    try:
        small = network.restricted(keep)
        reduce_network(small, deadline)
        if not small.costs:
            return small.expand({})
        result = IntegerProgram(small).solve(deadline)
    except InfeasiblePlanError:
        return None
    return None if result.choice is None else small.expand(result.choice)
