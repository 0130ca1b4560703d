"""A stage function as one device sees it: a graph of values with their local bytes.

Ops that XLA may fuse into their readers are *loose*; all others are *firm*: their operands and their results have buffers.
Collectives, and the transposed copies that products and collectives need, are nodes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

ELSEWHERE = frozenset(
    [
        "transpose",
        "broadcast_in_dim",
        "slice",
        "gather",
        "concatenate",
        "pad",
        "reverse",
        "iota",
        "dynamic_slice",
        "pieces",
        "regroup",
        "dynamic_update_slice",
        "dynamic_reshape",
    ]
)
"""Ops that move elements to other positions: their results can't be written over their operands."""


class Kind(Enum):
    """How a node's result comes to be."""

    ARGUMENT = "argument"
    CONSTANT = "constant"
    VIEW = "view"
    LOOSE = "loose"
    FIRM = "firm"
    PART = "part"


@dataclass(slots=True)
class Node:
    """A value on one device.

    Attributes:
        name: of the op, without its dialect.
        kind: how its result comes to be. A view has the bytes of its operand; a part is one of several results of a firm op.
        operands: numbers of nodes.
        shape: on a device.
        nbytes: on a device.
        inside: what its regions do while it runs.
        group: firm nodes of one group that do not depend on each other are one op.
        key: equal nodes have equal keys; None for one that is like no other.
        dims: of a reduction those over which it goes, of a broadcast those along which values repeat.
        place: of a part, the operand of its op whose buffer it takes over; for an optimization barrier, which it is.
    """

    name: str
    kind: Kind
    operands: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int
    inside: tuple[Graph, ...] = ()
    group: object = None
    key: object = None
    dims: tuple[int, ...] = ()
    place: int | None = None


@dataclass
class Graph:
    """Nodes in an order of work, and which of them are results.

    Attributes:
        nodes: operands come first.
        results: numbers of nodes.
        aliases: by the position of a result, the argument's node whose buffer it takes over (donation).
    """

    nodes: list[Node] = field(default_factory=list[Node])
    results: list[int] = field(default_factory=list[int])
    aliases: dict[int, int] = field(default_factory=dict[int, int])
    _known: dict[object, int] = field(default_factory=dict[object, int], repr=False)

    def add(
        self,
        name: str,
        kind: Kind,
        operands: Sequence[int],
        shape: Sequence[int],
        nbytes: int,
        *,
        inside: tuple[Graph, ...] = (),
        group: object = None,
        key: object = None,
        dims: Sequence[int] = (),
        place: int | None = None,
    ) -> int:
        """A new node, or the equal one that is there."""
        operands = tuple(operands)
        full = None if key is None else (name, operands, tuple(shape), nbytes, key)
        if full is not None and full in self._known:
            return self._known[full]
        number = len(self.nodes)
        self.nodes.append(Node(name, kind, operands, tuple(shape), nbytes, inside, group, full, tuple(dims), place))
        if full is not None:
            self._known[full] = number
        return number

    def transpose(self, operand: int, order: Sequence[int]) -> int:
        """A transposed value: a view where only dims of size one move."""
        node = self.nodes[operand]
        if node.name == "transpose" and isinstance(node.key, tuple):
            inner = node.key[-1]
            operand, order = node.operands[0], [inner[dim] for dim in order]
            node = self.nodes[operand]
        if list(order) == list(range(len(order))):
            return operand
        shape = [node.shape[dim] for dim in order]
        moved = [dim for dim in order if node.shape[dim] != 1]
        kind = Kind.VIEW if moved == sorted(moved) else Kind.LOOSE
        return self.add("transpose", kind, (operand,), shape, node.nbytes, key=tuple(order))

    def order(self, number: int) -> list[int]:
        """The dims of a value as XLA would have them in memory before it gives values their orders, the outermost first.

        A transpose only names them anew; other ops whose results are in place take over the order of their first operand
        that is no broadcast scalar.
        """
        moves = list[Sequence[int]]()
        while True:
            node = self.nodes[number]
            if node.name == "transpose" and isinstance(node.key, tuple):
                moves.append(node.key[-1])
                number = node.operands[0]
                continue
            like = [o for o in node.operands if self.nodes[o].shape == node.shape and not self._is_scalar(o)]
            if node.kind is not Kind.LOOSE or node.name in ELSEWHERE or not like:
                break
            number = like[0]
        order = list(range(len(node.shape)))
        for move in reversed(moves):
            order = [move.index(dim) for dim in order]
        return order

    def _is_scalar(self, number: int) -> bool:
        """Whether all elements of a value are one."""
        node = self.nodes[number]
        return node.kind is Kind.LOOSE and (
            (node.name == "broadcast_in_dim" and len(node.dims) == len(node.shape)) or node.name == "constant"
        )
