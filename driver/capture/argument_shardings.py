"""The layouts that arguments come with: of arrays that are cut, and of abstract arguments that say how they will be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.driver.arrays.distributed_array import DistributedArray
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ProgramError
from bactrian.passes.ir.meshes import SHARDING, Axes, mesh_attribute

Asked = tuple[Axes, tuple[tuple[str, ...], ...]]
"""A mesh, and for each dim its axes that cut it; dims that are left out are whole."""


def asked_layouts(leaves: Sequence[Any]) -> tuple[tuple[int, Asked], ...]:
    """The layouts of those arguments that come with one, by number; hashable.

    An array that lies whole on every device of a mesh asks for nothing: that is what arrays are if nobody says otherwise.

    Raises:
        ProgramError: a layout leaves dims open, or values unreduced.
    """
    found = ((number, _asked(leaf)) for number, leaf in enumerate(leaves))
    return tuple((number, asked) for number, asked in found if asked is not None)


def _asked(leaf: Any) -> Asked | None:
    sharding = None if isinstance(leaf, DistributedArray) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    axes: Axes = tuple((str(name), int(size)) for name, size in sharding.mesh.shape.items())
    if sharding.spec.unreduced or PartitionSpec.UNCONSTRAINED in sharding.spec:
        raise ProgramError(
            f"an argument of shape {tuple(leaf.shape)} comes with the sharding {sharding.spec}",
            where=line_here(),
            why="the layout of an argument is given wholly, or not at all",
            fix="leave its sharding out, and use with_sharding_constraint in the step for a part of it",
        )
    dims = tuple((dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in sharding.spec)
    sizes = dict(axes)
    is_cut = any(sizes[axis] > 1 for dim in dims for axis in dim)
    return (axes, dims) if is_cut or isinstance(leaf, jax.ShapeDtypeStruct) else None


def refuse_explicit_axes() -> None:
    """Refuse to trace under a mesh whose layouts are part of types: each op would be a constraint then.

    Raises:
        ProgramError: ``jax.set_mesh`` has one with axes of type ``Explicit``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if names:
        raise ProgramError(
            f"the step is traced under a mesh with axes of type Explicit: {', '.join(map(str, names))}",
            where=line_here(),
            why="every value then has its layout in its type, and nothing is left to choose",
            fix="make it with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number of axes)",
        )


def write_asked(
    module: ir.Module, asked: Sequence[tuple[int, Asked]], ranks: Sequence[int], entries: list[dict[str, ir.Attribute]]
) -> None:
    """Write layouts into arguments' attributes, and their meshes into a module.

    Args:
        module: the captured one.
        asked: as `asked_layouts` gives them.
        ranks: of all arguments, as they are in the module.
        entries: attributes of all arguments; they get ``sdy.sharding``.
    """
    names = dict[Axes, str]()
    for number, (axes, dims) in asked:
        if axes not in names:
            names[axes] = f"arguments_{len(names)}"
            with ir.InsertionPoint.at_block_begin(module.body):
                sdy.MeshOp(names[axes], mesh_attribute(axes))
        padded = (*dims, *((),) * (ranks[number] - len(dims)))
        entries[number][SHARDING] = sdy.TensorShardingAttr.get(
            names[axes],
            [
                sdy.DimensionShardingAttr.get([sdy.AxisRefAttr.get(axis) for axis in cut], is_closed=True)
                for cut in padded
            ],
        )
