"""Bounds and choices for networks too large for one program: messages between nodes, prices on memory, large neighbourhoods.

Messages are those of TRW-S (Kolmogorov, *Convergent tree-reweighted message passing for energy minimization*, 2006): nodes
in one order, then in the other, each hands its neighbours what it costs them, and the sum of what is certain is a bound.
Memory is a Lagrangian: places where choices hold too much get a price. The best choice that was decoded is then improved by
exact searches (Shaw's large neighbourhood search, 1998): a part of the nodes is free, all others keep what they have.
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
from bactrian.passes.network.local_search import LocalSearch
from bactrian.passes.network.milp import IntegerProgram
from bactrian.passes.network.min_marginals import Prices
from bactrian.passes.network.reductions import Array, ReducedNetwork

_SWEEPS_PER_CHOICE = 3
_FIRST_SWEEPS = 60  # where programs follow
_LAST_SWEEPS = 15  # of these, with the same prices
_SMALL_STEP = 1e-6  # of the bound: where a sweep gains less, the next ones will too
_MOST_PRICES = 30  # places with a price
_SWEEPS_PER_REPAIR = 9
_FIRST_STEP = 0.05  # of the cost, for all of the memory
_ABOVE = 1.05  # a choice that costs so much more than the best is worth a look
_MESSAGES_SHARE = 0.4  # of the time; the rest is for neighbourhoods
_POLISH_SECONDS = 5.0
_ROUNDING = 1e-9  # of a bound, which is a sum of many rounded numbers
_FREE_PAIRS = 60_000  # pairs of a neighbourhood's first program; grows and shrinks with what it takes
_NEIGHBOURHOOD_SECONDS = 8.0
_MOST_WORKERS = 4  # what is between their programs is Python, which only one of them runs at a time
_SHARES = (0.3, 0.1, 1.0)  # of the gap: what a strategy may cost above the best of its node, in turn


@dataclass
class Found:
    """What was found in the time.

    Attributes:
        choice: the best allowed one for the network's nodes; None if there was none.
        cost: of it, infinite without one.
        bound: no choice within the memory limit costs less.
        sweeps, neighbourhoods: how much was tried.
    """

    choice: dict[int, int] | None
    cost: float
    bound: float
    sweeps: int = 0
    neighbourhoods: int = 0


class Messages:
    """The messages of a network under prices of memory."""

    def __init__(self, network: ReducedNetwork) -> None:
        self._network = network
        self._nodes = sorted(network.costs)
        number = {node: place for place, node in enumerate(self._nodes)}
        self._own = [network.costs[node] for node in self._nodes]
        self._priced = self._own
        self._later: list[list[int]] = [[] for _ in self._nodes]  # edges to later nodes
        self._earlier: list[list[int]] = [[] for _ in self._nodes]
        self._ends: list[tuple[int, int]] = []
        self._forth: list[Array] = []  # strategies of the later end as rows
        self._back: list[Array] = []
        for (i, j), matrix in sorted(network.pairs.items()):
            first, second = number[i], number[j]
            if first > second:
                first, second, matrix = second, first, network.arrays.turned(matrix)
            self._later[first].append(len(self._ends))
            self._earlier[second].append(len(self._ends))
            self._ends.append((first, second))
            self._forth.append(np.ascontiguousarray(matrix.T))
            self._back.append(np.ascontiguousarray(matrix))
        self._to_later = [np.zeros(len(matrix)) for matrix in self._forth]
        self._to_earlier = [np.zeros(len(matrix)) for matrix in self._back]
        self._share = [
            1.0 / max(len(later), len(earlier), 1) for later, earlier in zip(self._later, self._earlier, strict=True)
        ]
        self._prices: dict[int, float] = {}
        self._constant = network.constant

    def price(self, prices: Mapping[int, float]) -> None:
        """Set what a unit of memory costs at some places (numbers of ``network.memory.times``)."""
        self._prices = {place: price for place, price in prices.items() if price > 0}
        network = self._network
        if not self._prices:
            self._priced, self._constant = self._own, network.constant
            return
        fixed, limit = network.memory.fixed, float(network.limit or 0)
        self._constant = network.constant + sum(p * (float(fixed[at]) - limit) for at, p in self._prices.items())
        places = np.array(sorted(self._prices))
        total = np.concatenate([[0.0], np.cumsum([self._prices[at] for at in places.tolist()])])
        self._priced = list(self._own)
        for place, node in enumerate(self._nodes):
            for start, end, usage in network.memory.spans(node):
                price = total[np.searchsorted(places, end)] - total[np.searchsorted(places, start)]
                if price:
                    self._priced[place] = self._priced[place] + price * usage

    def sweep(self) -> float:
        """Pass messages to all later nodes, then to all earlier ones; returns a lower bound on the cost."""
        later, earlier = self._to_later, self._to_earlier
        for at, edges in enumerate(self._later):
            if edges:
                ahead = self._share[at] * self._sum(at)
                for edge in edges:
                    message = (self._forth[edge] + (ahead - earlier[edge])).min(axis=1)
                    later[edge] = message - message.min()
        bound = self._constant
        for at in range(len(self._nodes) - 1, -1, -1):
            total = self._sum(at)
            least = total.min()
            bound += float(least)
            back = self._share[at] * (total - least)
            for edge in self._earlier[at]:
                message = (self._back[edge] + (back - later[edge])).min(axis=1)
                least = message.min()
                bound += float(least)
                earlier[edge] = message - least
        return bound

    def decode(self) -> dict[int, int]:
        """Node by node the best beside what earlier ones have taken and what later ones say; memory has its prices only."""
        return self._decoded(None)

    def decode_within(self) -> dict[int, int] | None:
        """The same, and what would not leave room for the leanest choice of all later nodes is not taken.

        None where even the leanest choices don't fit; pairs that are forbidden may make the cost infinite.
        """
        room = float(self._network.limit or 0) - self._network.memory.least
        return None if (room < 0).any() else self._decoded(room)

    def _decoded(self, room: Array | None) -> dict[int, int]:
        chosen = list[int]()
        for at, node in enumerate(self._nodes):
            total = self._priced[at]
            for edge in self._later[at]:
                total = total + self._to_earlier[edge]
            for edge in self._earlier[at]:
                total = total + self._forth[edge][:, chosen[self._ends[edge][0]]]
            spans = self._network.memory.spans(node) if room is not None else []
            if room is None or not spans:
                chosen.append(int(total.argmin()))
                continue
            above = [(start, end, usage - usage.min()) for start, end, usage in spans if np.ptp(usage)]
            fits = np.isfinite(total)
            for start, end, usage in above:
                fits &= usage <= room[start:end].min()
            if not fits.any():
                for _, _, usage in above:
                    fits = fits | (usage == 0)
            k = int(np.where(fits, total, np.inf).argmin())
            for start, end, usage in above:
                room[start:end] -= usage[k]
            chosen.append(k)
        return dict(zip(self._nodes, chosen, strict=True))

    def prices(self) -> Prices:
        """What the last sweep back has moved: its bound is theirs.

        A node that has sent messages to earlier ones has lent each of them its share, which is part of their edges.
        """
        moved = dict[tuple[int, int], tuple[Array, Array]]()
        lent = list[Array]()
        for at in range(len(self._nodes)):
            total = self._sum(at)
            lent.append(self._share[at] * (total - total.min()))
        for edge, (first, second) in enumerate(self._ends):
            ends = self._nodes[first], self._nodes[second]
            to_first, to_second = self._to_earlier[edge], self._to_later[edge] - lent[second]
            moved[min(ends), max(ends)] = (to_first, to_second) if ends[0] < ends[1] else (to_second, to_first)
        return Prices(moved, dict(self._prices))

    def excess(self) -> dict[int, Array]:
        """About what each strategy costs above the best of its node: how likely it is in a good choice."""
        found = dict[int, Array]()
        for at, node in enumerate(self._nodes):
            total = self._sum(at)
            found[node] = total - total.min()
        return found

    def _sum(self, at: int) -> Array:
        total = self._priced[at]
        for edge in self._later[at]:
            total = total + self._to_earlier[edge]
        for edge in self._earlier[at]:
            total = total + self._to_later[edge]
        return total


def search(network: ReducedNetwork, deadline: float) -> Found:
    """The best choice and the best bound that the time until the deadline (`time.monotonic`) gives.

    Args:
        network: reduced.
        deadline: may be passed by a neighbourhood's building.
    """
    begin = time.monotonic()
    network.forbid()  # then every strategy has an allowed partner, and messages are finite
    found = Found(None, np.inf, -np.inf)
    local = LocalSearch(network)
    excess = _pass_messages(network, found, local, begin + _MESSAGES_SHARE * (deadline - begin))
    found.bound -= _ROUNDING * abs(found.bound)
    if found.choice is None:
        found.choice = local.search(deadline)
        if found.choice is None:
            return found
        found.cost = network.cost(found.choice)
    Neighbourhoods(network, found, excess, deadline).run(min(_MOST_WORKERS, num_cores()))
    return found


def first_prices(network: ReducedNetwork, deadline: float) -> Prices:
    """What a few sweeps give, with prices of memory that follow their choices.

    Args:
        network: reduced.
        deadline: of `time.monotonic`.
    """
    messages, prices, bound = Messages(network), _Prices(network), -np.inf
    for number in range(_FIRST_SWEEPS):
        before, bound = bound, messages.sweep()
        if time.monotonic() > deadline:
            break
        if number >= _FIRST_SWEEPS - _LAST_SWEEPS or network.limit is None:
            if bound - before < _SMALL_STEP * abs(bound):
                break
        elif number % _SWEEPS_PER_CHOICE == 0:
            choice = messages.decode()
            prices.adjust(network.memory.profile(choice), network.cost(choice))
            messages.price(prices.now)
    return messages.prices()


def _pass_messages(network: ReducedNetwork, found: Found, local: LocalSearch, deadline: float) -> dict[int, Array]:
    """Sweep, price and decode until the deadline; returns each strategy's excess under the last prices."""
    messages, prices = Messages(network), _Prices(network)
    while time.monotonic() < deadline:
        found.sweeps += 1
        found.bound = max(found.bound, messages.sweep())
        if found.sweeps % _SWEEPS_PER_CHOICE:
            continue
        choice = messages.decode()
        cost, profile = network.cost(choice), network.memory.profile(choice)
        if network.limit is not None:
            prices.adjust(profile, cost)
            messages.price(prices.now)
        if not _fits(network, profile):
            if found.sweeps % _SWEEPS_PER_REPAIR:
                continue
            choice = messages.decode_within() or choice
            cost = network.cost(choice)
        if cost < found.cost * _ABOVE and cost != found.cost and _fits(network, network.memory.profile(choice)):
            local.polish(choice, min(deadline, time.monotonic() + _POLISH_SECONDS))
            cost = network.cost(choice)
            if cost < found.cost:
                found.choice, found.cost = choice, cost
    return messages.excess()


class _Prices:
    """Prices of the places that are over the limit, by resilient steps (Riedmiller and Braun, 1993): longer while a place
    stays on one side of the limit, half as long when it has crossed it."""

    def __init__(self, network: ReducedNetwork) -> None:
        self._network = network
        self.now: dict[int, float] = {}
        self._steps: dict[int, float] = {}
        self._sides: dict[int, bool] = {}

    def adjust(self, profile: Array, cost: float) -> None:
        """After a choice with this profile and cost."""
        limit = float(self._network.limit or 0)
        unit = max(limit, 1.0)
        self._add_places(profile, limit, _FIRST_STEP * abs(cost) / unit)
        for place in self.now:
            over = float(profile[place]) - limit
            if over <= 0 and not self.now[place]:
                continue
            side = over > 0
            if place in self._sides:
                self._steps[place] *= 1.25 if side == self._sides[place] else 0.5
            self._sides[place] = side
            length = self._steps[place] * min(1.0, max(abs(over) / unit * 10, 0.1))
            self.now[place] = max(0.0, self.now[place] + (length if side else -length))

    def _add_places(self, profile: Array, limit: float, step: float) -> None:
        apart, taken = len(profile) // 100, 0
        if len(self.now) >= _MOST_PRICES or not np.isfinite(step):
            return
        for place in np.argsort(-profile, kind="stable")[:2000].tolist():
            if taken == 4 or profile[place] <= limit:
                return
            if all(abs(place - other) > apart for other in self.now):
                self.now[place], self._steps[place] = 0.0, step
                taken += 1


def _fits(network: ReducedNetwork, profile: Array) -> bool:
    return network.limit is None or not (profile > network.limit).any()


# Large neighbourhoods


class Neighbourhoods:
    """Free parts of a network, and solve each as well as a few seconds allow: several at once, each in a thread of its own.

    A part grows around a node that pays much more than it would in the best case. What a thread finds is taken together with
    what others have found since it began, if that fits and costs less.
    """

    def __init__(self, network: ReducedNetwork, found: Found, excess: Mapping[int, Array], deadline: float) -> None:
        self._network, self._found, self._excess, self._deadline = network, found, excess, deadline
        self._random = np.random.default_rng(0)
        self._nodes = sorted(network.costs)
        self._pairs = float(_FREE_PAIRS)
        self._lock = threading.Lock()

    def run(self, workers: int) -> None:
        """Until the deadline, or the best choice is proved."""
        if workers == 1:
            self._work()
            return
        with ThreadPoolExecutor(workers) as pool:
            for each in [pool.submit(self._work) for _ in range(workers)]:
                each.result()

    def _work(self) -> None:
        while self._deadline - time.monotonic() > 1.0 and self._found.cost > self._found.bound:
            now = time.monotonic()
            with self._lock:
                free, keep = self._next()
            better = _best_within(self._network, keep, min(self._deadline, now + _NEIGHBOURHOOD_SECONDS))
            with self._lock:
                self._adapt(time.monotonic() - now)
                if better is not None:
                    self.take({node: better[node] for node in free})

    def _next(self) -> tuple[set[int], dict[int, Array]]:
        """A part, and the strategies that each node keeps."""
        found, choice = self._found, self._found.choice
        assert choice is not None
        gap = found.cost - found.bound
        paid = np.array([min(float(self._excess[node][choice[node]]), gap) for node in self._nodes])
        chances = paid + (paid.mean() if paid.any() else 1.0)
        seed = self._nodes[int(self._random.choice(len(self._nodes), p=chances / chances.sum()))]
        most = _SHARES[found.neighbourhoods % len(_SHARES)] * gap
        found.neighbourhoods += 1
        likely = {node: np.union1d(np.flatnonzero(self._excess[node] <= most), [k]) for node, k in choice.items()}
        free = _part(self._network, seed, likely, self._pairs)
        return free, {node: likely[node] if node in free else np.array([k]) for node, k in choice.items()}

    def _adapt(self, took: float) -> None:
        """Larger parts where they are solved at once, smaller ones where time is up."""
        fast, slow = took < _NEIGHBOURHOOD_SECONDS / 4, took > 0.9 * _NEIGHBOURHOOD_SECONDS
        self._pairs *= 1.2 if fast else 0.6 if slow else 1.0

    def take(self, part: Mapping[int, int]) -> None:
        """Choose so for a part, if all of it together fits and costs less than the best."""
        assert self._found.choice is not None
        choice = {**self._found.choice, **part}
        cost = self._network.cost(choice)
        if cost < self._found.cost and _fits(self._network, self._network.memory.profile(choice)):
            self._found.choice, self._found.cost = choice, cost


def _part(network: ReducedNetwork, seed: int, likely: Mapping[int, Array], most: float) -> set[int]:
    """The nodes nearest to one, so many that the pairs of their likely strategies come to a number."""
    chosen, total = set[int](), 0.0
    for node in _around(network, seed):
        count = len(likely[node])
        total += sum(count * len(likely[other]) for other in network.neighbours[node] if other in chosen)
        chosen.add(node)
        if total > most:
            break
    return chosen


def _around(network: ReducedNetwork, seed: int) -> Iterator[int]:
    """Nodes by their distance."""
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
    try:
        small = network.restricted(keep)
        small.reduce(deadline)
        if not small.costs:
            return small.expand({})
        outcome = IntegerProgram(small).solve(deadline)
    except InfeasiblePlanError:
        return None
    return None if outcome.choice is None else small.expand(outcome.choice)
