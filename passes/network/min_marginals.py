"""Min-marginals: lower bounds for each strategy and each pair, from the dual multipliers of a relaxation.

The multipliers of the local polytope's equations move costs between edges and their ends (a reparametrization), those of
memory rows charge for memory. Whatever they are, the least costs of all nodes and edges add up to a lower bound on any
choice, and what a strategy or a pair costs above the least is its reduced cost. Along a spanning tree of edges reduced costs
are added up exactly, for every strategy at once, by messages to its root and back (min-sum belief propagation); all other
edges count with their least, which is zero. What costs more than a known choice can go: reduced-cost fixing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.reduced_network import ReducedNetwork

_EPSILON = 2.0**-52
_TOLERANCE = 1e-9  # of a min-marginal, which is a sum of many rounded numbers


@dataclass(frozen=True)
class DualMultipliers:
    """Multipliers of a relaxation's constraints; optimal or not.

    Attributes:
        edges: by edge (i, j), the costs that it gives to the strategies of i, shape (K_i,), and of j, shape (K_j,).
        memory: by program point (an index of the network's), cost per unit of memory, not negative.
    """

    edges: Mapping[tuple[int, int], tuple[Array, Array]]
    memory: Mapping[int, float]


class MinMarginals:
    """Lower bounds on all choices within the memory limit that have a strategy, or a pair.

    Attributes:
        lower_bound: no choice within the memory limit costs less, for any multipliers.
        nodes: node -> by strategy, what a choice with it costs above the lower bound at least, shape (K_i,).
        pairs: edge -> the same of each pair, shape (K_i, K_j).
    """

    def __init__(self, network: ReducedNetwork, duals: DualMultipliers) -> None:
        reduced, self.pairs = self._reparametrized(network, duals)
        self.nodes = self._along_tree(reduced)

    def _reparametrized(
        self, network: ReducedNetwork, duals: DualMultipliers
    ) -> tuple[dict[int, Array], dict[tuple[int, int], Array]]:
        """Reduced costs of nodes and edges under the multipliers; sets the lower bound."""
        own = {node: costs.copy() for node, costs in network.costs.items()}
        # Of each node, a bound on every number on the way to its costs.
        largest = {node: _largest(costs) for node, costs in own.items()}
        pairs, parts, rounding = dict[tuple[int, int], Array](), [network.constant], _EPSILON * abs(network.constant)
        for (i, j), matrix in network.pairs.items():
            first, second = duals.edges[i, j]
            own[i] += first
            own[j] += second
            largest[i] += _largest(first)
            largest[j] += _largest(second)
            rest = matrix - first[:, None] - second[None, :]
            rounding += 3 * _EPSILON * (_largest(matrix) + _largest(first) + _largest(second))
            parts.append(float(rest.min()))
            pairs[i, j] = rest - rest.min()
        fixed = network.memory.fixed
        for point, multiplier in duals.memory.items():
            assert network.limit is not None
            parts.append(multiplier * (float(fixed[point]) - network.limit))
            rounding += 3 * _EPSILON * multiplier * max(float(np.abs(fixed).max()), network.limit)
            for node in own:
                for start, end, usage in network.memory.spans(node):
                    if start <= point < end:
                        own[node] += multiplier * usage
                        largest[node] += multiplier * _largest(usage)
        for node, costs in own.items():
            steps = len(network.neighbours[node]) + len(duals.memory) + 2
            rounding += steps * _EPSILON * largest[node]
            parts.append(float(costs.min()))
            own[node] = costs - costs.min()
        self._rounding = rounding
        self.lower_bound = math.fsum(parts) - rounding
        return own, pairs

    def _along_tree(self, own: dict[int, Array]) -> dict[int, Array]:
        """Min-marginals of nodes from their reduced costs ``own``; turns those of pairs into min-marginals too."""
        upward = dict(own)  # with all that is below a node
        sent = dict[tuple[int, int], Array]()
        tree = self._tree(own)
        for parent, child in reversed(tree):
            sent[parent, child] = (self._matrix(parent, child) + upward[child]).min(axis=1)
            upward[parent] = upward[parent] + sent[parent, child]
        whole = dict(upward)
        inside = set(tree)
        for parent, child in tree:
            rest = whole[parent] - sent[parent, child]
            paired = self._matrix(parent, child) + rest[:, None]
            whole[child] = upward[child] + paired.min(axis=0)
            paired = paired + upward[child]
            self.pairs[min(parent, child), max(parent, child)] = paired if parent < child else paired.T
        for (i, j), rest in self.pairs.items():
            if (i, j) not in inside and (j, i) not in inside:
                self.pairs[i, j] = rest + np.maximum(whole[i][:, None], whole[j][None, :])
        return whole

    def _tree(self, own: Mapping[int, Array]) -> list[tuple[int, int]]:
        """A spanning forest of the edges with the largest mean reduced costs, as (parent, child), parents first."""
        near = _heaviest_forest({edge: _mean(rest) for edge, rest in self.pairs.items()})
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

    def gap_for(self, num_pairs: float) -> float:
        """The gap above the lower bound within which there are so many pairs; infinite where there are no more."""
        if num_pairs >= sum(rest.size for rest in self.pairs.values()):
            return np.inf
        above = np.concatenate([rest.ravel() for rest in self.pairs.values()])
        return float(np.partition(above, int(num_pairs))[int(num_pairs)])

    def fix(self, network: ReducedNetwork, gap: float) -> None:
        """Forbid what costs more than a gap above the lower bound, in the network or a copy of it."""
        most = gap * (1 + _TOLERANCE) + 2 * self._rounding
        for node, above in self.nodes.items():
            network.costs[node] = network.arrays.unique(np.where(above > most, np.inf, network.costs[node]))
        for edge, above in self.pairs.items():
            network.pairs[edge] = network.arrays.unique(np.where(above > most, np.inf, network.pairs[edge]))


def _heaviest_forest(weights: Mapping[tuple[int, int], float]) -> dict[int, list[int]]:
    """Neighbours in the heaviest spanning forest (Kruskal 1956)."""
    parents, near = dict[int, int](), dict[int, list[int]]()

    def root(node: int) -> int:
        while (above := parents.setdefault(node, node)) != node:
            parents[node] = parents[above]
            node = parents[node]
        return node

    for i, j in sorted(weights, key=lambda edge: (-weights[edge], edge)):
        first, second = root(i), root(j)
        if first != second:
            parents[first] = second
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
