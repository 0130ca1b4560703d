"""Cutting a program into layers: numbers only, no MLIR.

Two problems, both solved exactly:

* `cut`: forward ops in order into K contiguous groups, so that the bytes that live across the cuts are least while
  no group has much more than its share of the flops (dynamic program).
* `Placement`: ops that are free to go to several layers, so that bytes times the number of layers they travel is least
  under precedence constraints. The linear program over difference constraints splits by thresholds into minimum cuts:
  ``max(0, x - y) = sum over t of max(0, [x >= t] - [y >= t])``, and optimal cuts of growing thresholds are nested
  (Hochbaum, "An efficient algorithm for image segmentation, Markov random fields and related problems", JACM 2001).
  The result is integral by construction, and the least of all optimal solutions, so it is unique.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import max_flow

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_FAR = 2**60  # "cannot be reached", in bytes


def normalized_order(operands: Sequence[Sequence[int]], anchors: Sequence[bool]) -> list[int]:
    """A topological order in which side chains stand next to what reads them.

    Tracing order puts parameter casts, masks and position embeddings wherever the user wrote them. Anchors (ops that
    carry the model's weight) keep their order; an op that some anchor depends on comes as late as possible, right
    before the first anchor that needs it; the others come as early as possible, after their last operand; of these, ops
    that depend on no anchor (what is made of labels) stand before their first reader.

    Args:
        operands: for each op, the ops that it reads, all of them earlier in the list.
        anchors: which ops keep their place.

    Returns:
        Op numbers in the new order. For ``a = dot; c = cast; b = dot(a, c)`` with both dots anchors and ``c`` written
        first: ``a, c, b``.
    """
    num_ops = len(operands)
    rank = np.cumsum(np.asarray(anchors, dtype=np.int64)).tolist()
    none = num_ops + 1
    needed = [rank[op] if anchors[op] else none for op in range(num_ops)]
    for op in range(num_ops - 1, -1, -1):
        for read in operands[op]:
            needed[read] = min(needed[read], needed[op])
    keys: list[tuple[int, int]] = []
    light: list[bool] = []
    for op in range(num_ops):
        light.append(not anchors[op] and all(light[read] for read in operands[op]))
        if anchors[op]:
            keys.append((rank[op], 1))
        elif needed[op] < none:
            keys.append((needed[op], 0))
        else:
            keys.append(max((keys[read] for read in operands[op]), default=(0, 0)))
    waiting = [light[op] and needed[op] == none for op in range(num_ops)]
    first: dict[int, tuple[int, int]] = {}
    for op in range(num_ops - 1, -1, -1):
        if waiting[op]:
            keys[op] = first.get(op, keys[op])
        for read in operands[op]:
            if waiting[read]:
                first[read] = min(first.get(read, keys[op]), keys[op])
    return sorted(range(num_ops), key=keys.__getitem__)


def cut_bytes(num_ops: int, values: Sequence[tuple[int, int, int]]) -> Ints:
    """Bytes that live across each position.

    Args:
        num_ops: ops in order.
        values: (position of the producer, position of the last reader, bytes).

    Returns:
        ``num_ops + 1`` numbers; entry ``p`` is the bytes produced before position ``p`` and read at or after it.
    """
    change = np.zeros(num_ops + 2, dtype=np.int64)
    if values:
        table = np.asarray(values, dtype=np.int64)
        alive = table[:, 1] > table[:, 0]
        np.add.at(change, table[alive, 0] + 1, table[alive, 2])
        np.add.at(change, table[alive, 1] + 1, -table[alive, 2])
    return np.cumsum(change)[: num_ops + 1]


@dataclass(frozen=True)
class Cut:
    """Contiguous groups of ops.

    Args:
        starts: first position of each group; ``starts[0] == 0``.
        bytes: bytes that live across the cuts, summed over the cuts.
        largest: flops of the largest group.
        share: flops of an even share.
    """

    starts: tuple[int, ...]
    bytes: int
    largest: float
    share: float

    def group_of(self, num_ops: int) -> list[int]:
        """The group of each position."""
        return (np.searchsorted(np.asarray(self.starts), np.arange(num_ops), side="right") - 1).tolist()


def cut(
    flops: Sequence[float],
    anchors: Sequence[bool],
    crossing: Ints,
    num_groups: int,
    epsilon: float,
    allowed: Sequence[int] | None = None,
    choices: Sequence[Collection[int] | None] | None = None,
) -> Cut | None:
    """Cut ops into contiguous groups with the least bytes across the cuts.

    Every group has an anchor. A group has at most ``1 + epsilon`` times an even share of the flops, unless it holds a
    single anchor (it can't be cut any further). When that is impossible, the limit is the least that is possible. Of
    all the cheapest results, the one with the smallest largest group is taken (to a thousandth), and of these the one
    with the latest cuts.

    Args:
        flops: of each op, in order.
        anchors: ops that carry weight.
        crossing: `cut_bytes` of the same order.
        num_groups: K.
        epsilon: slack of the balance.
        allowed: the positions where a cut may be; everywhere if None.
        choices: for each op, the groups that it may be in; any if None.

    Returns:
        The cut, or None if there is none in which every group has an anchor and every op is in a group of its choice.
    """
    table = _Table.of(flops, anchors, crossing, allowed, _earliest(choices, num_groups))
    share = table.total / num_groups
    limit = (1.0 + epsilon) * share
    if not table.feasible(table.total, num_groups):
        return None
    if not table.feasible(limit, num_groups):
        limit = table.least_limit(limit, num_groups)
    positions, cost = table.solve(limit, num_groups)
    low, high = 0.0, limit  # a heavy op in a group of its own leaves less than an even share to the others
    while high - low > 1e-3 * share:
        middle = (low + high) / 2
        tighter = table.solve(middle, num_groups) if table.feasible(middle, num_groups) else None
        if tighter is not None and tighter[1] == cost:
            positions, high = tighter[0], middle
        else:
            low = middle
    starts = (0, *positions)
    sums = np.diff(table.flops_before[[*starts, len(flops)]])
    return Cut(starts, int(cost), float(sums.max()), share)


def _earliest(choices: Sequence[Collection[int] | None] | None, num_groups: int) -> Ints | None:
    """``earliest[k, p]``: the first position from which all ops before position p may be in group k.

    With choices ``[{0}, None, {1}]``: ``[[0, 0, 0, 3], [0, 1, 1, 1]]``.
    """
    if choices is None or all(choice is None for choice in choices):
        return None
    earliest = np.zeros((num_groups, len(choices) + 1), dtype=np.int64)
    for op, choice in enumerate(choices):
        if choice is not None:
            earliest[[k for k in range(num_groups) if k not in choice], op + 1] = op + 1
    return np.maximum.accumulate(earliest, axis=1)


@dataclass(frozen=True)
class _Table:
    """Prefix sums at the candidate positions (0, the allowed cuts, the end)."""

    positions: Ints
    flops_before: Floats
    anchors_before: Ints
    cost: Ints
    lone: Ints
    last: Ints
    earliest: Ints | None
    total: float

    @classmethod
    def of(
        cls,
        flops: Sequence[float],
        anchors: Sequence[bool],
        crossing: Ints,
        allowed: Sequence[int] | None,
        earliest: Ints | None,
    ) -> _Table:
        num_ops = len(flops)
        flops_before = np.concatenate([[0.0], np.cumsum(np.asarray(flops, dtype=np.float64))])
        anchors_before = np.concatenate([[0], np.cumsum(np.asarray(anchors, dtype=np.int64))])
        inner = np.arange(1, num_ops) if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
        inner = inner[(inner > 0) & (inner < num_ops)]
        positions = np.concatenate([[0], inner, [num_ops]]).astype(np.int64)
        count = anchors_before[positions]
        # A group that ends at candidate p starts at a candidate in [first, last]: `last` leaves it one anchor, `lone`
        # is the earliest start that leaves it only one.
        last = np.searchsorted(count, count, side="left") - 1
        lone = np.searchsorted(count, count - 1, side="left")
        if earliest is not None:
            earliest = np.searchsorted(positions, earliest[:, positions], side="left")
        total = float(flops_before[-1])
        return cls(positions, flops_before, anchors_before, crossing[positions], lone, last, earliest, total)

    def first(self, limit: float, num_groups: int) -> Ints:
        """``first[k, p]``: the earliest start of group k if it ends at candidate p, under a limit of flops."""
        at = self.flops_before[self.positions]
        slack = 1e-9 * self.total
        first = np.minimum(np.searchsorted(at, at - limit - slack, side="left"), self.lone)
        if self.earliest is None:
            return np.broadcast_to(first, (num_groups, len(first)))
        return np.maximum(first, self.earliest)

    def feasible(self, limit: float, num_groups: int) -> bool:
        """Whether K groups fit."""
        return bool(self._reach(self.first(limit, num_groups), num_groups)[-1, num_groups])

    def _reach(self, first: Ints, num_groups: int) -> NDArray[np.bool_]:
        """``reach[p, k]``: the ops before candidate p can be k groups."""
        size = len(self.positions)
        reach = np.zeros((size, num_groups + 1), dtype=np.bool_)
        reach[0, 0] = True
        for k in range(1, num_groups + 1):
            before = np.concatenate([[0], np.cumsum(reach[:, k - 1])])
            start = first[k - 1]
            stop = np.maximum(self.last + 1, start)
            reach[:, k] = before[stop] - before[start] > 0
        return reach

    def least_limit(self, low: float, num_groups: int) -> float:
        """The least feasible limit above ``low``, to a millionth of the total."""
        high = self.total
        while high - low > 1e-6 * self.total:
            middle = (low + high) / 2
            if self.feasible(middle, num_groups):
                high = middle
            else:
                low = middle
        return high

    def solve(self, limit: float, num_groups: int) -> tuple[list[int], int]:
        """The cheapest cuts under a (feasible) limit, and their bytes."""
        first = self.first(limit, num_groups)
        size = len(self.positions)
        best = np.full(size, _FAR, dtype=np.int64)
        best[0] = 0
        history = [best]
        for k in range(num_groups):
            best = np.minimum(_window_minimum(best, first[k], self.last) + self.cost, _FAR)
            history.append(best)
        cuts: list[int] = []
        at = size - 1
        for k in range(num_groups - 1, 0, -1):
            window = history[k][first[k, at] : self.last[at] + 1]
            at = int(first[k, at]) + len(window) - 1 - int(np.argmin(window[::-1]))
            cuts.append(int(self.positions[at]))
        # Nothing lives across the end of the program.
        return cuts[::-1], int(history[-1][-1])


def _window_minimum(row: Ints, first: Ints, last: Ints) -> Ints:
    """Minimum of ``row[first : last + 1]`` for every window, by a sparse table; empty windows are far."""
    width = np.maximum(last + 1 - first, 0)
    level = np.zeros(len(row), dtype=np.int64)
    level[width > 0] = np.log2(width[width > 0]).astype(np.int64)
    result = np.full(len(row), _FAR, dtype=np.int64)
    table = row
    for power in range(int(level.max(initial=0)) + 1):
        here = (level == power) & (width > 0)
        start = first[here]
        result[here] = np.minimum(table[start], table[start + width[here] - (1 << power)])
        if len(table) <= 1 << power:
            break
        table = np.minimum(table[: -(1 << power)], table[1 << power :])
    return result


@dataclass
class Placement:
    """Layers for ops, at least bytes times layers travelled.

    Nodes are numbered as they are made; a fixed layer is written as ``Placement.at(layer)``. Payments and constraints
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
        infinite = sum(self._prices) + 1
        # A requirement is an infinite price: layer(below) must not be above layer(above).
        tails = np.asarray(self._tails + self._below, dtype=np.int64)
        heads = np.asarray(self._heads + self._above, dtype=np.int64)
        prices = np.asarray(self._prices + [infinite] * len(self._below), dtype=np.int64)
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


def balance(weights: Sequence[float], crossing: Sequence[int], num_groups: int) -> tuple[int, ...]:
    """Contiguous groups with the smallest largest weight; ties go to the fewest bytes across the cuts.

    Args:
        weights: of each layer.
        crossing: ``crossing[p]`` is the bytes that cross the position before layer ``p``; entry 0 is not used.
        num_groups: at most ``len(weights)``.

    Returns:
        The first layer of each group. ``balance([4, 1, 1, 2], [0, 0, 0, 0], 2) == (0, 1)``.
    """
    size = len(weights)
    before = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
    worst = np.full((num_groups + 1, size + 1), np.inf)
    worst[0, 0] = 0.0
    for k in range(1, num_groups + 1):
        for end in range(k, size + 1):
            worst[k, end] = np.maximum(worst[k - 1, k - 1 : end], before[end] - before[k - 1 : end]).min()
    limit = float(worst[num_groups, size]) * (1 + 1e-9)
    spent: list[list[tuple[float, int]]] = [[(np.inf, 0)] * (size + 1) for _ in range(num_groups + 1)]
    spent[0][0] = (0.0, 0)
    for k in range(1, num_groups + 1):
        for end in range(k, size + 1):
            options = [
                (spent[k - 1][start][0] + (crossing[start] if start else 0), start)
                for start in range(k - 1, end)
                if before[end] - before[start] <= limit
            ]
            spent[k][end] = min(options, default=(np.inf, 0))
    starts: list[int] = []
    end = size
    for k in range(num_groups, 0, -1):
        end = spent[k][end][1]
        starts.append(end)
    return tuple(reversed(starts))
