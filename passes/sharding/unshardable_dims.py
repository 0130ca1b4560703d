"""Why a dimension can't be sharded: not divisible by the axis, or required replicated by the op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from bactrian.passes.sharding.sharding_model import ShardingModel


@dataclass(frozen=True)
class UnshardableDim:
    """A dim that can't be sharded over some axes.

    Attributes:
        dim: its number.
        size: of the dim.
        axes: of the mesh.
        num_devices: along them, all together.
        op: that needs the dim replicated though its size divides, or "".
    """

    dim: int
    size: int
    axes: tuple[str, ...]
    num_devices: int
    op: str = ""


def unshardable_dims(model: ShardingModel, value: int, op: str) -> Iterator[UnshardableDim]:
    """All such dims and axes, without those that follow from fewer axes.

    Args:
        model: of the stage.
        value: its number.
        op: the name of the op that makes it; "" of an argument.
    """
    mesh, shape = model.mesh, model.problem.values[value].shape
    made = _made_over(model, value)
    for dim, size in enumerate(shape):
        failing = list[tuple[str, ...]]()
        for count in range(1, len(mesh.wide) + 1):
            for axes in combinations(mesh.wide, count):
                if any(set(few) <= set(axes) for few in failing):
                    continue
                num_devices = mesh.group_size(axes)
                if size % num_devices:
                    failing.append(axes)
                    yield UnshardableDim(dim, size, axes, num_devices)
                elif made is not None and count == 1 and (dim, axes[0]) not in made:
                    failing.append(axes)
                    yield UnshardableDim(dim, size, axes, num_devices, op)


def _made_over(model: ShardingModel, value: int) -> set[tuple[int, str]] | None:
    """The dims and axes that some strategy of the value's op shards; None for inputs and constraints."""
    found = model.specs_of(value)
    if found is None:
        return None
    node, specs = found
    position = model.nodes.op(node)
    if position is None or model.problem.ops[position].constraint_specs:
        return None
    return {(dim, axis) for spec in specs for dim, axes in enumerate(spec.dims) for axis in axes}
