"""What each strategy and each pair costs at least, seen from the prices of a relaxation.

Prices move costs between edges and their ends, and charge for memory; whatever they are, the least costs of all nodes and
edges add up to a bound, and what is left above them is what a choice pays on top (reduced-cost fixing). Along a tree of edges
these excesses are added up exactly, for every strategy at once, by messages to its root and back; all other edges count with
their least, which is none. What costs more than a known choice can go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.reductions import ReducedNetwork

_EPSILON = 2.0**-52
_TOLERANCE = 1e-9  # of an excess, which is a sum of many rounded numbers


@dataclass(frozen=True)
class Prices:
    """``moved``: by edge, what of its costs goes to the strategies of its first and its second node; ``memory``: what a unit
    costs at some of the network's places, not negative."""

    moved: Mapping[tuple[int, int], tuple[Array, Array]]
    memory: Mapping[int, float]


class Marginals:
    """Lower bounds on all choices that have a strategy, or a pair.

    Attributes:
        bound: no choice within the memory limit costs less, for any prices.
        nodes: node -> what each strategy costs at least above the bound.
        pairs: edge -> the same of each pair.
    """

    def __init__(self, network: ReducedNetwork, prices: Prices) -> None:
        own, self.pairs = self._priced(network, prices)
        self.nodes = self._along_tree(own)

    def _priced(self, network: ReducedNetwork, prices: Prices) -> tuple[dict[int, Array], dict[tuple[int, int], Array]]:
        """Costs of nodes and edges under the prices, above the least of each; sets the bound."""
        own = {node: costs.copy() for node, costs in network.costs.items()}
        largest = {
            node: _largest(costs) for node, costs in own.items()
        }  # bounds every number on the way to the node's costs
        pairs, parts, rounding = dict[tuple[int, int], Array](), [network.constant], _EPSILON * abs(network.constant)
        for (i, j), matrix in network.pairs.items():
            first, second = prices.moved[i, j]
            own[i] += first
            own[j] += second
            largest[i] += _largest(first)
            largest[j] += _largest(second)
            rest = matrix - first[:, None] - second[None, :]
            rounding += 3 * _EPSILON * (_largest(matrix) + _largest(first) + _largest(second))
            parts.append(float(rest.min()))
            pairs[i, j] = rest - rest.min()
        fixed = network.memory.fixed
        for place, price in prices.memory.items():
            assert network.limit is not None
            parts.append(price * (float(fixed[place]) - network.limit))
            rounding += 3 * _EPSILON * price * max(float(np.abs(fixed).max()), network.limit)
            for node in own:
                for start, end, usage in network.memory.spans(node):
                    if start <= place < end:
                        own[node] += price * usage
                        largest[node] += price * _largest(usage)
        for node, costs in own.items():
            steps = len(network.neighbours[node]) + len(prices.memory) + 2
            rounding += steps * _EPSILON * largest[node]
            parts.append(float(costs.min()))
            own[node] = costs - costs.min()
        self._rounding = rounding
        self.bound = math.fsum(parts) - rounding
        return own, pairs

    def _along_tree(self, own: dict[int, Array]) -> dict[int, Array]:
        """Adds up along a tree; turns the pairs' own excess into what a choice with the pair costs."""
        ahead = dict(own)  # with all that is below a node
        handed = dict[tuple[int, int], Array]()
        tree = self._tree(own)
        for parent, child in reversed(tree):
            handed[parent, child] = (self._matrix(parent, child) + ahead[child]).min(axis=1)
            ahead[parent] = ahead[parent] + handed[parent, child]
        whole = dict(ahead)
        inside = set(tree)
        for parent, child in tree:
            rest = whole[parent] - handed[parent, child]
            paired = self._matrix(parent, child) + rest[:, None]
            whole[child] = ahead[child] + paired.min(axis=0)
            paired = paired + ahead[child]
            self.pairs[min(parent, child), max(parent, child)] = paired if parent < child else paired.T
        for (i, j), rest in self.pairs.items():
            if (i, j) not in inside and (j, i) not in inside:
                self.pairs[i, j] = rest + np.maximum(whole[i][:, None], whole[j][None, :])
        return whole

    def _tree(self, own: Mapping[int, Array]) -> list[tuple[int, int]]:
        """A spanning forest of the edges on which most is paid on average, as (parent, child), parents first."""
        near = _heaviest({edge: _mean(rest) for edge, rest in self.pairs.items()})
        seen, tree = set[int](), list[tuple[int, int]]()
        for root in own:
            if root in seen:
                continue
            seen.add(root)
            waiting = [root]
            for node in waiting:
                following = [other for other in near.get(node, ()) if other not in seen]
                seen.update(following)
                waiting += following
                tree += [(node, other) for other in following]
        return tree

    def _matrix(self, i: int, j: int) -> Array:
        return self.pairs[i, j] if i < j else self.pairs[j, i].T

    def gap_of(self, num_pairs: float) -> float:
        """The gap above the bound within which there are so many pairs; infinite where there are no more."""
        if num_pairs >= sum(rest.size for rest in self.pairs.values()):
            return np.inf
        excess = np.concatenate([rest.ravel() for rest in self.pairs.values()])
        return float(np.partition(excess, int(num_pairs))[int(num_pairs)])

    def drop(self, network: ReducedNetwork, gap: float) -> None:
        """Forbid what costs more than a gap above the bound, in the network or a copy of it."""
        most = gap * (1 + _TOLERANCE) + 2 * self._rounding
        for node, excess in self.nodes.items():
            network.costs[node] = network.arrays.array(np.where(excess > most, np.inf, network.costs[node]))
        for edge, excess in self.pairs.items():
            network.pairs[edge] = network.arrays.array(np.where(excess > most, np.inf, network.pairs[edge]))


def _heaviest(weights: Mapping[tuple[int, int], float]) -> dict[int, list[int]]:
    """Neighbours in the heaviest spanning forest (Kruskal 1956)."""
    parts, near = dict[int, int](), dict[int, list[int]]()

    def part(node: int) -> int:
        while (above := parts.setdefault(node, node)) != node:
            parts[node] = parts[above]
            node = parts[node]
        return node

    for i, j in sorted(weights, key=lambda edge: (-weights[edge], edge)):
        first, second = part(i), part(j)
        if first != second:
            parts[first] = second
            near.setdefault(i, []).append(j)
            near.setdefault(j, []).append(i)
    return near


def _mean(values: Array) -> float:
    """Of those that are finite."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else 0.0


def _largest(values: Array) -> float:
    """The size of the largest that is finite."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
