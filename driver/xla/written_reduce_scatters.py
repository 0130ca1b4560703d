"""Reduce-scatters for CPUs, where XLA makes none of its own."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.passes.frame.location import name_stack
from bactrian.passes.ir.meshes import SHARDING, mesh_name, sharding_attribute, spec_of, value_shardings
from bactrian.passes.ir.regions import body, nested_operations, terminator
from bactrian.passes.machine.spec import MeshAxes, Spec
from bactrian.passes.sharding.scattered_sums import ScatteredSum, bundles, scattered_sums

_DEVICE_TO_DEVICE = 1  # stablehlo's type of a channel
_NUMBER = re.compile(r"op\.\d+/")


def write_reduce_scatters(main: ir.Operation, axes: MeshAxes) -> None:
    """Write sums that are cut along the axes that they are summed over as what each device does.

    A partitioner makes an all-reduce of a partial result, and a slice of that: twice the bytes of the reduce-scatter that was
    planned. XLA for CPUs leaves it at that. So such an op becomes an ``sdy.manual_computation`` on its pieces, with a
    ``stablehlo.reduce_scatter`` at its end. The results of small ones are put into one tensor first, and share one.

    Args:
        main: of a module for XLA on CPUs, with its moves still ``sdy.reshard``.
        axes: of its mesh.
    """
    together = bundles(main, list(scattered_sums(main)), dict(axes))
    for channel, bundle in enumerate(together, 1):
        sums = [_Manual(main, found, axes) for found in bundle]
        if len(sums) == 1:
            sums[0].write(channel)
        else:
            _write_bundle(sums, axes, channel)
    if any(len(bundle) > 1 for bundle in together):
        _sort(main)


class _Manual:
    """One op on its pieces.

    Attributes:
        found: the op, and what cuts its result.
        whole: the type of the result.
        target: its sharding in the end.
        kept: the shape of the piece of it that a device keeps.
    """

    def __init__(self, main: ir.Operation, found: ScatteredSum, axes: MeshAxes) -> None:
        self.found, self._axes, self._sizes = found, axes, dict(axes)
        op = found.op
        self.target = found.move.attributes["sharding"]
        self._mesh = mesh_name(self.target)
        self.whole = op.results[0].type
        values = [*op.operands, op.results[0]]
        shardings = [
            sharding_attribute(Spec.replicated(_rank(value)), self._mesh) if known is None else known
            for value, known in zip(values, value_shardings(main, values), strict=True)
        ]
        self._reads, self._partial = shardings[:-1], shardings[-1]
        self.kept = list(self._piece(self.whole, self.target).shape)
        self.along = [name for name, _ in axes if name in found.axes]
        self.groups = device_groups(axes, self.along)

    def write(self, channel: int) -> None:
        """Put it in the op's place; the move stays, and changes nothing any more."""
        op = self.found.op
        with ir.InsertionPoint(op), op.location:
            manual = _manual(self._axes, list(op.operands), self._reads, [self.whole], [self.target], self._pieces())
            with ir.InsertionPoint(manual.regions[0].blocks[0]):
                made = self._op(manual.regions[0].blocks[0])
                if len(self.found.scatters) == 1:
                    ((dim, along),) = self.found.scatters
                    made = _scatter(made, dim, device_groups(self._axes, along), channel)
                else:
                    made = _reshaped(_scatter(self._packed(made), 0, self.groups, channel), self.kept)
                ir.Operation.create("sdy.return", operands=[made])
        self.found.move.operands[0] = manual.results[0]
        op.erase()

    def pack(self) -> ir.Value:
        """Put the op in its place without the collective: each device has the pieces for all of its group, a row each."""
        op = self.found.op
        rows, width = self.groups.shape[1], math.prod(self.kept)
        result = ir.RankedTensorType.get([rows * self.groups.size, width], ir.RankedTensorType(self.whole).element_type)
        with ir.InsertionPoint(op), op.location:
            manual = _manual(
                self._axes, list(op.operands), self._reads, [result], [self.rows_sharding()], self._pieces()
            )
            with ir.InsertionPoint(manual.regions[0].blocks[0]):
                ir.Operation.create("sdy.return", operands=[self._packed(self._op(manual.regions[0].blocks[0]))])
        return manual.results[0]

    def rows_sharding(self) -> ir.Attribute:
        """That of what `pack` gives: every device has rows of its own."""
        return sharding_attribute(Spec((tuple(name for name, _ in self._axes), ())), self._mesh)

    def _op(self, block: ir.Block) -> ir.Value:
        """The op on a device's pieces."""
        inside = self.found.op.clone().operation
        for number, argument in enumerate(block.arguments):
            inside.operands[number] = argument
        if SHARDING in inside.attributes:
            del inside.attributes[SHARDING]
        made = inside.results[0]
        made.set_type(self._piece(made.type, self._partial))
        return made

    def _packed(self, value: ir.Value) -> ir.Value:
        """A partial result as rows, one for each device of a group in its order."""
        shape, at = list[int](), dict[str, int]()
        added, rest = dict(self.found.scatters), list[int]()
        for dim, size in enumerate(self.kept):
            for axis in added.get(dim, ()):
                at[axis] = len(shape)
                shape.append(self._sizes[axis])
            rest.append(len(shape))
            shape.append(size)
        order = [at[axis] for axis in self.along] + rest
        value = _reshaped(value, shape)
        if order != sorted(order):
            type_ = ir.RankedTensorType.get([shape[dim] for dim in order], ir.RankedTensorType(value.type).element_type)
            permutation: dict[str, ir.Attribute] = {"permutation": ir.DenseI64ArrayAttr.get(order)}
            value = ir.Operation.create("stablehlo.transpose", [type_], [value], permutation).results[0]
        return _reshaped(value, [self.groups.shape[1], math.prod(self.kept)])

    def _pieces(self) -> list[ir.Type]:
        operands = zip(self.found.op.operands, self._reads, strict=True)
        return [self._piece(value.type, sharding) for value, sharding in operands]

    def _piece(self, type_: ir.Type, sharding: ir.Attribute) -> ir.RankedTensorType:
        tensor = ir.RankedTensorType(type_)
        return ir.RankedTensorType.get(spec_of(sharding).local_shape(tensor.shape, self._sizes), tensor.element_type)


def _write_bundle(sums: Sequence[_Manual], axes: MeshAxes, channel: int) -> None:
    """Put several ops in their places, and one collective for all after the last one: others may have to be sorted."""
    last = sums[-1].found.op
    packed = [one.pack() for one in sums]
    wholes, targets = [one.whole for one in sums], [one.target for one in sums]
    rows, element = sums[0].groups.shape[1], ir.RankedTensorType(sums[0].whole).element_type
    widths = [math.prod(one.kept) for one in sums]
    types = [ir.RankedTensorType.get([rows, width], element) for width in widths]
    with ir.InsertionPoint(last), _shared_location([one.found.op for one in sums]):
        manual = _manual(axes, packed, [one.rows_sharding() for one in sums], wholes, targets, types)
        block = manual.regions[0].blocks[0]
        with ir.InsertionPoint(block):
            joined = ir.Operation.create(
                "stablehlo.concatenate",
                [ir.RankedTensorType.get([rows, sum(widths)], element)],
                list(block.arguments),
                {"dimension": _i64(1)},
            ).results[0]
            made, begin = _scatter(joined, 0, sums[0].groups, channel), 0
            kept = list[ir.Value]()
            for one, width in zip(sums, widths, strict=True):
                bounds = {"start_indices": [0, begin], "limit_indices": [1, begin + width], "strides": [1, 1]}
                attributes: dict[str, ir.Attribute] = {n: ir.DenseI64ArrayAttr.get(x) for n, x in bounds.items()}
                type_ = ir.RankedTensorType.get([1, width], element)
                piece = ir.Operation.create("stablehlo.slice", [type_], [made], attributes).results[0]
                kept.append(_reshaped(piece, one.kept))
                begin += width
            ir.Operation.create("sdy.return", operands=kept)
    for one, result in zip(sums, manual.results, strict=True):
        one.found.move.operands[0] = result
        one.found.op.erase()


def _manual(
    axes: MeshAxes,
    operands: list[ir.Value],
    reads: Sequence[ir.Attribute],
    results: Sequence[ir.Type],
    targets: Sequence[ir.Attribute],
    pieces: Sequence[ir.Type],
) -> ir.Operation:
    names = ", ".join(f'"{name}"' for name, _ in axes)
    manual = ir.Operation.create(
        "sdy.manual_computation",
        results=list(results),
        operands=operands,
        attributes={
            "in_shardings": sdy.TensorShardingPerValueAttr.get(list(reads)),
            "out_shardings": sdy.TensorShardingPerValueAttr.get(list(targets)),
            "manual_axes": ir.Attribute.parse(f"#sdy<manual_axes{{{names}}}>"),
        },
        regions=1,
    )
    manual.regions[0].blocks.append(*pieces, arg_locs=[manual.location] * len(pieces))
    return manual


def _scatter(value: ir.Value, dim: int, groups: np.ndarray, channel: int) -> ir.Value:
    """Add up what the devices of each group have, of which each keeps a piece along a dim."""
    tensor = ir.RankedTensorType(value.type)
    shape = list(tensor.shape)
    shape[dim] //= groups.shape[1]
    scalar = ir.RankedTensorType.get([], tensor.element_type)
    op = ir.Operation.create(
        "stablehlo.reduce_scatter",
        results=[ir.RankedTensorType.get(shape, tensor.element_type)],
        operands=[value],
        attributes={
            "scatter_dimension": _i64(dim),
            "replica_groups": ir.DenseElementsAttr.get(cast(Any, groups)),
            "channel_handle": stablehlo.ChannelHandle.get(channel, _DEVICE_TO_DEVICE),
            "use_global_device_ids": ir.UnitAttr.get(),
        },
        regions=1,
    )
    block = op.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(block):
        stablehlo.ReturnOp([stablehlo.AddOp(*block.arguments).result])
    return op.results[0]


def device_groups(axes: MeshAxes, along: Sequence[str]) -> np.ndarray:
    """The devices that differ along some axes only, a row for each group; in a row the first of these axes is the major one.

    ``device_groups((("a", 2), ("b", 2)), ["a"])`` is ``[[0, 2], [1, 3]]``.
    """
    names = [name for name, _ in axes]
    numbers = np.arange(math.prod(size for _, size in axes), dtype=np.int64).reshape([size for _, size in axes])
    others = [dim for dim, name in enumerate(names) if name not in along]
    order = [*others, *(names.index(name) for name in along)]
    return np.ascontiguousarray(numbers.transpose(order).reshape(-1, math.prod(dict(axes)[name] for name in along)))


def _sort(main: ir.Operation) -> None:
    """Bring the ops of a function into an order in which operands come first; else it stays as it is."""
    operations = [view.operation for view in body(main).operations][:-1]
    index = {op: number for number, op in enumerate(operations)}
    waits, readers = [0] * len(operations), [list[int]() for _ in operations]
    for number, op in enumerate(operations):
        inside = nested_operations(op) if len(op.regions) else ()
        owners = {
            v.owner.operation for each in (op, *inside) for v in each.operands if not isinstance(v.owner, ir.Block)
        }
        sources = {index[owner] for owner in owners if owner in index}
        waits[number] = len(sources)
        for source in sources:
            readers[source].append(number)
    ready = [number for number, count in enumerate(waits) if not count]
    end, written = terminator(main), 0
    while ready:
        number = heapq.heappop(ready)
        operations[number].move_before(end)
        written += 1
        for reader in readers[number]:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    assert written == len(operations), "sums that are scattered together need each other's results"


def _shared_location(ops: Sequence[ir.Operation]) -> ir.Location:
    """That of the first op, with the numbers of all where they have numbers."""
    stacks = [name_stack(op.location) for op in ops]
    numbers = [match[0] for match in map(_NUMBER.match, stacks[1:]) if match]
    return ir.Location.name("".join(numbers) + stacks[0], ops[0].location) if numbers else ops[0].location


def _reshaped(value: ir.Value, shape: Sequence[int]) -> ir.Value:
    tensor = ir.RankedTensorType(value.type)
    if list(tensor.shape) == list(shape):
        return value
    return ir.Operation.create(
        "stablehlo.reshape", [ir.RankedTensorType.get(shape, tensor.element_type)], [value]
    ).results[0]


def _rank(value: ir.Value) -> int:
    return len(ir.RankedTensorType(value.type).shape)


def _i64(number: int) -> ir.Attribute:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), number)
