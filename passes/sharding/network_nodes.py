"""Which node of a stage's cost network decides the sharding of which value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class NetworkNodes:
    """The nodes of a cost network: one for each input, then one for each op that is not free, in program order.

    >>> nodes = NetworkNodes(inputs=(0, 1), results={0: (2,), 2: (4, 5)})  # op 1 is free
    >>> nodes.ops, nodes.of_value(1), nodes.of_value(5), nodes.of_value(3)
    ((0, 2), 1, 3, None)
    >>> nodes.op(1), nodes.op(3), nodes.value(3)
    (None, 2, 4)

    Attributes:
        inputs: values that are there before any op.
        results: for the position of each op that is not free, in their order, the values that it makes. A free op makes
            its results in any sharding for nothing.
    """

    inputs: tuple[int, ...]
    results: Mapping[int, tuple[int, ...]]

    @cached_property
    def ops(self) -> tuple[int, ...]:
        """The positions of the ops that have a node, in the order of the nodes."""
        return tuple(self.results)

    @cached_property
    def _of_values(self) -> dict[int, int]:
        found = {value: node for node, value in enumerate(self.inputs)}
        for node, results in enumerate(self.results.values(), len(self.inputs)):
            found |= dict.fromkeys(results, node)
        return found

    def of_value(self, value: int) -> int | None:
        """The node that decides the sharding of a value; None if a free op makes it, or another stage."""
        return self._of_values.get(value)

    def op(self, node: int) -> int | None:
        """The position of a node's op; None for an input."""
        return self.ops[node - len(self.inputs)] if node >= len(self.inputs) else None

    def value(self, node: int) -> int:
        """The input of a node, or the first result of its op."""
        position = self.op(node)
        return self.inputs[node] if position is None else self.results[position][0]
