"""One op of a function that is partitioned: what a device has of its operands, and what it has to make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, scalar_i32, splat
from bactrian.passes.machine.spec import Spec
from bactrian.passes.spmd.collectives import Collectives
from bactrian.passes.spmd.devices import Devices
from bactrian.passes.spmd.reshards import Resharder, scattered_dims
from bactrian.passes.spmd.sharding_rules import Dims, Rule


@dataclass
class LocalOp:
    """What a form needs to write an op for one device. Ops are written at the current insertion point and location.

    Attributes:
        op: of the whole tensors. It is only read.
        operands: a device's shards.
        reads: the specs of the operands.
        makes: the specs of the results, after reductions. ``unreduced`` says what the op must leave unreduced.
        rule: of the op.
        axes_of: the axes that shard each factor of the rule; none for those that are not there.
        devices: the mesh.
        collectives, resharder: write these.
        read_inside: lets the regions of a copy of the op read shards of what they read from outside.
        scatter_to: where the only result is read only with a spec that a reduce-scatter gives, that spec.
    """

    op: ir.Operation
    operands: list[ir.Value]
    reads: Sequence[Spec]
    makes: Sequence[Spec]
    rule: Rule
    axes_of: Mapping[int, tuple[str, ...]]
    collectives: Collectives
    read_inside: Callable[[ir.Operation], None]
    scatter_to: Spec | None = None
    scattered: bool = field(default=False, init=False)

    @property
    def devices(self) -> Devices:
        """The mesh."""
        return self.collectives.devices

    @property
    def resharder(self) -> Resharder:
        """Writes reshards."""
        return Resharder(self.collectives)

    @property
    def reduced(self) -> tuple[str, ...]:
        """The axes over which devices have partial results, in the mesh's order."""
        axes = [axis for factor in self.rule.reduction for axis in self.axes_of.get(factor, ())]
        return self.devices.in_mesh_order(axes)

    def local_type(self, type_: ir.Type, spec: Spec) -> ir.RankedTensorType:
        """The type of a device's shard."""
        tensor = ir.RankedTensorType(type_)
        return ir.RankedTensorType.get(spec.local_shape(tensor.shape, self.devices.sizes), tensor.element_type)

    def result_types(self) -> list[ir.Type]:
        """Of the device's shards of the results."""
        return [self.local_type(value.type, spec) for value, spec in zip(self.op.results, self.makes, strict=True)]

    def clone(
        self,
        operands: Sequence[ir.Value] | None = None,
        attributes: Mapping[str, ir.Attribute] | None = None,
        types: Sequence[ir.Type] | None = None,
    ) -> list[ir.Value]:
        """The same op on shards; its regions are copied.

        Args:
            operands: by default the shards of the operands.
            attributes: those that differ.
            types: of the results, by default of their shards.
        """
        made = self.op.clone().operation
        for number, value in enumerate(self.operands if operands is None else operands):
            made.operands[number] = value
        for name, attribute in (attributes or {}).items():
            made.attributes[name] = attribute
        self.read_inside(made)
        if "sdy.sharding" in made.attributes:
            del made.attributes["sdy.sharding"]
        for result, type_ in zip(made.results, self.result_types() if types is None else types, strict=True):
            result.set_type(type_)
        return list(made.results)

    def add_up(self, value: ir.Value) -> ir.Value:
        """The sum of the devices' partial results; only a shard of it where no more is read, and nothing at all where the
        result stays unreduced."""
        axes = tuple(axis for axis in self.reduced if axis not in self.makes[0].unreduced)
        if not axes:
            return value
        source = Spec(self.makes[0].dims, axes)
        if self.scatter_to is not None and scattered_dims(source, self.scatter_to) is not None:
            self.scattered = True
            return self.resharder.reshard(value, source, self.scatter_to)
        return self.collectives.all_reduce(value, axes, "stablehlo.add")

    def first_row(self, axes: Sequence[str], rows: int) -> ir.Value:
        """Where the device's shard of a dim begins in the whole dim: ``tensor<i32>``.

        Args:
            axes: that shard the dim.
            rows: of a shard.
        """
        if not axes:
            return splat(scalar_i32(), 0)
        return binary("stablehlo.multiply", self.devices.index(axes), splat(scalar_i32(), rows))


def factor_axes(
    tensors: Sequence[Dims], specs: Sequence[Spec], sizes: Sequence[int], devices: Devices
) -> dict[int, tuple[str, ...]] | None:
    """The axes that shard each factor of a rule; None where tensors differ on it, or a shard would have strides.

    Args:
        tensors: of each tensor the factors of its dims.
        specs: of each tensor.
        sizes: of the factors.
        devices: the mesh.
    """
    found = dict[int, tuple[str, ...]]()
    for dims, spec in zip(tensors, specs, strict=True):
        for factors, axes in zip(dims, spec.dims, strict=True):
            left = list(axes)
            for factor in factors:
                mine = list[str]()
                while left and devices.group_size(mine) < sizes[factor]:
                    mine.append(left.pop(0))
                if left and devices.group_size(mine) != sizes[factor]:
                    return None
                if sizes[factor] % devices.group_size(mine) or found.setdefault(factor, tuple(mine)) != tuple(mine):
                    return None
            if any(devices.sizes[axis] > 1 for axis in left):
                return None
    return found


def shards(spec: Spec, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
    """Whether a spec splits every dim into equal shards."""
    return all(size % math.prod(sizes[axis] for axis in axes) == 0 for size, axes in zip(shape, spec.dims, strict=True))
