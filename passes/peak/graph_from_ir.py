"""From a stage function's IR to the graph of what one device computes: on a mesh, the program of one device."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.attributes import ALIAS, argument_attributes
from bactrian.passes.ir.constants import elements_text, splat_text
from bactrian.passes.ir.meshes import SHARDING
from bactrian.passes.ir.op_traits import BARRIER, HAS_OWN_BUFFER, without_dialect
from bactrian.passes.ir.regions import body, nested_operations
from bactrian.passes.ir.tensor_sizes import type_bytes
from bactrian.passes.peak.collective_nodes import collective_node
from bactrian.passes.peak.value_graph import Graph, Kind
from bactrian.passes.spmd.collectives import COLLECTIVES

_VIEWS = frozenset({"reshape", "bitcast_convert"})
_FIRM = without_dialect(HAS_OWN_BUFFER)
_LOOPS = frozenset({"while", "case", "if"})
_IN_PLACE = frozenset({"while", "optimization_barrier"})
_INDEX = 4  # bytes of one
_DIMS = re.compile(r"\[([^\]]*)\]")


def read_function(main: ir.Operation) -> Graph:
    """The graph of a function; of one that ``partition`` has written, that of its ``sdy.manual_computation``."""
    first = body(main).operations[0].operation
    graph = _Reader(first.regions[0].blocks[0] if first.name == "sdy.manual_computation" else body(main)).graph
    for number, entry in enumerate(argument_attributes(main)):
        if ALIAS in entry:
            graph.aliases[ir.IntegerAttr(entry[ALIAS]).value] = number
    return graph


class _Reader:
    """Reads one block; values from outside of it are arguments too."""

    def __init__(self, block: ir.Block) -> None:
        self.graph = Graph()
        self._node = dict[ir.Value, int]()
        for value in block.arguments:
            self._argument(value)
        operations = [view.operation for view in block.operations]
        for op in operations[:-1]:
            self._read(op)
        self.graph.results = [self._of(value) for value in operations[-1].operands]

    def _argument(self, value: ir.Value) -> int:
        self._node[value] = self.graph.add("argument", Kind.ARGUMENT, (), *_local(value))
        return self._node[value]

    def _of(self, value: ir.Value) -> int:
        found = self._node.get(value)
        return self._argument(value) if found is None else found

    def _read(self, op: ir.Operation) -> None:
        name = op.name.rpartition(".")[2]
        reads = [self._of(value) for value in op.operands]
        if name in _LOOPS or op.name == BARRIER or len(op.results) != 1:
            self._several(op, name, reads)
        elif op.name in COLLECTIVES:
            self._node[op.results[0]] = collective_node(self.graph, op, reads[0])
        elif name == "dot_general":
            self._node[op.results[0]] = self._dot(op, reads)
        elif name == "convolution":
            self._node[op.results[0]] = self._convolution(op, reads)
        else:
            self._node[op.results[0]] = self._plain(op, name, reads)

    def _expanded(self, op: ir.Operation, reads: list[int]) -> list[int]:
        """What a select-and-scatter reads: for CPUs it is a scatter at indices that a search of all windows finds."""
        graph = self.graph
        shape, windows = graph.nodes[reads[0]].shape, graph.nodes[reads[1]].shape
        places = [
            graph.add("iota", Kind.FIRM, (), shape, _INDEX * math.prod(shape), key=("windows", dim))
            for dim in range(len(shape))
        ]
        nbytes = _INDEX * math.prod(windows) * len(shape)
        found = graph.add("reduce_window", Kind.FIRM, (reads[0], *places), windows, nbytes)
        indices = graph.add("concatenate", Kind.FIRM, (found,), windows, nbytes)
        empty = graph.add("broadcast", Kind.FIRM, (), shape, _local(op.results[0])[1], key="windows")
        return [empty, indices, *reads[1:]]

    def _plain(self, op: ir.Operation, name: str, reads: list[int]) -> int:
        graph, result = self.graph, op.results[0]
        if name == "select_and_scatter":
            reads = self._expanded(op, reads)
        shape, nbytes = _local(result)
        key = _key(op)
        if name == "constant":
            loose = math.prod(shape) <= 1 or splat_text(result) is not None
            return graph.add(name, Kind.LOOSE if loose else Kind.CONSTANT, (), shape, nbytes, key=key)
        if name == "transpose":
            return graph.transpose(reads[0], list(ir.DenseI64ArrayAttr(op.attributes["permutation"])))
        if name in _VIEWS or (name == "broadcast_in_dim" and nbytes == graph.nodes[reads[0]].nbytes):
            return graph.add(name, Kind.VIEW, reads[:1], shape, nbytes, key=key)
        kind = Kind.FIRM if name in _FIRM else Kind.LOOSE
        if name == "reduce" and _is_one(op, graph.nodes[reads[0]].shape):
            kind, reads = Kind.VIEW, reads[:1]
        dims = _dims(op, name, graph.nodes[reads[0]].shape if reads else ())
        return graph.add(name, kind, reads, shape, nbytes, key=key, dims=dims)

    def _several(self, op: ir.Operation, name: str, reads: list[int]) -> None:
        """An op with several results; a loop needs what one round of it needs."""
        graph, rounds = self.graph, list[Graph]()
        if name in _LOOPS:
            inside = {operand for nested in nested_operations(op) for operand in nested.operands}
            reads = [*reads, *(self._node[value] for value in self._node if value in inside)]
            for region in op.regions:
                inner = _Reader(region.blocks[0]).graph
                if name == "while" and len(inner.results) == len(op.results):
                    inner.aliases = {number: number for number in range(len(inner.results))}
                rounds.append(inner)
        whole = graph.add(name, Kind.FIRM, reads, (), 0, inside=tuple(rounds))
        for position, result in enumerate(op.results):
            place = position if name in _IN_PLACE else None
            self._node[result] = graph.add("part", Kind.PART, (whole,), *_local(result), key=position, place=place)

    def _dot(self, op: ir.Operation, reads: list[int]) -> int:
        """A product. Operands with several free or contracted dims, or with dims of size one, are read in the order
        batch, free, contracted (the second: batch, contracted, free); others in either."""
        graph, result = self.graph, op.results[0]
        numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        sides = [
            (list(numbers.lhs_batching_dimensions), list(numbers.lhs_contracting_dimensions)),
            (list(numbers.rhs_batching_dimensions), list(numbers.rhs_contracting_dimensions)),
        ]
        operands = list[int]()
        for side, ((batch, contracted), read) in enumerate(zip(sides, reads, strict=True)):
            shape = graph.nodes[read].shape
            free = [dim for dim in range(len(shape)) if dim not in batch and dim not in contracted]
            plain = batch == list(range(len(batch))) and len(contracted) <= 1 and len(free) <= 1 and 1 not in shape
            order = [*batch, *free, *contracted] if side == 0 else [*batch, *contracted, *free]
            operands.append(read if plain else self._merged(graph.transpose(read, order)))
        return graph.add("dot_general", Kind.FIRM, operands, *_local(result), key=_key(op))

    def _merged(self, read: int) -> int:
        """What a product reads: dims of one kind are one."""
        node = self.graph.nodes[read]
        return self.graph.add("reshape", Kind.VIEW, (read,), (math.prod(node.shape),), node.nbytes, key="merged")

    def _convolution(self, op: ir.Operation, reads: list[int]) -> int:
        """Of operands with the batch first and features last, and of kernels with features last."""
        graph, result = self.graph, op.results[0]
        dims = [
            [dim.strip() for dim in each.split(",")] for each in _DIMS.findall(str(op.attributes["dimension_numbers"]))
        ]
        left, right, made = dims[:3]
        space = sorted(dim for dim in left if dim.isdigit())
        operands = [
            graph.transpose(reads[0], [left.index(dim) for dim in ("b", *space, "f")]),
            graph.transpose(reads[1], [right.index(dim) for dim in (*space, "i", "o")]),
        ]
        shape, nbytes = _local(result)
        order = [made.index(dim) for dim in ("b", *space, "f")]
        found = graph.add("convolution", Kind.FIRM, operands, [shape[d] for d in order], nbytes, key=_key(op))
        return graph.transpose(found, [order.index(d) for d in range(len(order))])


def _local(value: ir.Value) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of a value."""
    type_ = value.type
    return (tuple(type_.shape), type_bytes(type_)) if isinstance(type_, ir.RankedTensorType) else ((), 0)


def _is_one(op: ir.Operation, shape: tuple[int, ...]) -> bool:
    """Whether a reduction goes over one element on each device."""
    return all(shape[dim] == 1 for dim in ir.DenseI64ArrayAttr(op.attributes["dimensions"]))


def _key(op: ir.Operation) -> object:
    """What ops of one name with the same operands must share to be equal; None where regions would have to be compared."""
    if len(op.regions):
        return None
    if op.name == "stablehlo.constant":
        return elements_text(op)
    attributes = op.attributes
    return tuple((name, str(attributes[name])) for name in attributes if name != SHARDING and name[:8] != "bactrian")


def _dims(op: ir.Operation, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a reduction the dims that it goes over, of a broadcast those along which values repeat."""
    if name == "reduce":
        return tuple(ir.DenseI64ArrayAttr(op.attributes["dimensions"]))
    if name != "broadcast_in_dim":
        return ()
    own = [
        dim
        for dim, size in zip(ir.DenseI64ArrayAttr(op.attributes["broadcast_dimensions"]), shape, strict=True)
        if size > 1
    ]
    return tuple(dim for dim in range(len(ir.RankedTensorType(op.results[0].type).shape)) if dim not in own)
