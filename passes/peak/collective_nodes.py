"""Nodes for what devices send each other: reshards, all-reduces, reduce-scatters and halo exchanges."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxlib.mlir import ir

from bactrian.passes.ir.meshes import spec_of, spec_or_replicated
from bactrian.passes.ir.tensor_sizes import type_bytes
from bactrian.passes.machine.spec import Spec
from bactrian.passes.peak.value_graph import Graph, Kind
from bactrian.passes.sharding.scattered_sums import ScatteredSum
from bactrian.passes.spmd.halo_rules import halos_of


class CollectiveNodes:
    """Adds collectives to a graph of one device, as partitioners write them.

    Args:
        graph: gets the nodes.
        specs: shardings of values.
        sizes: of the mesh's axes.
        scattered: sums that are written as reduce-scatters, by their value, with the number of their bundle.
    """

    def __init__(
        self,
        graph: Graph,
        specs: Mapping[ir.Value, Spec],
        sizes: Mapping[str, int],
        scattered: Mapping[ir.Value, tuple[ScatteredSum, int]],
    ) -> None:
        self._graph, self._specs, self._sizes, self._scattered = graph, specs, sizes, scattered

    def is_scattered(self, value: ir.Value) -> bool:
        """Whether a value is a sum that is written as a reduce-scatter."""
        return value in self._scattered

    def spec(self, value: ir.Value) -> Spec:
        """The sharding of a value; replicated where none is known."""
        known = self._specs.get(value)
        return spec_or_replicated(None, value.type) if known is None else known

    def local(self, value: ir.Value, spec: Spec | None = None) -> tuple[tuple[int, ...], int]:
        """Shape and bytes of a device's shard, with the value's own sharding or another one."""
        type_ = value.type
        if not isinstance(type_, ir.RankedTensorType):
            return (), 0
        shape = (self.spec(value) if spec is None else spec).local_shape(type_.shape, self._sizes)
        return shape, type_bytes(type_) // max(1, math.prod(type_.shape)) * math.prod(shape)

    def halo_exchange(self, op: ir.Operation, reads: list[int]) -> list[int]:
        """What an op reads, with the halo that neighbours send: rows are sliced off, sent, and put beside the shard."""
        graph, made = self._graph, self.spec(op.results[0])
        for halo in halos_of(op):
            at, dim = halo.operand, halo.dim
            axes = self.spec(op.operands[at]).dims[dim]
            partner = made if halo.partner is None else self.spec(op.operands[halo.partner])
            parts = math.prod(self._sizes[axis] for axis in axes)
            if parts == 1 or axes != partner.dims[halo.partner_dim] or not any(halo.rows(parts)):
                continue
            node = graph.nodes[reads[at]]
            row = node.nbytes // max(1, node.shape[dim])
            pieces = [reads[at]]
            for side, rows in enumerate(halo.rows(parts)):
                shape = [*node.shape[:dim], rows, *node.shape[dim + 1 :]]
                if rows:
                    cut = graph.add("slice", Kind.LOOSE, pieces[:1], shape, rows * row, key=(dim, side))
                    pieces.append(graph.add("permute", Kind.FIRM, (cut,), shape, rows * row))
            span = halo.span(parts)
            shape = [*node.shape[:dim], span, *node.shape[dim + 1 :]]
            reads[at] = graph.add("concatenate", Kind.LOOSE, pieces, shape, span * row)
        return reads

    def reshard(self, op: ir.Operation, read: int) -> int:
        """A reshard: slices first, then axes that go to another dim, then what is gathered."""
        graph, result = self._graph, op.results[0]
        now, after = self.spec(op.operands[0]), self.spec(result)
        held = set(now.axes)
        cut = Spec(
            tuple(
                (*old, *(axis for axis in new if axis not in held)) if new[: len(old)] == old else old
                for old, new in zip(now.dims, after.dims, strict=True)
            )
        )
        if cut != now:
            read, now = self._slice(read, result, cut), cut
        if now == after:
            return read
        wanted = set(after.axes)
        gone = [dim for dim, (old, new) in enumerate(zip(now.dims, after.dims, strict=True)) if set(old) - set(new)]
        if any(axis in wanted for dim in gone for axis in now.dims[dim] if axis not in after.dims[dim]):
            return self._all_to_all(read, result, now, after)
        major = graph.order(read)
        for dim in gone:
            now = now.with_dim(dim, (axis for axis in now.dims[dim] if axis in after.dims[dim]))
            shape, nbytes = self.local(result, now)
            order = [dim, *(d for d in major if d != dim)]
            read = graph.transpose(read, order)
            read = graph.add("all_gather", Kind.FIRM, (read,), [shape[d] for d in order], nbytes, key=now)
            read = graph.transpose(read, [order.index(d) for d in range(len(shape))])
        if now != after:  # the same axes in another order: devices change places
            read = graph.add("permute", Kind.FIRM, (read,), *self.local(result), key=after)
        return read

    def _all_to_all(self, read: int, result: ir.Value, before: Spec, after: Spec) -> int:
        """An axis goes from one dim to another: shards are sliced, sent, and put together."""
        graph = self._graph
        shape, between = self.local(result, before)
        target, nbytes = self.local(result)
        read = graph.add("pieces", Kind.LOOSE, (read,), (math.prod(shape),), between, key=after)
        read = graph.add("all_to_all", Kind.FIRM, (read,), target, between, key=after)
        if nbytes > between:
            read = graph.add("all_gather", Kind.FIRM, (read,), target, nbytes, key=after)
        return graph.add("regroup", Kind.LOOSE, (read,), target, nbytes, key=after)

    def all_reduce(self, made: int, result: ir.Value, spec: Spec, lost: tuple[str, ...]) -> int:
        """The sum over devices of a partial result, sliced afterwards where its own sharding says so; or a reduce-scatter.

        Args:
            made: the node of the partial result.
            result: the value that it is part of.
            spec: how the partial result is sharded.
            lost: the axes over which it is partial.
        """
        if result in self._scattered:
            return self._reduce_scatter(made, result)
        shape, nbytes = self.local(result, spec)
        group = ("all_reduce", tuple(sorted(lost)), str(ir.RankedTensorType(result.type).element_type))
        total = self._graph.add("all_reduce", Kind.FIRM, (made,), shape, nbytes, group=group, key=group)
        return total if spec == self.spec(result) else self._slice(total, result, self.spec(result))

    def _reduce_scatter(self, made: int, result: ir.Value) -> int:
        """Each device's shard of a sum, sent with those of its bundle, into which shards are copied first."""
        found, number = self._scattered[result]
        spec = spec_of(found.move.attributes["sharding"])
        group = "reduce_scatter", number
        node = self._graph.nodes[made]
        made = self._graph.add(
            "pieces", Kind.LOOSE, (made,), (math.prod(node.shape),), node.nbytes, group=("pieces", number), key=group
        )
        return self._graph.add("reduce_scatter", Kind.FIRM, (made,), *self.local(result, spec), group=group, key=group)

    def _slice(self, read: int, result: ir.Value, spec: Spec) -> int:
        """A device's own shard; of what is broadcast no more than that is made."""
        node = self._graph.nodes[read]
        whole = node.name in ("broadcast_in_dim", "constant") and node.kind is Kind.LOOSE
        name, operands = (node.name, node.operands) if whole else ("slice", (read,))
        key = spec, node.key if whole else None
        dims = node.dims if whole else ()
        return self._graph.add(name, Kind.LOOSE, operands, *self.local(result, spec), key=key, dims=dims)
