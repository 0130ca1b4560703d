"""Cutting forward ops into layers, and layers into stages: numbers only, no MLIR.

`cut` is a dynamic program: ops in order become K contiguous groups, so that the bytes that live across the cuts are
least while no group has much more than its share of the weight. `balance` does the same for whole layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
class LayerCut:
    """Contiguous groups of ops.

    Args:
        starts: first position of each group; ``starts[0] == 0``.
        bytes: bytes that live across the cuts, summed over the cuts.
        largest: weight of the largest group.
        share: weight of an even share.
    """

    starts: tuple[int, ...]
    bytes: int
    largest: float
    share: float

    def group_of(self, num_ops: int) -> list[int]:
        """The group of each position."""
        return (np.searchsorted(np.asarray(self.starts), np.arange(num_ops), side="right") - 1).tolist()


def cut(
    weights: Sequence[float],
    anchors: Sequence[bool],
    crossing: Ints,
    num_groups: int,
    epsilon: float,
    allowed: Sequence[int] | None = None,
    choices: Sequence[Collection[int] | None] | None = None,
) -> LayerCut | None:
    """Cut ops into contiguous groups with the least bytes across the cuts.

    Every group has an anchor. A group has at most ``1 + epsilon`` times an even share of the weight, unless it holds a
    single anchor (it can't be cut any further). When that is impossible, the limit is the least that is possible. Of
    all the cheapest results, the one with the smallest largest group is taken (to a thousandth), and of these the one
    with the latest cuts.

    Args:
        weights: of each op, in order: the predicted time that goes with it.
        anchors: ops that keep their place.
        crossing: `cut_bytes` of the same order.
        num_groups: K.
        epsilon: slack of the balance.
        allowed: the positions where a cut may be; everywhere if None.
        choices: for each op, the groups that it may be in; any if None.

    Returns:
        The cut, or None if there is none in which every group has an anchor and every op is in a group of its choice.
    """
    table = _Table.of(weights, anchors, crossing, allowed, _earliest(choices, num_groups))
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
    sums = np.diff(table.weight_before[[*starts, len(weights)]])
    return LayerCut(starts, int(cost), float(sums.max()), share)


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
    weight_before: Floats
    anchors_before: Ints
    cost: Ints
    lone: Ints
    last: Ints
    earliest: Ints | None
    total: float

    @classmethod
    def of(
        cls,
        weights: Sequence[float],
        anchors: Sequence[bool],
        crossing: Ints,
        allowed: Sequence[int] | None,
        earliest: Ints | None,
    ) -> _Table:
        num_ops = len(weights)
        weight_before = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
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
        total = float(weight_before[-1])
        return cls(positions, weight_before, anchors_before, crossing[positions], lone, last, earliest, total)

    def first(self, limit: float, num_groups: int) -> Ints:
        """``first[k, p]``: the earliest start of group k if it ends at candidate p, under a limit of weight."""
        at = self.weight_before[self.positions]
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


def balance(weights: Sequence[float], crossing: Sequence[int], devices: Sequence[int]) -> tuple[int, ...]:
    """Contiguous groups with the smallest largest weight per device; ties go to the fewest bytes across the cuts.

    Args:
        weights: of each layer.
        crossing: ``crossing[p]`` is the bytes that cross the position before layer ``p``; entry 0 is not used.
        devices: of each group, of which there are at most ``len(weights)``.

    Returns:
        The first layer of each group. ``balance([4, 1, 1, 2], [0, 0, 0, 0], [1, 1]) == (0, 1)``;
        with twice the devices for the first group, ``[2, 1]``, it is ``(0, 2)`` or ``(0, 3)``, whatever crosses less.
    """
    size, num_groups = len(weights), len(devices)
    before = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
    worst = np.full((num_groups + 1, size + 1), np.inf)
    worst[0, 0] = 0.0
    for k in range(1, num_groups + 1):
        for end in range(k, size + 1):
            shares = (before[end] - before[k - 1 : end]) / devices[k - 1]
            worst[k, end] = np.maximum(worst[k - 1, k - 1 : end], shares).min()
    limit = float(worst[num_groups, size]) * (1 + 1e-9)
    spent: list[list[tuple[float, int]]] = [[(np.inf, 0)] * (size + 1) for _ in range(num_groups + 1)]
    spent[0][0] = (0.0, 0)
    for k in range(1, num_groups + 1):
        for end in range(k, size + 1):
            options = [
                (spent[k - 1][start][0] + (crossing[start] if start else 0), start)
                for start in range(k - 1, end)
                if (before[end] - before[start]) / devices[k - 1] <= limit
            ]
            spent[k][end] = min(options, default=(np.inf, 0))
    starts: list[int] = []
    end = size
    for k in range(num_groups, 0, -1):
        end = spent[k][end][1]
        starts.append(end)
    return tuple(reversed(starts))
