"""Local search for a feasible choice: decoding under a Lagrangian for memory, then moves of one node at a time.

It gives no lower bound. It is the last resort where no integer program has found a feasible choice in time, and it polishes
choices of message passing.
"""

from __future__ import annotations

import time

import numpy as np

from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.reduced_network import ReducedNetwork

_ROUNDS = 300  # of multipliers
_SWEEPS = 20  # over all nodes, in one improvement


class LocalSearch:
    """Finds feasible choices of a reduced network.

    Memory has a multiplier at each program point, which follows the subgradient of the Lagrangian: what decoded choices hold
    above the limit. A choice is decoded node by node under these multipliers; of the feasible ones the cheapest is improved
    by moves that stay within memory (iterated conditional modes, Besag 1986).
    """

    def __init__(self, network: ReducedNetwork) -> None:
        self._network = network
        self._nodes = sorted(network.costs)
        self._rows = {
            node: {other: np.ascontiguousarray(network.matrix(node, other)) for other in sorted(near)}
            for node, near in network.neighbours.items()
        }
        self._least = {node: {o: matrix.min(axis=1) for o, matrix in rows.items()} for node, rows in self._rows.items()}

    def search(self, deadline: float) -> dict[int, int] | None:
        """The best feasible choice found until the deadline (`time.monotonic`); None if there was none."""
        network, best, best_cost = self._network, None, np.inf
        multipliers = np.zeros(len(network.memory.fixed))
        for number in range(_ROUNDS):
            penalized = self._penalized(multipliers)
            choice = self._decode(penalized)
            self._improve(choice, penalized, None, deadline)
            cost, profile = network.cost(choice), network.memory.profile(choice)
            over = self._over(profile)
            if not over.any() and cost < best_cost:
                best, best_cost = dict(choice), cost
            if network.limit is None or not (over.any() or multipliers.any()) or time.monotonic() > deadline:
                break
            scale = max(abs(cost), 1e-30) if np.isfinite(cost) else 1.0
            slack = (profile - network.limit) / max(float(network.limit), 1e-30)
            active = over | (multipliers > 0)
            step = 5.0 * scale / max(float(network.limit), 1e-30) / max(int(active.sum()), 1) ** 0.5
            multipliers = np.where(
                active, multipliers + step / (1 + number / 6) ** 0.5 * np.clip(slack, -0.5, 2.0), multipliers
            )
            multipliers = np.maximum(multipliers, 0.0)
        if best is not None:
            self._improve(best, network.costs, network.memory.profile(best), deadline)
        return best

    def polish(self, choice: dict[int, int], deadline: float) -> None:
        """Improve a feasible choice, in place."""
        self._improve(choice, self._network.costs, self._network.memory.profile(choice), deadline)

    def _over(self, profile: Array) -> Array:
        limit = self._network.limit
        return np.zeros(len(profile), bool) if limit is None else profile > limit

    def _penalized(self, multipliers: Array) -> dict[int, Array]:
        """Costs of the strategies, and their memory times its multipliers."""
        if not multipliers.any():
            return self._network.costs
        total = np.concatenate([[0.0], np.cumsum(multipliers)])
        penalized: dict[int, Array] = {}
        for node, costs in self._network.costs.items():
            for start, end, usage in self._network.memory.spans(node):
                costs = costs + (total[end] - total[start]) * usage
            penalized[node] = costs
        return penalized

    def _decode(self, penalized: dict[int, Array]) -> dict[int, int]:
        """Node by node, the best beside what is decided; neighbours that are not are taken at their best."""
        choice: dict[int, int] = {}
        for node in self._nodes:
            total = penalized[node].copy()
            for other, matrix in self._rows[node].items():
                total += matrix[:, choice[other]] if other in choice else self._least[node][other]
            choice[node] = int(total.argmin())
        return choice

    def _improve(
        self, choice: dict[int, int], penalized: dict[int, Array], profile: Array | None, deadline: float
    ) -> None:
        """Move single nodes while that is cheaper and, where a profile is given, within memory; in place."""
        limit = self._network.limit
        for _ in range(_SWEEPS):
            moved = False
            for node in self._nodes:
                total = penalized[node].copy()
                for other, matrix in self._rows[node].items():
                    total += matrix[:, choice[other]]
                now = choice[node]
                for better in np.argsort(total, kind="stable").tolist():
                    if not total[better] < total[now]:
                        break
                    if profile is None or limit is None or self._move(node, now, better, profile, limit):
                        choice[node], moved = better, True
                        break
            if not moved or time.monotonic() > deadline:
                return

    def _move(self, node: int, old: int, new: int, profile: Array, limit: float) -> bool:
        """Whether a move stays within memory; if so, the profile is brought up to date."""
        spans = self._network.memory.spans(node)
        for start, end, usage in spans:
            change = usage[new] - usage[old]
            if change > 0 and (profile[start:end] + change > limit).any():
                return False
        for start, end, usage in spans:
            profile[start:end] += usage[new] - usage[old]
        return True
