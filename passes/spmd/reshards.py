"""Resharding as a device does it: from one spec of a value to another by slices and collectives."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, scalar_i32, splat
from bactrian.passes.ir.constants import splat_text
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.spmd.collectives import Collectives
from bactrian.passes.spmd.reshard_paths import reshard_table


class Resharder:
    """Writes the steps of reshards at the current insertion point.

    A spec that is one step away is reached by that step: axes are put behind those of dims (a slice), taken away from
    their ends (an all-gather for each dim), moved from the end of one dim to that of another (an all-to-all), exchanged
    for others (a permute), or summed over (an all-reduce, or reduce-scatters). To every other one goes the path that
    sends least.

    Args:
        collectives: of the program.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives, self._devices = collectives, collectives.devices

    def reshard(self, value: ir.Value, source: Spec, target: Spec) -> ir.Value:
        """A value with another spec.

        Args:
            value: a device's shard, under ``source``.
            source, target: the specs; their dims divide.
        """
        if source == target:
            return value
        key = "reshard", value, source, target
        return self._collectives.once(key, lambda: self._resharded(value, source, target))

    def _resharded(self, value: ir.Value, source: Spec, target: Spec) -> ir.Value:
        made = self._one_step(value, source, target)
        if made is not None:
            return made
        whole = self._whole_shape(value, source)
        mesh = Mesh(tuple(Axis(name, size) for name, size in self._devices.axes))
        at = source
        for step in reshard_table(whole, 1.0, mesh, bool(source.unreduced)).path(source, target):
            made = self._one_step(value, at, step.target)
            assert made is not None, f"no step leads from {at} to {step.target}"
            value, at = made, step.target
        return value

    def slice(self, value: ir.Value, dims: Sequence[Sequence[str]]) -> ir.Value:
        """The device's shard of a value, along further axes of each dim."""
        tensor = ir.RankedTensorType(value.type)
        shape = [size // self._devices.group_size(axes) for size, axes in zip(tensor.shape, dims, strict=True)]
        smaller = _smaller(value, ir.RankedTensorType.get(shape, tensor.element_type))
        if smaller is not None:
            return smaller
        starts = list[ir.Value]()
        for size, axes in zip(shape, dims, strict=True):
            if axes:
                starts.append(binary("stablehlo.multiply", self._devices.index(axes), splat(scalar_i32(), size)))
            else:
                starts.append(splat(scalar_i32(), 0))
        is_integer = isinstance(tensor.element_type, ir.IntegerType)
        made = ir.Operation.create(
            "stablehlo.dynamic_slice",
            results=[ir.RankedTensorType.get(shape, tensor.element_type)],
            operands=[_apart(value) if is_integer else value, *starts],
            attributes={"slice_sizes": ir.DenseI64ArrayAttr.get(shape)},
        ).results[0]
        return _apart(made) if is_integer else made

    def _one_step(self, value: ir.Value, source: Spec, target: Spec) -> ir.Value | None:
        if source.unreduced:
            return self._reduction(value, source, target)
        before, after = source.dims, target.dims
        changed = [dim for dim, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        if all(after[dim][: len(before[dim])] == before[dim] for dim in changed):
            return self.slice(value, [new[len(old) :] for old, new in zip(before, after, strict=True)])
        if all(before[dim][: len(after[dim])] == after[dim] for dim in changed):
            for dim in changed:
                value = self._collectives.all_gather(value, dim, before[dim][len(after[dim]) :])
            return value
        if len(changed) == 2:
            for one, two in (changed, changed[::-1]):
                moved = before[one][-1:]
                if moved and before[one][:-1] == after[one] and (*before[two], *moved) == after[two]:
                    return self._collectives.all_to_all(value, two, one, moved)
        group_size = self._devices.group_size
        if all(group_size(old) == group_size(new) for old, new in zip(before, after, strict=True)):
            return self._permute(value, source, target)
        return None

    def _reduction(self, value: ir.Value, source: Spec, target: Spec) -> ir.Value | None:
        """The sum of an unreduced value, or the device's shard of it."""
        if target.unreduced:
            return None
        before, after = source.dims, target.dims
        if before == after:
            return self._collectives.all_reduce(value, source.unreduced, "stablehlo.add")
        added = scattered_dims(source, target)
        if added is None:
            return None
        for dim, axes in added:
            value = self._collectives.reduce_scatter(value, dim, axes)
        return value

    def _permute(self, value: ir.Value, source: Spec, target: Spec) -> ir.Value:
        """From the device that holds the same shard under the other spec."""
        devices = self._devices
        left = [[name for name, _ in devices.axes if name not in spec.axes] for spec in (source, target)]
        sources = dict[int, int]()
        for device in range(devices.count):
            there, here = dict[str, int](), devices.coordinates(device)
            pairs = [*zip(source.dims, target.dims, strict=True), tuple(left)]
            for old, new in pairs:
                shard = 0
                for axis in new:
                    shard = shard * devices.sizes[axis] + here[axis]
                for axis in reversed(old):
                    shard, there[axis] = divmod(shard, devices.sizes[axis])
            sources[device] = devices.number(there)
        if all(device == other for device, other in sources.items()):
            return value
        return self._collectives.permute(value, sources)

    def _whole_shape(self, value: ir.Value, spec: Spec) -> tuple[int, ...]:
        shape = ir.RankedTensorType(value.type).shape
        return tuple(size * self._devices.group_size(axes) for size, axes in zip(shape, spec.dims, strict=True))


def _apart(value: ir.Value) -> ir.Value:
    """A value that XLA sees no slice behind: it loses a product of integers with a constant between two dynamic slices
    (``(x[i:i+2] * 3)[j:j+1]`` is ``x[i+j:i+j+1]``; jaxlib 0.10.2 and 0.11.2, on one device too)."""
    return ir.Operation.create("stablehlo.optimization_barrier", results=[value.type], operands=[value]).results[0]


def _smaller(value: ir.Value, type_: ir.RankedTensorType) -> ir.Value | None:
    """Another op for a shard whose elements are those of the whole: a constant of one number, or a broadcast along the
    sharded dims. None for all other values."""
    if isinstance(value.owner, ir.Block):
        return None
    op, shape = value.owner.operation, ir.RankedTensorType(value.type).shape
    if op.name == "stablehlo.constant":
        number = splat_text(value)
        if number is None or number.startswith("("):  # the bindings can't write complex elements
            return None
        attributes = {"value": ir.Attribute.parse(f"dense<{number}> : {type_}")}
    elif op.name == "stablehlo.broadcast_in_dim":
        attributes = {"broadcast_dimensions": op.attributes["broadcast_dimensions"]}
        read = zip(
            ir.DenseI64ArrayAttr(op.attributes["broadcast_dimensions"]),
            ir.RankedTensorType(op.operands[0].type).shape,
            strict=True,
        )
        if any(size != 1 and shape[dim] != type_.shape[dim] for dim, size in read):
            return None
    else:
        return None
    return ir.Operation.create(op.name, results=[type_], operands=list(op.operands), attributes=attributes).results[0]


def scattered_dims(source: Spec, target: Spec) -> list[tuple[int, tuple[str, ...]]] | None:
    """Where a reduce-scatter of an unreduced value leads to a spec: its dims, and the axes of each; None where it doesn't.

    >>> scattered_dims(Spec(((), ()), ("a",)), Spec((("a",), ())))
    [(0, ('a',))]
    """
    found = list[tuple[int, tuple[str, ...]]]()
    for dim, (old, new) in enumerate(zip(source.dims, target.dims, strict=True)):
        if new[: len(old)] != old:
            return None
        if new != old:
            found.append((dim, new[len(old) :]))
    axes = [axis for _, added in found for axis in added]
    return found if found and sorted(axes) == sorted(source.unreduced) else None
