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
from bactrian.passes.ir.meshes import SHARDING, spec_of, spec_or_replicated, value_shardings
from bactrian.passes.ir.op_traits import CONTRACTING, HAS_OWN_BUFFER, without_dialect
from bactrian.passes.ir.regions import body, nested_operations
from bactrian.passes.ir.tensor_sizes import type_bytes
from bactrian.passes.machine.spec import Spec
from bactrian.passes.peak.value_graph import Graph, Kind
from bactrian.passes.sharding.halo_rules import borders_of
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
    """Reads one block; what it takes from outside are arguments too."""

    def __init__(
        self,
        block: ir.Block,
        specs: Mapping[ir.Value, Spec],
        sizes: Mapping[str, int],
        scattered: Mapping[ir.Value, tuple[ScatteredSum, int]],
    ) -> None:
        self.graph = Graph()
        self._specs, self._sizes, self._scattered = specs, sizes, scattered
        self._node = dict[ir.Value, int]()
        for value in block.arguments:
            self._argument(value)
        operations = [view.operation for view in block.operations]
        for op in operations[:-1]:
            self._read(op)
        self.graph.results = [self._of(value) for value in operations[-1].operands]

    def _argument(self, value: ir.Value) -> int:
        self._node[value] = self.graph.add("argument", Kind.ARGUMENT, (), *self._local(value))
        return self._node[value]

    def _of(self, value: ir.Value) -> int:
        found = self._node.get(value)
        return self._argument(value) if found is None else found

    def _spec(self, value: ir.Value) -> Spec:
        known = self._specs.get(value)
        return spec_or_replicated(None, value.type) if known is None else known

    def _local(self, value: ir.Value, spec: Spec | None = None) -> tuple[tuple[int, ...], int]:
        """Shape and bytes of a device's shard, with the value's own sharding or another one."""
        type_ = value.type
        if not isinstance(type_, ir.RankedTensorType):
            return (), 0
        shape = (self._spec(value) if spec is None else spec).local_shape(type_.shape, self._sizes)
        return shape, type_bytes(type_) // max(1, math.prod(type_.shape)) * math.prod(shape)

    def _read(self, op: ir.Operation) -> None:
        name = op.name.rpartition(".")[2]
        reads = [self._of(value) for value in op.operands]
        if name == "optimization_barrier":  # gone before values are looked at: what it kept apart is one again
            self._node |= zip(op.results, reads, strict=True)
        elif name in _LOOPS or len(op.results) != 1:
            self._several(op, name, reads)
        elif name == "reshard" and op.operands[0] in self._scattered:
            self._node[op.results[0]] = reads[0]
        elif name in ("reshard", "sharding_constraint"):
            self._node[op.results[0]] = self._move(op, reads[0])
        elif name == "dot_general":
            self._node[op.results[0]] = self._dot(op, reads)
        elif name == "convolution":
            self._node[op.results[0]] = self._convolution(op, reads)
        else:
            self._node[op.results[0]] = self._plain(op, name, reads)

    def _bordered(self, op: ir.Operation, reads: list[int]) -> list[int]:
        """What an op reads, with the borders that neighbours send: they are cut off, sent, and put beside the piece."""
        graph, made = self.graph, self._spec(op.results[0])
        for border in borders_of(op):
            at, dim = border.operand, border.dim
            axes = self._spec(op.operands[at]).dims[dim]
            partner = made if border.partner is None else self._spec(op.operands[border.partner])
            parts = math.prod(self._sizes[axis] for axis in axes)
            if parts == 1 or axes != partner.dims[border.partner_dim] or not any(border.rows(parts)):
                continue
            node = graph.nodes[reads[at]]
            row = node.nbytes // max(1, node.shape[dim])
            pieces = [reads[at]]
            for side, rows in enumerate(border.rows(parts)):
                shape = [*node.shape[:dim], rows, *node.shape[dim + 1 :]]
                if rows:
                    cut = graph.add("slice", Kind.LOOSE, pieces[:1], shape, rows * row, key=(dim, side))
                    pieces.append(graph.add("permute", Kind.FIRM, (cut,), shape, rows * row))
            span = border.span(parts)
            shape = [*node.shape[:dim], span, *node.shape[dim + 1 :]]
            reads[at] = graph.add("concatenate", Kind.LOOSE, pieces, shape, span * row)
        return reads

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
        empty = graph.add("broadcast", Kind.FIRM, (), shape, self._local(op.results[0])[1], key="windows")
        return [empty, indices, *reads[1:]]

    def _plain(self, op: ir.Operation, name: str, reads: list[int]) -> int:
        graph, result = self.graph, op.results[0]
        reads = self._bordered(op, reads)
        if name == "select_and_scatter":
            reads = self._expanded(op, reads)
        spec, lost = self._partial(op, name)
        shape, nbytes = self._local(result, spec)
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
        return self._all_reduce(made, result, spec, lost) if lost else made

    def _several(self, op: ir.Operation, name: str, reads: list[int]) -> None:
        """An op with several results; a loop needs what one round of it needs."""
        graph, rounds = self.graph, list[Graph]()
        if name in _LOOPS:
            inside = {operand for nested in nested_operations(op) for operand in nested.operands}
            reads = [*reads, *(self._node[value] for value in self._node if value in inside)]
            for region in op.regions:
                inner = _Reader(region.blocks[0], self._specs, self._sizes, self._scattered).graph
                if name == "while" and len(inner.results) == len(op.results):
                    inner.aliases = {number: number for number in range(len(inner.results))}
                rounds.append(inner)
        whole = graph.add(name, Kind.FIRM, reads, (), 0, inside=tuple(rounds))
        for position, result in enumerate(op.results):
            self._node[result] = graph.add(
                "part", Kind.PART, (whole,), *self._local(result), key=position, place=position if name == "while" else None
            )  # fmt: skip

    def _partial(self, op: ir.Operation, name: str) -> tuple[Spec, tuple[str, ...]]:
        """How an op's partial results are sharded, and the axes over which they are partial."""
        spec = self._spec(op.results[0])
        if name not in _CONTRACTS:
            return spec, ()
        first = self._spec(op.operands[0]).dims
        if name == "dot_general":
            numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
            lost = [axis for dim in numbers.lhs_contracting_dimensions for axis in first[dim]]
        elif name == "reduce":
            lost = [axis for dim in ir.DenseI64ArrayAttr(op.attributes["dimensions"]) for axis in first[dim]]
        else:
            read = [first] if name == "gather" else [self._spec(value).dims for value in op.operands]
            kept = set(spec.axes)
            lost = list(dict.fromkeys(a for each in read for axes in each for a in axes if a not in kept))
        return Spec(tuple(tuple(axis for axis in axes if axis not in lost) for axes in spec.dims)), tuple(lost)

    def _all_reduce(self, made: int, result: ir.Value, spec: Spec, lost: tuple[str, ...]) -> int:
        """The sum over devices of a partial result, sliced afterwards where its own sharding says so; or each device's shard of
        it at once."""
        if result in self._scattered:
            return self._reduce_scatters(made, result)
        shape, nbytes = self._local(result, spec)
        group = ("all_reduce", tuple(sorted(lost)), str(ir.RankedTensorType(result.type).element_type))
        total = self.graph.add("all_reduce", Kind.FIRM, (made,), shape, nbytes, group=group, key=group)
        return total if spec == self._spec(result) else self._cut(total, result, self._spec(result))

    def _reduce_scatters(self, made: int, result: ir.Value) -> int:
        """Each device's piece of a sum, sent with those of its bundle: pieces are brought together first."""
        found, number = self._scattered[result]
        spec = spec_of(found.move.attributes["sharding"])
        group = "reduce_scatter", number
        node = self.graph.nodes[made]
        made = self.graph.add(
            "pieces", Kind.LOOSE, (made,), (math.prod(node.shape),), node.nbytes, group=("pieces", number), key=group
        )
        return self.graph.add("reduce_scatter", Kind.FIRM, (made,), *self._local(result, spec), group=group, key=group)

    def _cut(self, read: int, result: ir.Value, spec: Spec) -> int:
        """A device's own piece; of what is broadcast no more than that is made."""
        node = self.graph.nodes[read]
        whole = node.name in ("broadcast_in_dim", "constant") and node.kind is Kind.LOOSE
        name, operands = (node.name, node.operands) if whole else ("slice", (read,))
        key = spec, node.key if whole else None
        dims = node.dims if whole else ()
        return self.graph.add(name, Kind.LOOSE, operands, *self._local(result, spec), key=key, dims=dims)

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
        made = graph.add("dot_general", Kind.FIRM, operands, *self._local(result, spec), key=_key(op))
        return self._all_reduce(made, result, spec, lost) if lost else made

    def _merged(self, read: int) -> int:
        """What a product reads: dims of one kind are one."""
        node = self.graph.nodes[read]
        return self.graph.add("reshape", Kind.VIEW, (read,), (math.prod(node.shape),), node.nbytes, key="merged")

    def _convolution(self, op: ir.Operation, reads: list[int]) -> int:
        """Of operands with the batch first and features last, and of kernels with features last."""
        graph, result, reads = self.graph, op.results[0], self._bordered(op, reads)
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
        shape, nbytes = self._local(result, spec)
        order = [made.index(dim) for dim in ("b", *space, "f")]
        found = graph.add("convolution", Kind.FIRM, operands, [shape[d] for d in order], nbytes, key=_key(op))
        found = graph.transpose(found, [order.index(d) for d in range(len(order))])
        return self._all_reduce(found, result, spec, lost) if lost else found

    def _move(self, op: ir.Operation, read: int) -> int:
        """A reshard: slices first, then axes that go to another dim, then what is gathered."""
        graph, result = self.graph, op.results[0]
        now, after = self._spec(op.operands[0]), self._spec(result)
        held = set(now.axes)
        cut = Spec(
            tuple(
                (*old, *(axis for axis in new if axis not in held)) if new[: len(old)] == old else old
                for old, new in zip(now.dims, after.dims, strict=True)
            )
        )
        if cut != now:
            read, now = self._cut(read, result, cut), cut
        if now == after:
            return read
        wanted = set(after.axes)
        gone = [dim for dim, (old, new) in enumerate(zip(now.dims, after.dims, strict=True)) if set(old) - set(new)]
        if any(axis in wanted for dim in gone for axis in now.dims[dim] if axis not in after.dims[dim]):
            return self._exchange(read, result, now, after)
        major = graph.order(read)
        for dim in gone:
            now = now.with_dim(dim, (axis for axis in now.dims[dim] if axis in after.dims[dim]))
            shape, nbytes = self._local(result, now)
            order = [dim, *(d for d in major if d != dim)]
            read = graph.transpose(read, order)
            read = graph.add("all_gather", Kind.FIRM, (read,), [shape[d] for d in order], nbytes, key=now)
            read = graph.transpose(read, [order.index(d) for d in range(len(shape))])
        if now != after:  # the same axes in another order: devices change places
            read = graph.add("permute", Kind.FIRM, (read,), *self._local(result), key=after)
        return read

    def _exchange(self, read: int, result: ir.Value, before: Spec, after: Spec) -> int:
        """An axis goes from one dim to another: pieces are cut, sent, and put together."""
        graph = self.graph
        shape, between = self._local(result, before)
        target, nbytes = self._local(result)
        read = graph.add("pieces", Kind.LOOSE, (read,), (math.prod(shape),), between, key=after)
        read = graph.add("all_to_all", Kind.FIRM, (read,), target, between, key=after)
        if nbytes > between:
            read = graph.add("all_gather", Kind.FIRM, (read,), target, nbytes, key=after)
        return graph.add("regroup", Kind.LOOSE, (read,), target, nbytes, key=after)


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
