"""Reduce-scatters as XLA takes them: on CPUs it makes none of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.passes.mesh_tensors import SHARDING, Axes, axis_names, mesh_name, value_shardings
from bactrian.passes.scattered_sums import ScatteredSum, scattered_sums

_DEVICE_TO_DEVICE = 1  # stablehlo's type of a channel


def write_reduce_scatters(main: ir.Operation, axes: Axes) -> int:
    """Write sums that are cut along the axes that they are summed over as what each device does.

    A partitioner makes an all-reduce of a partial result, and a slice of that: twice the bytes of the reduce-scatter that was
    planned. Some compilers make one of the two, XLA for CPUs does not. So such an op becomes an ``sdy.manual_computation``
    on its pieces, with a ``stablehlo.reduce_scatter`` for each dim that is cut.

    Args:
        main: of a module for XLA, with its moves still ``sdy.reshard``.
        axes: of its mesh.

    Returns:
        The number of collectives.
    """
    channel = 0
    for found in list(scattered_sums(main)):
        channel = _Manual(main, found, axes).write(channel)
    return channel


class _Manual:
    """One op on its pieces."""

    def __init__(self, main: ir.Operation, found: ScatteredSum, axes: Axes) -> None:
        self._found, self._axes, self._sizes = found, axes, dict(axes)
        op, move = found.op, found.move
        self._target = move.attributes["sharding"]
        mesh = mesh_name(self._target)
        known = value_shardings(main, [*op.operands, op.results[0]])
        whole = [sdy.TensorShardingAttr.get(mesh, _no_axes(value)) for value in (*op.operands, op.results[0])]
        shardings = [one or other for one, other in zip(known, whole, strict=True)]
        self._reads, self._partial = shardings[:-1], shardings[-1]

    def write(self, channel: int) -> int:
        """Put it in the op's place; the move stays, and changes nothing any more."""
        op, move = self._found.op, self._found.move
        names = ", ".join(f'"{name}"' for name, _ in self._axes)
        value = op.results[0]
        with ir.InsertionPoint(op), op.location:
            manual = ir.Operation.create(
                "sdy.manual_computation",
                results=[value.type],
                operands=list(op.operands),
                attributes={
                    "in_shardings": sdy.TensorShardingPerValueAttr.get(self._reads),
                    "out_shardings": sdy.TensorShardingPerValueAttr.get([self._target]),
                    "manual_axes": ir.Attribute.parse(f"#sdy<manual_axes{{{names}}}>"),
                },
                regions=1,
            )
        types = [self._piece(v.type, sharding) for v, sharding in zip(op.operands, self._reads, strict=True)]
        block = manual.regions[0].blocks.append(*types, arg_locs=[op.location] * len(types))
        move.operands[0] = manual.results[0]
        with ir.InsertionPoint(block), op.location:
            inside = op.clone().operation
            for number, argument in enumerate(block.arguments):
                inside.operands[number] = argument
            if SHARDING in inside.attributes:
                del inside.attributes[SHARDING]
            made = inside.results[0]
            made.set_type(self._piece(made.type, self._partial))
            for dim, axes in self._found.scatters:
                channel += 1
                made = self._scatter(made, dim, axes, channel)
            ir.Operation.create("sdy.return", operands=[made])
        op.erase()
        return channel

    def _piece(self, type_: ir.Type, sharding: ir.Attribute) -> ir.Type:
        tensor = ir.RankedTensorType(type_)
        names = axis_names(sharding)
        shape = [
            size // math.prod(self._sizes[axis] for axis in axes)
            for size, axes in zip(tensor.shape, names or [()] * len(tensor.shape), strict=True)
        ]
        return ir.RankedTensorType.get(shape, tensor.element_type)

    def _scatter(self, value: ir.Value, dim: int, axes: Sequence[str], channel: int) -> ir.Value:
        tensor = ir.RankedTensorType(value.type)
        groups = device_groups(self._axes, axes)
        shape = list(tensor.shape)
        shape[dim] //= groups.shape[1]
        scalar = ir.RankedTensorType.get([], tensor.element_type)
        op = ir.Operation.create(
            "stablehlo.reduce_scatter",
            results=[ir.RankedTensorType.get(shape, tensor.element_type)],
            operands=[value],
            attributes={
                "scatter_dimension": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), dim),
                "replica_groups": ir.DenseIntElementsAttr.get(groups),
                "channel_handle": stablehlo.ChannelHandle.get(channel, _DEVICE_TO_DEVICE),
                "use_global_device_ids": ir.UnitAttr.get(),
            },
            regions=1,
        )
        block = op.regions[0].blocks.append(scalar, scalar)
        with ir.InsertionPoint(block):
            stablehlo.ReturnOp([stablehlo.AddOp(*block.arguments).result])
        return op.results[0]


def device_groups(axes: Axes, along: Sequence[str]) -> np.ndarray:
    """The devices that differ along some axes only, a row for each group; in a row the first of these axes is the major one.

    ``device_groups((("a", 2), ("b", 2)), ["a"])`` is ``[[0, 2], [1, 3]]``.
    """
    names = [name for name, _ in axes]
    numbers = np.arange(math.prod(size for _, size in axes), dtype=np.int64).reshape([size for _, size in axes])
    others = [dim for dim, name in enumerate(names) if name not in along]
    order = [*others, *(names.index(name) for name in along)]
    return np.ascontiguousarray(numbers.transpose(order).reshape(-1, math.prod(dict(axes)[name] for name in along)))


def _no_axes(value: ir.Value) -> list[ir.Attribute]:
    rank = len(ir.RankedTensorType(value.type).shape)
    return [sdy.DimensionShardingAttr.get([], is_closed=True)] * rank
