"""Placing ops that are free to go to several layers: numbers only, no MLIR.

Bytes times the number of layers they travel are least, under precedence constraints. The linear program over difference
constraints splits by thresholds into minimum cuts: ``max(0, x - y) = sum over t of max(0, [x >= t] - [y >= t])``, and
optimal cuts of growing thresholds are nested (Hochbaum, "An efficient algorithm for image segmentation, Markov random
fields and related problems", JACM 2001). The result is integral by construction, and the least of all optimal
solutions, so it is unique.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import max_flow

from bactrian.passes.stages.layer_partitioning import Ints


@dataclass
class LayerPlacement:
    """Layers for ops, at least bytes times layers travelled.

    Nodes are numbered as they are made; a fixed layer is written as ``LayerPlacement.at(layer)``. Payments and constraints
    may name either. `solve` gives the least optimal solution: every op as low as the optimum allows.
    """

    num_layers: int
    num_nodes: int = 0
    _tails: list[int] = field(default_factory=list[int])
    _heads: list[int] = field(default_factory=list[int])
    _prices: list[int] = field(default_factory=list[int])
    _below: list[int] = field(default_factory=list[int])
    _above: list[int] = field(default_factory=list[int])

    def node(self) -> int:
        """A new variable."""
        self.num_nodes += 1
        return self.num_nodes - 1

    @staticmethod
    def at(layer: int) -> int:
        """The terminal of a fixed layer."""
        return -1 - layer

    def require(self, high: int, low: int) -> None:
        """``layer(high) >= layer(low)``, for two variables."""
        self._above.append(high)
        self._below.append(low)

    def pay(self, high: int, low: int, price: int) -> None:
        """Pay ``price`` for every layer by which ``high`` is above ``low``."""
        if price > 0 and high != low:
            self._tails.append(high)
            self._heads.append(low)
            self._prices.append(price)

    def pay_span(self, ends: Sequence[int], price: int) -> None:
        """Pay ``price`` for every layer between the highest and the lowest of ``ends``, as a value passed on does.

        Between fixed ends travelling is free: what is there anyway costs the same everywhere.
        """
        variables = list(dict.fromkeys(end for end in ends if end >= 0))
        layers = [-1 - end for end in ends if end < 0]
        if price <= 0 or not variables:
            return
        if layers:
            self.pay(self.highest(variables), self.at(max(layers)), price)
            self.pay(self.at(min(layers)), self.lowest(variables), price)
        elif len(variables) == 2:
            self.pay(variables[0], variables[1], price)
            self.pay(variables[1], variables[0], price)
        elif len(variables) > 2:
            self.pay(self.highest(variables), self.lowest(variables), price)

    def highest(self, ends: Sequence[int]) -> int:
        """A variable not below any of ``ends``; it is paid for from above."""
        return self._extreme(ends, -1)

    def lowest(self, ends: Sequence[int]) -> int:
        """A variable not above any of ``ends``; it is paid for from below."""
        return self._extreme(ends, 1)

    def _extreme(self, ends: Sequence[int], sign: int) -> int:
        ends = list(dict.fromkeys(ends))
        if len(ends) == 1:
            return ends[0]
        node = self.node()
        for end in ends:
            if sign < 0:
                self.require(node, end)
            else:
                self.require(end, node)
        return node

    def solve(self) -> list[int]:
        """The layer of every node.

        Each round halves every node's range of layers by one minimum cut for all ranges together (cuts of different
        ranges do not touch): ceil(log2 K) maximum flows in all.
        """
        nodes = self.num_nodes
        paid, infinite = self._in_64_bits()
        # A requirement is an infinite price: layer(below) must not be above layer(above).
        tails = np.asarray(self._tails + self._below, dtype=np.int64)
        heads = np.asarray(self._heads + self._above, dtype=np.int64)
        prices = np.asarray(paid + [infinite] * len(self._below), dtype=np.int64)
        # Terminals are appended as nodes with a range of one layer.
        tails = np.where(tails < 0, nodes - 1 - tails, tails)
        heads = np.where(heads < 0, nodes - 1 - heads, heads)
        fixed = np.arange(self.num_layers, dtype=np.int64)
        low = np.concatenate([np.zeros(nodes, dtype=np.int64), fixed])
        high = np.concatenate([np.full(nodes, self.num_layers - 1, dtype=np.int64), fixed])
        while np.any(low < high):
            threshold = (low + high + 1) // 2
            reached = _least_cut(tails, heads, prices, low, high)
            low = np.where(reached & (low < high), threshold, low)
            high = np.where(~reached & (low < high), threshold - 1, high)
        layers: Ints = low[:nodes]
        return layers.tolist()

    def _in_64_bits(self) -> tuple[list[int], int]:
        """The prices, and one that is more than all of them; in larger units where sums at a node need more bits."""
        total = sum(self._prices) + 1
        most = max((*Counter(self._below).values(), *Counter(self._above).values()), default=0)
        shift = max(0, (total * (most + 1)).bit_length() - 62)
        prices = [-(-price >> shift) for price in self._prices] if shift else self._prices
        return prices, sum(prices) + 1

    def cost(self, layers: Sequence[int]) -> int:
        """What a given placement pays (auxiliary nodes included in ``layers``)."""

        def layer(node: int) -> int:
            return layers[node] if node >= 0 else -1 - node

        pairs = zip(self._tails, self._heads, self._prices, strict=True)
        return sum(price * max(0, layer(tail) - layer(head)) for tail, head, price in pairs)

    def holds(self, layers: Sequence[int]) -> bool:
        """Whether a placement satisfies every requirement."""
        return all(layers[high] >= layers[low] for high, low in zip(self._above, self._below, strict=True))


def _least_cut(tails: Ints, heads: Ints, prices: Ints, low: Ints, high: Ints) -> NDArray[np.bool_]:
    """Which nodes are at or above the middle of their range, in the least of the minimum cuts.

    Args:
        tails, heads, prices: price is paid when the tail is at or above a threshold and the head is below it.
        low, high: ranges of layers; two of more than one layer are equal or disjoint.
    """
    size = len(low)
    open_ = low < high
    threshold = (low + high + 1) // 2
    same = open_[tails] & open_[heads] & (low[tails] == low[heads])
    # An end in another range is known to be at or above the threshold, or below it.
    to_sink = ~same & open_[tails] & (high[heads] < threshold[tails])
    from_source = ~same & open_[heads] & (low[tails] >= threshold[heads])
    gain = np.zeros(size, dtype=np.int64)  # > 0: pulled up (arc from the source), < 0: pulled down (arc to the sink)
    np.add.at(gain, tails[to_sink], -prices[to_sink])
    np.add.at(gain, heads[from_source], prices[from_source])
    source, sink = size, size + 1
    ups, downs = np.flatnonzero(gain > 0), np.flatnonzero(gain < 0)
    solver = max_flow.SimpleMaxFlow()
    add_arcs: Any = solver.add_arcs_with_capacity  # its stub takes the dtype for the shape
    add_arcs(
        np.concatenate([tails[same], np.full(len(ups), source), downs, [source]]),
        np.concatenate([heads[same], ups, np.full(len(downs), sink), [sink]]),
        np.concatenate([prices[same], gain[ups], -gain[downs], [0]]),
    )
    status = solver.solve(source, sink)
    assert status == solver.OPTIMAL, status
    reached = np.zeros(size + 2, dtype=np.bool_)
    reached[np.asarray(solver.get_source_side_min_cut(), dtype=np.int64)] = True
    return reached[:size]
