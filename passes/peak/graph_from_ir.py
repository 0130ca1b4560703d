"""From a stage function's IR to the graph of what one device computes.

Shardings are in the IR by now: reshards are ``sdy.reshard``, and an op whose operands are sharded where its result is
not gives partial results, which devices add up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.attributes import argument_attributes
from bactrian.passes.ir.meshes import SHARDING, spec_or_replicated, value_shardings
from bactrian.passes.ir.op_traits import CONTRACTING, HAS_OWN_BUFFER, without_dialect
from bactrian.passes.ir.regions import body, nested_operations
from bactrian.passes.machine.spec import Spec
from bactrian.passes.peak.collective_nodes import CollectiveNodes
from bactrian.passes.peak.value_graph import Graph, Kind
from bactrian.passes.sharding.scattered_sums import ScatteredSum, bundles, scattered_sums

_VIEWS = frozenset({"reshape", "bitcast_convert"})
_FIRM = without_dialect(HAS_OWN_BUFFER)
_CONTRACTS = without_dialect(CONTRACTING)
_LOOPS = frozenset({"while", "case", "if"})
_INDEX = 4  # bytes of one
_DIMS = re.compile(r"\[([^\]]*)\]")


def read_function(main: ir.Operation, sizes: Mapping[str, int]) -> Graph:
    """The graph of a function.

    Args:
        main: with ``sdy.sharding`` where values are cut.
        sizes: of the mesh's axes.
    """
    block = body(main)
    values = [*block.arguments, *(result for view in block.operations for result in view.operation.results)]
    shardings = value_shardings(main, values)
    specs: dict[ir.Value, Spec] = {v: spec_or_replicated(s, v.type) for v, s in zip(values, shardings, strict=True)}
    together = bundles(main, list(scattered_sums(main)), sizes)
    scattered = {found.op.results[0]: (found, number) for number, bundle in enumerate(together) for found in bundle}
    graph = _Reader(block, specs, sizes, scattered).graph
    for number, entry in enumerate(argument_attributes(main)):
        if "tf.aliasing_output" in entry:
            graph.aliases[ir.IntegerAttr(entry["tf.aliasing_output"]).value] = number
    return graph


class _Reader:
    """Reads one block; values from outside of it are arguments too."""

    def __init__(
        self,
        block: ir.Block,
        specs: Mapping[ir.Value, Spec],
        sizes: Mapping[str, int],
        scattered: Mapping[ir.Value, tuple[ScatteredSum, int]],
    ) -> None:
        self.graph = Graph()
        self._given = specs, sizes, scattered
        self._collectives = CollectiveNodes(self.graph, specs, sizes, scattered)
        self._node = dict[ir.Value, int]()
        for value in block.arguments:
            self._argument(value)
        operations = [view.operation for view in block.operations]
        for op in operations[:-1]:
            self._read(op)
        self.graph.results = [self._of(value) for value in operations[-1].operands]

    def _argument(self, value: ir.Value) -> int:
        self._node[value] = self.graph.add("argument", Kind.ARGUMENT, (), *self._collectives.local(value))
        return self._node[value]

    def _of(self, value: ir.Value) -> int:
        found = self._node.get(value)
        return self._argument(value) if found is None else found

    def _read(self, op: ir.Operation) -> None:
        name = op.name.rpartition(".")[2]
        reads = [self._of(value) for value in op.operands]
        if name == "optimization_barrier":  # gone before values are looked at: what it kept apart is one again
            self._node |= zip(op.results, reads, strict=True)
        elif name in _LOOPS or len(op.results) != 1:
            self._several(op, name, reads)
        elif name == "reshard" and self._collectives.is_scattered(op.operands[0]):
            self._node[op.results[0]] = reads[0]
        elif name in ("reshard", "sharding_constraint"):
            self._node[op.results[0]] = self._collectives.reshard(op, reads[0])
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
        empty = graph.add("broadcast", Kind.FIRM, (), shape, self._collectives.local(op.results[0])[1], key="windows")
        return [empty, indices, *reads[1:]]

    def _plain(self, op: ir.Operation, name: str, reads: list[int]) -> int:
        graph, result = self.graph, op.results[0]
        reads = self._collectives.halo_exchange(op, reads)
        if name == "select_and_scatter":
            reads = self._expanded(op, reads)
        spec, lost = self._partial(op, name)
        shape, nbytes = self._collectives.local(result, spec)
        key = _key(op)
        if name == "constant":
            loose = math.prod(shape) <= 1 or _is_splat(op.attributes["value"])
            return graph.add(name, Kind.LOOSE if loose else Kind.CONSTANT, (), shape, nbytes, key=key)
        if name == "transpose":
            return graph.transpose(reads[0], list(ir.DenseI64ArrayAttr(op.attributes["permutation"])))
        if name in _VIEWS or (name == "broadcast_in_dim" and nbytes == graph.nodes[reads[0]].nbytes):
            return graph.add(name, Kind.VIEW, reads[:1], shape, nbytes, key=key)
        kind = Kind.FIRM if name in _FIRM else Kind.LOOSE
        if name == "reduce" and _is_one(op, graph.nodes[reads[0]].shape):
            kind, reads = Kind.VIEW, reads[:1]
        made = graph.add(
            name,
            kind,
            reads,
            shape,
            nbytes,
            key=key,
            dims=_dims(op, name, graph.nodes[reads[0]].shape if reads else ()),
        )
        return self._collectives.all_reduce(made, result, spec, lost) if lost else made

    def _several(self, op: ir.Operation, name: str, reads: list[int]) -> None:
        """An op with several results; a loop needs what one round of it needs."""
        graph, rounds = self.graph, list[Graph]()
        if name in _LOOPS:
            inside = {operand for nested in nested_operations(op) for operand in nested.operands}
            reads = [*reads, *(self._node[value] for value in self._node if value in inside)]
            for region in op.regions:
                inner = _Reader(region.blocks[0], *self._given).graph
                if name == "while" and len(inner.results) == len(op.results):
                    inner.aliases = {number: number for number in range(len(inner.results))}
                rounds.append(inner)
        whole = graph.add(name, Kind.FIRM, reads, (), 0, inside=tuple(rounds))
        for position, result in enumerate(op.results):
            self._node[result] = graph.add(
                "part", Kind.PART, (whole,), *self._collectives.local(result), key=position, place=position if name == "while" else None
            )  # fmt: skip

    def _partial(self, op: ir.Operation, name: str) -> tuple[Spec, tuple[str, ...]]:
        """How an op's partial results are sharded, and the axes over which they are partial."""
        spec = self._collectives.spec(op.results[0])
        if name not in _CONTRACTS:
            return spec, ()
        first = self._collectives.spec(op.operands[0]).dims
        if name == "dot_general":
            numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
            lost = [axis for dim in numbers.lhs_contracting_dimensions for axis in first[dim]]
        elif name == "reduce":
            lost = [axis for dim in ir.DenseI64ArrayAttr(op.attributes["dimensions"]) for axis in first[dim]]
        else:
            read = [first] if name == "gather" else [self._collectives.spec(value).dims for value in op.operands]
            kept = set(spec.axes)
            lost = list(dict.fromkeys(a for each in read for axes in each for a in axes if a not in kept))
        return Spec(tuple(tuple(axis for axis in axes if axis not in lost) for axes in spec.dims)), tuple(lost)

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
        spec, lost = self._partial(op, "dot_general")
        made = graph.add("dot_general", Kind.FIRM, operands, *self._collectives.local(result, spec), key=_key(op))
        return self._collectives.all_reduce(made, result, spec, lost) if lost else made

    def _merged(self, read: int) -> int:
        """What a product reads: dims of one kind are one."""
        node = self.graph.nodes[read]
        return self.graph.add("reshape", Kind.VIEW, (read,), (math.prod(node.shape),), node.nbytes, key="merged")

    def _convolution(self, op: ir.Operation, reads: list[int]) -> int:
        """Of operands with the batch first and features last, and of kernels with features last."""
        graph, result, reads = self.graph, op.results[0], self._collectives.halo_exchange(op, reads)
        dims = [
            [dim.strip() for dim in each.split(",")] for each in _DIMS.findall(str(op.attributes["dimension_numbers"]))
        ]
        left, right, made = dims[:3]
        space = sorted(dim for dim in left if dim.isdigit())
        operands = [
            graph.transpose(reads[0], [left.index(dim) for dim in ("b", *space, "f")]),
            graph.transpose(reads[1], [right.index(dim) for dim in (*space, "i", "o")]),
        ]
        spec, lost = self._partial(op, "convolution")
        shape, nbytes = self._collectives.local(result, spec)
        order = [made.index(dim) for dim in ("b", *space, "f")]
        found = graph.add("convolution", Kind.FIRM, operands, [shape[d] for d in order], nbytes, key=_key(op))
        found = graph.transpose(found, [order.index(d) for d in range(len(order))])
        return self._collectives.all_reduce(found, result, spec, lost) if lost else found


def _is_one(op: ir.Operation, shape: tuple[int, ...]) -> bool:
    """Whether a reduction goes over one element on each device."""
    return all(shape[dim] == 1 for dim in ir.DenseI64ArrayAttr(op.attributes["dimensions"]))


def _is_splat(attribute: ir.Attribute) -> bool:
    return isinstance(attribute, ir.DenseElementsAttr) and attribute.is_splat


def _key(op: ir.Operation) -> object:
    """What ops of one name with the same operands must share to be equal; None where regions would have to be compared."""
    if len(op.regions):
        return None
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
