"""From a stage function's IR to the graph of what one device computes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.passes.mesh_tensors import SHARDING, axis_names, value_shardings
from bactrian.passes.peak.graph import Graph, Kind
from bactrian.passes.program import Dataflow, type_bytes

Layout = tuple[tuple[str, ...], ...]

_VIEWS = frozenset({"reshape", "optimization_barrier", "bitcast_convert"})
FIRM = frozenset(
    "dot_general dot convolution reduce reduce_window scatter sort while case custom_call rng_bit_generator "
    "select_and_scatter fft cholesky triangular_solve all_reduce all_gather rng".split()
)
_DIMS = re.compile(r"\[([^\]]*)\]")
_CONTRACTS = frozenset({"dot_general", "dot", "convolution", "reduce", "gather", "scatter", "select_and_scatter"})


class Reader:
    """Reads one function (or the body of a loop)."""

    def __init__(self, main: ir.Operation, sizes: dict[str, int]) -> None:
        self.graph = Graph()
        self._sizes = sizes
        self._flow = flow = Dataflow.of(main)
        shardings = value_shardings(main, flow.values)
        self._layouts = [
            self._layout(s, v) for s, v in zip(shardings, flow.values, strict=True)
        ]
        self._node: list[int] = []
        for number in range(flow.num_arguments):
            self._node.append(self.graph.add("argument", Kind.ARGUMENT, (), *self._local(number)))
        for index in range(len(flow.ops) - 1):
            self._read(index)
        self.graph.results = [self._node[value] for value in flow.operands[-1]]
        self.graph.aliases = {
            ir.IntegerAttr(entry["tf.aliasing_output"]).value: number
            for number, entry in enumerate(map(ir.DictAttr, ir.ArrayAttr(main.attributes["arg_attrs"])))
            if "tf.aliasing_output" in entry
        } if "arg_attrs" in main.attributes else {}

    def _layout(self, sharding: ir.Attribute | None, value: ir.Value) -> Layout:
        type_ = value.type
        rank = len(type_.shape) if isinstance(type_, ir.RankedTensorType) else 0
        names = axis_names(sharding)
        return names if len(names) == rank else ((),) * rank

    def _parts(self, axes: Sequence[str]) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _shape(self, value: int, layout: Layout) -> tuple[int, ...]:
        type_ = self._flow.values[value].type
        if not isinstance(type_, ir.RankedTensorType):
            return ()
        return tuple(-(-size // self._parts(axes)) for size, axes in zip(type_.shape, layout, strict=True))

    def _bytes(self, value: int, shape: Sequence[int]) -> int:
        type_ = self._flow.values[value].type
        if not isinstance(type_, ir.RankedTensorType):
            return 0
        return type_bytes(type_) // max(1, math.prod(type_.shape)) * math.prod(shape)

    def _local(self, value: int, layout: Layout | None = None) -> tuple[tuple[int, ...], int]:
        shape = self._shape(value, self._layouts[value] if layout is None else layout)
        return shape, self._bytes(value, shape)

    def _read(self, index: int) -> None:
        flow, graph = self._flow, self.graph
        op, results = flow.ops[index], flow.results[index]
        name = op.name.rpartition(".")[2]
        reads = [self._node[value] for value in flow.operands[index]]
        if name == "constant":
            shape, nbytes = self._local(results[0])
            single = math.prod(shape) <= 1 or bool(op.attributes["value"] and _is_splat(op.attributes["value"]))
            kind = Kind.LOOSE if single else Kind.CONSTANT
            self._node.append(graph.add("constant", kind, (), shape, nbytes, key=str(op.attributes["value"])[:200]))
        elif name in ("reshard", "sharding_constraint"):
            self._node.append(self._move(flow.operands[index][0], results[0], reads[0]))
        elif name == "dot_general":
            self._node.append(self._dot(index, reads))
        elif name == "convolution":
            self._node.append(self._convolution(index, reads))
        elif len(results) != 1:
            self._several(index, name, reads)
        else:
            self._node.append(self._plain(index, name, reads))

    def _plain(self, index: int, name: str, reads: list[int]) -> int:
        flow, graph, op = self._flow, self.graph, self._flow.ops[index]
        result = flow.results[index][0]
        layout, lost = self._reduced(index)
        shape, nbytes = self._local(result, layout)
        key = _key(op)
        if name == "transpose":
            return graph.transpose(reads[0], list(ir.DenseI64ArrayAttr(op.attributes["permutation"])))
        if name in _VIEWS:
            return graph.add(name, Kind.VIEW, reads[:1], shape, nbytes, key=key)
        if name == "broadcast_in_dim" and nbytes == graph.nodes[reads[0]].nbytes:
            return graph.add(name, Kind.VIEW, reads[:1], shape, nbytes, key=key)
        kind = Kind.FIRM if name in FIRM else Kind.LOOSE
        made = graph.add(name, kind, reads, shape, nbytes, key=key, sums=name == "reduce")
        return self._all_reduce(made, result, layout, lost) if lost else made

    def _several(self, index: int, name: str, reads: list[int]) -> None:
        graph, results = self.graph, self._flow.results[index]
        whole = graph.add(name, Kind.FIRM, reads, (), 0, key=None)
        for position, result in enumerate(results):
            self._node.append(graph.add("part", Kind.PART, (whole,), *self._local(result), key=("part", position)))

    def _reduced(self, index: int) -> tuple[Layout, tuple[str, ...]]:
        """The layout in which an op gives partial results, and the axes over which they are partial."""
        flow, op = self._flow, self._flow.ops[index]
        name, result = op.name.rpartition(".")[2], flow.results[index][0]
        layout = self._layouts[result]
        if name not in _CONTRACTS:
            return layout, ()
        gone = dict.fromkeys(axis for read in flow.operands[index] for axes in self._layouts[read] for axis in axes)
        kept = {axis for axes in layout for axis in axes}
        lost = [axis for axis in gone if axis not in kept]
        if name == "dot_general":
            numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
            left = self._layouts[flow.operands[index][0]]
            lost = [axis for dim in numbers.lhs_contracting_dimensions for axis in left[dim]]
        elif name == "reduce":
            dims = list(ir.DenseI64ArrayAttr(op.attributes["dimensions"]))
            lost = [axis for dim in dims for axis in self._layouts[flow.operands[index][0]][dim]]
        if name == "gather":
            lost = [axis for axes in self._layouts[flow.operands[index][0]][:1] for axis in axes if axis in lost]
        whole = tuple(tuple(axis for axis in axes if axis not in lost) for axes in layout)
        return whole, tuple(lost)

    def _all_reduce(self, made: int, result: int, layout: Layout, lost: tuple[str, ...]) -> int:
        """The sum over devices of a partial result, cut afterwards where its own layout says so."""
        graph = self.graph
        shape, nbytes = self._local(result, layout)
        group = ("all_reduce", tuple(sorted(lost)), str(self._flow.values[result].type).rpartition("x")[2])
        total = graph.add("all_reduce", Kind.FIRM, (made,), shape, nbytes, group=group, key=group)
        if layout == self._layouts[result]:
            return total
        return self._cut(total, result, self._layouts[result])

    def _cut(self, read: int, result: int, layout: Layout) -> int:
        """A device's own piece; of what is broadcast no more than that is made."""
        node = self.graph.nodes[read]
        whole = node.name in ("broadcast_in_dim", "constant") and node.kind is Kind.LOOSE
        name, operands = (node.name, node.operands) if whole else ("slice", (read,))
        return self.graph.add(name, Kind.LOOSE, operands, *self._local(result, layout), key=(str(layout), node.key if whole else None))

    def _dot(self, index: int, reads: list[int]) -> int:
        """A product: one batch, one free and one contracted dim, in this order, or copies that are so."""
        graph, flow, op = self.graph, self._flow, self._flow.ops[index]
        result = flow.results[index][0]
        numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        sides = [
            (list(numbers.lhs_batching_dimensions), list(numbers.lhs_contracting_dimensions)),
            (list(numbers.rhs_batching_dimensions), list(numbers.rhs_contracting_dimensions)),
        ]
        operands = list[int]()
        for side, ((batch, contracted), read) in enumerate(zip(sides, reads, strict=True)):
            free = [d for d in range(len(graph.nodes[read].shape)) if d not in batch and d not in contracted]
            simple = batch == list(range(len(batch))) and len(contracted) <= 1 and len(free) <= 1
            simple &= 1 not in graph.nodes[read].shape
            order = [*batch, *free, *contracted] if side == 0 else [*batch, *contracted, *free]
            operands.append(read if simple else graph.transpose(read, order))
        layout, lost = self._reduced(index)
        made = graph.add("dot_general", Kind.FIRM, operands, *self._local(result, layout), key=_key(op))
        return self._all_reduce(made, result, layout, lost) if lost else made

    def _convolution(self, index: int, reads: list[int]) -> int:
        """Operands with the batch first and features last, kernels with features last, or copies that are so."""
        graph, op, result = self.graph, self._flow.ops[index], self._flow.results[index][0]
        dims = _DIMS.findall(str(op.attributes["dimension_numbers"]))
        left, right, made = ([dim.strip() for dim in each.split(",")] for each in dims[:3])
        space = sorted(dim for dim in left if dim.isdigit())
        operands = [
            graph.transpose(reads[0], [left.index(dim) for dim in ("b", *space, "f")]),
            graph.transpose(reads[1], [right.index(dim) for dim in (*space, "i", "o")]),
        ]
        layout, lost = self._reduced(index)
        shape, nbytes = self._local(result, layout)
        order = [made.index(dim) for dim in ("b", *space, "f")]
        found = graph.add("convolution", Kind.FIRM, operands, [shape[d] for d in order], nbytes, key=_key(op))
        found = graph.transpose(found, [order.index(d) for d in range(len(order))])
        return self._all_reduce(found, result, layout, lost) if lost else found

    def _move(self, source: int, result: int, read: int) -> int:
        """A change of layout: cuts first, then axes that go to another dim, then what is gathered."""
        before, after = self._layouts[source], self._layouts[result]
        graph, now = self.graph, before
        held = {axis for axes in before for axis in axes}
        cut = tuple(
            (*old, *(axis for axis in new if axis not in held)) if new[: len(old)] == old else old
            for old, new in zip(before, after, strict=True)
        )
        if cut != now:
            read = self._cut(read, result, cut)
            now = cut
        if now == after:
            return read
        wanted = {axis for axes in after for axis in axes}
        gone = [d for d, (old, new) in enumerate(zip(now, after, strict=True)) if set(old) - set(new)]
        moved = [axis for dim in gone for axis in now[dim] if axis in wanted and axis not in after[dim]]
        shape, nbytes = self._local(result, after)
        if moved:
            between = self._local(result, now)[1]
            sent = graph.add("pieces", Kind.LOOSE, (read,), (math.prod(self._local(result, now)[0]),), between, key=str(after))
            read = graph.add("all_to_all", Kind.FIRM, (sent,), shape, between, key=str(after))
            if between != nbytes:
                read = graph.add("all_gather", Kind.FIRM, (read,), shape, nbytes, key=str(after))
            return graph.transpose(graph.add("regroup", Kind.LOOSE, (read,), shape, nbytes, key="regroup"), range(len(shape)))
        for dim in gone:
            now = (*now[:dim], after[dim], *now[dim + 1 :])
            shape, nbytes = self._local(result, now)
            order = [dim, *(d for d in range(len(shape)) if d != dim)]
            read = graph.transpose(read, order)
            read = graph.add("all_gather", Kind.FIRM, (read,), [shape[d] for d in order], nbytes, key=str(now))
            read = graph.transpose(read, [order.index(d) for d in range(len(shape))])
        if now != after:  # the same axes in another order, or devices that change places
            read = graph.add("permute", Kind.FIRM, (read,), shape, self._local(result)[1], key=str(after))
        return read


def _is_splat(attribute: ir.Attribute) -> bool:
    return ir.DenseElementsAttr(attribute).is_splat if isinstance(attribute, ir.DenseElementsAttr) else False


def _key(op: ir.Operation) -> object:
    """What makes ops of one name with the same operands equal; None where regions would have to be compared."""
    if len(op.regions):
        return None
    attributes = op.attributes
    return tuple((name, str(attributes[name])) for name in attributes if name != SHARDING and name[:8] != "bactrian")
