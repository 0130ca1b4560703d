"""The devices of a mesh, as the program of one of them sees them: its own place, and groups of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, scalar_i32, splat
from bactrian.passes.machine.spec import MeshAxes


def device_groups(axes: MeshAxes, along: Sequence[str]) -> np.ndarray:
    """The devices that differ along some axes only, a row for each group; in a row the first of these axes is the major
    one.

    >>> device_groups((("a", 2), ("b", 2)), ["a"]).tolist()
    [[0, 2], [1, 3]]
    """
    names = [name for name, _ in axes]
    numbers = np.arange(math.prod(size for _, size in axes), dtype=np.int64).reshape([size for _, size in axes])
    others = [dim for dim, name in enumerate(names) if name not in along]
    order = [*others, *(names.index(name) for name in along)]
    return np.ascontiguousarray(numbers.transpose(order).reshape(-1, math.prod(dict(axes)[name] for name in along)))


class Devices:
    """The mesh of a function, and where in it a device is.

    Args:
        axes: of the mesh, row-major: the number of a device is that of ``stablehlo.partition_id``.
        block: of the device's program; what computes its place stands at the block's beginning.
    """

    def __init__(self, axes: MeshAxes, block: ir.Block) -> None:
        self.axes, self.sizes, self._block = axes, dict(axes), block
        self._last: ir.Operation | None = None
        self._indices: dict[tuple[str, ...], ir.Value] = {}

    @property
    def count(self) -> int:
        """Of all devices."""
        return math.prod(self.sizes.values())

    def group_size(self, axes: Sequence[str]) -> int:
        """Devices along some axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def groups(self, axes: Sequence[str]) -> np.ndarray:
        """As `device_groups`."""
        return device_groups(self.axes, axes)

    def in_mesh_order(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The same axes, in the mesh's order."""
        return tuple(name for name, _ in self.axes if name in axes)

    def coordinates(self, device: int) -> Mapping[str, int]:
        """The place of a device along every axis."""
        found = dict[str, int]()
        for name, size in reversed(self.axes):
            device, found[name] = divmod(device, size)
        return found

    def number(self, coordinates: Mapping[str, int]) -> int:
        """The inverse of `coordinates`."""
        device = 0
        for name, size in self.axes:
            device = device * size + coordinates[name]
        return device

    def index(self, axes: Sequence[str]) -> ir.Value:
        """The number of the device's shard along some axes, the major one first: ``tensor<i32>``."""
        key = tuple(axes)
        if key not in self._indices:
            with self._place():
                value: ir.Value | None = None
                for axis in key:
                    coordinate = self._coordinate(axis)
                    if value is None:
                        value = coordinate
                    else:
                        value = binary("stablehlo.multiply", value, splat(scalar_i32(), self.sizes[axis]))
                        value = binary("stablehlo.add", value, coordinate)
                self._indices[key] = splat(scalar_i32(), 0) if value is None else value
                self._last = ir.OpResult(self._indices[key]).owner.operation
        return self._indices[key]

    def _coordinate(self, axis: str) -> ir.Value:
        names = [name for name, _ in self.axes]
        stride = math.prod(size for _, size in self.axes[names.index(axis) + 1 :])
        value = self._number()
        if stride > 1:
            value = binary("stablehlo.divide", value, splat(scalar_i32(), stride))
        if stride * self.sizes[axis] < self.count:
            value = binary("stablehlo.remainder", value, splat(scalar_i32(), self.sizes[axis]))
        return value

    def _number(self) -> ir.Value:
        """The device's own, once per program."""
        if () not in self._indices:
            unsigned = ir.RankedTensorType.get([], ir.IntegerType.get_unsigned(32))
            number = ir.Operation.create("stablehlo.partition_id", results=[unsigned]).results[0]
            self._indices[()] = ir.Operation.create(
                "stablehlo.convert", results=[scalar_i32()], operands=[number]
            ).results[0]
        return self._indices[()]

    def _place(self) -> ir.InsertionPoint:
        """Behind what is there already of this kind."""
        return (
            ir.InsertionPoint.at_block_begin(self._block) if self._last is None else ir.InsertionPoint.after(self._last)
        )
