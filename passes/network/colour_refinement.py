"""Colour refinement of a cost network: classes of nodes that look alike, as those of repeated layers do.

Nodes begin with a colour for their costs and memory, and are then told apart by the colours of their neighbours, round by
round (the 1-dimensional Weisfeiler-Leman algorithm), here for a bounded number of rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.reduced_network import ReducedNetwork


@dataclass(frozen=True)
class ColourClasses:
    """The classes of a bounded number of rounds.

    Attributes:
        of_node: the class of each node.
        before: the class of each node one refinement earlier: members of a class have as many neighbours of each.
        first: of each class a member.
        sizes: of each class.
        points: program points at which members of a class use as much memory.
    """

    of_node: Mapping[int, int]
    before: Mapping[int, int]
    first: tuple[int, ...]
    sizes: tuple[int, ...]
    points: tuple[int, ...]

    @classmethod
    def of(cls, network: ReducedNetwork, radius: int, points: Sequence[int]) -> ColourClasses:
        """The classes of nodes that are equal and have equal neighbourhoods up to a distance.

        Args:
            network: is not changed.
            radius: how many rounds: the distance.
            points: program points at which memory counts too.
        """
        arrays = network.arrays
        around = {
            node: [(arrays.number(network.matrix(node, other)), other) for other in near]
            for node, near in network.neighbours.items()
        }
        used = {node: usages_at(network, node, points) for node in network.costs}
        now = _numbered(
            {
                node: (arrays.number(costs), *(arrays.number(arrays.unique(usage)) for usage in used[node]))
                for node, costs in network.costs.items()
            }
        )
        before = now
        for _ in range(radius):
            before = now
            now = _numbered(
                {
                    node: (before[node], *sorted((number, before[other]) for number, other in near))
                    for node, near in around.items()
                }
            )
        first: dict[int, int] = {}
        for node, number in now.items():
            first.setdefault(number, node)
        sizes = Counter(now.values())
        return cls(now, before, tuple(first.values()), tuple(sizes[number] for number in first), tuple(points))


def _numbered(keys: Mapping[int, tuple[object, ...]]) -> dict[int, int]:
    """A number for each key, by first appearance."""
    known: dict[tuple[object, ...], int] = {}
    return {node: known.setdefault(key, len(known)) for node, key in keys.items()}


def usages_at(network: ReducedNetwork, node: int, points: Sequence[int]) -> list[Array]:
    """The memory of each strategy, above that of the first one, at each of some program points."""
    none = np.zeros(len(network.costs[node]))
    found = [none] * len(points)
    for start, end, usage in network.memory.spans(node):
        for number, point in enumerate(points):
            if start <= point < end:
                found[number] = usage
    return found
