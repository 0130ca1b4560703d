"""The shardings that arguments come with: of sharded arrays, and of abstract arguments that have one."""

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
from bactrian.passes.ir.meshes import SHARDING, mesh_attribute, sharding_attribute
from bactrian.passes.machine.spec import MeshAxes, Spec

Requested = tuple[MeshAxes, Spec]
"""A mesh, and how it shards an argument; dims at the end may be left out."""


MAKE_AUTO = "make it with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number of axes)"
"""What to do about a mesh of type Explicit."""


def requested_shardings(leaves: Sequence[Any]) -> tuple[tuple[int, Requested], ...]:
    """The shardings of those arguments that come with one, by number; hashable.

    A replicated array asks for nothing: that is what arrays are if nobody says otherwise.

    Raises:
        ProgramError: a sharding leaves dims open, or values unreduced.
    """
    found = ((number, _requested(leaf)) for number, leaf in enumerate(leaves))
    return tuple((number, each) for number, each in found if each is not None)


def _requested(leaf: Any) -> Requested | None:
    sharding = None if isinstance(leaf, DistributedArray) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    axes: MeshAxes = tuple((str(name), int(size)) for name, size in sharding.mesh.shape.items())
    if sharding.spec.unreduced or PartitionSpec.UNCONSTRAINED in sharding.spec:
        raise ProgramError(
            f"an argument of shape {tuple(leaf.shape)} comes with the sharding {sharding.spec}",
            where=line_here(),
            why="the sharding of an argument is given wholly, or not at all",
            fix="leave its sharding out, and use with_sharding_constraint in the step for a part of it",
        )
    spec = Spec(tuple((dim,) if isinstance(dim, str) else tuple(dim or ()) for dim in sharding.spec))
    return (axes, spec) if spec.num_shards(dict(axes)) > 1 or isinstance(leaf, jax.ShapeDtypeStruct) else None


def refuse_explicit_axes() -> None:
    """Refuse to trace under a mesh whose shardings are part of types: each op would be a constraint then.

    Raises:
        ProgramError: ``jax.set_mesh`` has one with axes of type ``Explicit``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if names:
        raise ProgramError(
            f"the step is traced under a mesh with axes of type Explicit: {', '.join(map(str, names))}",
            where=line_here(),
            why="every value then has its sharding in its type, and nothing is left to choose",
            fix=MAKE_AUTO,
        )


def write_requested(
    module: ir.Module,
    requested: Sequence[tuple[int, Requested]],
    ranks: Sequence[int],
    entries: list[dict[str, ir.Attribute]],
) -> None:
    """Write shardings into arguments' attributes, and their meshes into a module.

    Args:
        module: the captured one.
        requested: as `requested_shardings` gives them.
        ranks: of all arguments, as they are in the module.
        entries: attributes of all arguments; they get ``sdy.sharding``.
    """
    names = dict[MeshAxes, str]()
    for number, (axes, spec) in requested:
        if axes not in names:
            names[axes] = f"arguments_{len(names)}"
            with ir.InsertionPoint.at_block_begin(module.body):
                sdy.MeshOp(names[axes], mesh_attribute(axes))
        padded = Spec((*spec.dims, *((),) * (ranks[number] - len(spec.dims))))
        entries[number][SHARDING] = sharding_attribute(padded, names[axes])
