"""Meshes and shardings as the IR says them: ``sdy.mesh``, ``sdy.sharding``, and ``!mpmd.mesh_tensor`` types, which have no
accessors in Python."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.machine.spec import MeshAxes, Spec

SHARDING = "sdy.sharding"
ONE_DEVICE: MeshAxes = (("data", 1),)
"""The mesh of a stage without one."""

USER_MESH = "user"
"""The symbol of the mesh that user-specified shardings are over until ``solve-shardings``."""

_PREFIX = '!mpmd.mesh_tensor<"stage'
_MESH_TENSOR = re.compile(rf'{_PREFIX}(0|[1-9]\d{{0,5}})", tensor<.*>', re.DOTALL)


def mesh_axes(module: ir.Module) -> dict[str, MeshAxes]:
    """The axes of every mesh of a module, by its symbol."""
    found = dict[str, MeshAxes]()
    for view in module.body.operations:
        op = view.operation
        if op.name == "sdy.mesh":
            axes = [sdy.MeshAxisAttr(axis) for axis in sdy.MeshAttr(op.attributes["mesh"]).axes]
            found[ir.StringAttr(op.attributes["sym_name"]).value] = tuple((axis.name, axis.size) for axis in axes)
    return found


def stage_axes(module: ir.Module, num_stages: int) -> tuple[MeshAxes, ...]:
    """The axes of every stage's mesh; one device where there is none."""
    known = mesh_axes(module)
    return tuple(known.get(f"stage{stage}", ONE_DEVICE) for stage in range(num_stages))


def mesh_attribute(axes: MeshAxes) -> ir.Attribute:
    """``#sdy.mesh`` of axes."""
    return sdy.MeshAttr.get([sdy.MeshAxisAttr.get(name, size) for name, size in axes])


def make_stage_meshes(module: ir.Module, meshes: Sequence[MeshAxes]) -> None:
    """Make the mesh of each stage, in the order of the stages; one that is there stays. Its context is entered."""
    present = mesh_axes(module)
    with ir.InsertionPoint.at_block_begin(module.body), ir.Location.unknown():
        for stage, axes in enumerate(meshes):
            if f"stage{stage}" not in present:
                sdy.MeshOp(f"stage{stage}", mesh_attribute(axes))


def make_user_mesh(module: ir.Module, meshes: Iterable[MeshAxes]) -> None:
    """Make the mesh `USER_MESH`, if it is not there, with each axis of the stages' meshes. Its context is entered.

    Axes are read by name; of one that stages have in several sizes, it has the first size larger than 1.
    """
    if USER_MESH in mesh_axes(module):
        return
    axes: dict[str, int] = {}
    for mesh in meshes:
        for name, size in mesh:
            if axes.get(name, 1) == 1:
                axes[name] = size
    with ir.InsertionPoint.at_block_begin(module.body), ir.Location.unknown():
        sdy.MeshOp(USER_MESH, mesh_attribute(tuple(axes.items())))


def erase_meshes(module: ir.Module, names: Collection[str]) -> None:
    """Erase the meshes with these symbols."""
    for view in list(module.body.operations):
        op = view.operation
        if op.name == "sdy.mesh" and ir.StringAttr(op.attributes["sym_name"]).value in names:
            op.erase()


def mesh_tensor(stage: int, tensor: ir.Type, sharding: ir.Attribute | None = None) -> ir.Type:
    """A tensor on a stage's mesh, with a sharding if one is chosen."""
    suffix = "" if sharding is None else f", sharding={str(sharding).removeprefix('#sdy.sharding')}"
    return ir.Type.parse(f'{_PREFIX}{stage}", {tensor}{suffix}>')


def is_mesh_tensor(type_: ir.Type) -> bool:
    """Whether a type is a tensor on a stage's mesh, which `mesh_tensor_parts` takes apart."""
    return _MESH_TENSOR.fullmatch(str(type_)) is not None


def mesh_tensor_parts(type_: ir.Type) -> tuple[int, ir.RankedTensorType, ir.Attribute | None]:
    """Stage, tensor type and sharding of a mesh tensor."""
    text = str(type_)
    assert text.startswith(_PREFIX) and text.endswith(">"), text
    stage, _, rest = text[len(_PREFIX) : -1].partition('", ')
    tensor, _, text = rest.partition(", sharding=")
    sharding = ir.Attribute.parse(f"#sdy.sharding{text}") if text else None
    return int(stage), ir.RankedTensorType(ir.Type.parse(tensor)), sharding


def spec_of(sharding: ir.Attribute) -> Spec:
    """An ``sdy.sharding`` over whole axes as plain data."""
    attribute = sdy.TensorShardingAttr(sharding)
    dims = [sdy.DimensionShardingAttr(dim) for dim in attribute.dimension_shardings]
    return Spec(
        tuple(tuple(sdy.AxisRefAttr(axis).name for axis in dim.axes) for dim in dims),
        tuple(sdy.AxisRefAttr(axis).name for axis in attribute.unreduced_axes),
    )


def spec_or_replicated(sharding: ir.Attribute | None, type_: ir.Type) -> Spec:
    """The spec of a value of some type: replicated where it has no sharding."""
    if sharding is not None:
        return spec_of(sharding)
    return Spec.replicated(type_.rank if isinstance(type_, ir.RankedTensorType) else 0)


def sharding_attribute(spec: Spec, mesh_name: str) -> ir.Attribute:
    """``#sdy.sharding`` of a spec, closed: nothing may shard the value further."""

    def references(axes: Iterable[str]) -> list[ir.Attribute]:
        return [sdy.AxisRefAttr.get(axis) for axis in axes]

    dims = [sdy.DimensionShardingAttr.get(references(axes), is_closed=True) for axes in spec.dims]
    return sdy.TensorShardingAttr.get(mesh_name, dims, unreduced_axes=references(spec.unreduced))


def moved_to_mesh(sharding: ir.Attribute, name: str, axes: MeshAxes) -> ir.Attribute:
    """A sharding over another mesh, by the names of its axes. Axes that this one has not are left out."""
    sizes = dict(axes)
    dims = list[ir.Attribute]()
    for attribute in sdy.TensorShardingAttr(sharding).dimension_shardings:
        dim = sdy.DimensionShardingAttr(attribute)
        kept = [axis for axis in dim.axes if sizes.get(sdy.AxisRefAttr(axis).name, 1) > 1]
        dims.append(sdy.DimensionShardingAttr.get(kept, is_closed=dim.is_closed))
    return sdy.TensorShardingAttr.get(name, dims)


def mesh_name(sharding: ir.Attribute) -> str:
    """The symbol of the mesh that a sharding is over."""
    return str(sharding).removeprefix("#sdy.sharding<@").partition(",")[0]


def value_shardings(main: ir.Operation, values: Iterable[ir.Value]) -> list[ir.Attribute | None]:
    """The chosen sharding of each value of ``@main``, or of the body of a loop; None where nothing was chosen."""
    arguments: list[ir.DictAttr] | None = None  # of which most calls need none
    found = list[ir.Attribute | None]()
    for value in values:
        if isinstance(value.owner, ir.Block):
            number = ir.BlockArgument(value).arg_number
            around = value.owner.owner.operation
            if around != main:  # what a loop carries has one sharding
                found.append(_of_result(around, number))
                continue
            if arguments is None:
                present = "arg_attrs" in main.attributes
                arguments = (
                    [ir.DictAttr(entry) for entry in ir.ArrayAttr(main.attributes["arg_attrs"])] if present else []
                )
            own = number < len(arguments) and SHARDING in arguments[number]
            found.append(arguments[number][SHARDING] if own else None)
            continue
        op = value.owner.operation
        if op.name in ("sdy.reshard", "sdy.sharding_constraint"):
            found.append(op.attributes["sharding"])
        else:
            found.append(_of_result(op, ir.OpResult(value).result_number))
    return found


def _of_result(op: ir.Operation, number: int) -> ir.Attribute | None:
    if SHARDING not in op.attributes:
        return None
    return list(sdy.TensorShardingPerValueAttr(op.attributes[SHARDING]).shardings)[number]
