"""Meshes and layouts as the IR says them: ``sdy.mesh``, ``sdy.sharding``, and ``!mpmd.mesh_tensor`` types, which have no
accessors in Python."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

SHARDING = "sdy.sharding"
Axes = tuple[tuple[str, int], ...]
"""Names and sizes of a mesh's axes, the major one first."""

_PREFIX = '!mpmd.mesh_tensor<"stage'


def mesh_axes(module: ir.Module) -> dict[str, Axes]:
    """The axes of every mesh of a module, by its symbol."""
    found = dict[str, Axes]()
    for view in module.body.operations:
        op = view.operation
        if op.name == "sdy.mesh":
            axes = [sdy.MeshAxisAttr(axis) for axis in sdy.MeshAttr(op.attributes["mesh"]).axes]
            found[ir.StringAttr(op.attributes["sym_name"]).value] = tuple((axis.name, axis.size) for axis in axes)
    return found


def stage_axes(module: ir.Module, num_stages: int) -> tuple[Axes, ...]:
    """The axes of every stage's mesh; one device where there is none."""
    known = mesh_axes(module)
    return tuple(known.get(f"stage{stage}", (("data", 1),)) for stage in range(num_stages))


def num_devices(axes: Axes) -> int:
    """Devices of a mesh."""
    return math.prod(size for _, size in axes)


def axes_text(axes: Axes) -> str:
    """``["data"=2, "model"=4]``, as it stands in ``sdy.mesh`` and ``mpmd.topology``."""
    return "[" + ", ".join(f'"{name}"={size}' for name, size in axes) + "]"


def mesh_attribute(axes: Axes) -> ir.Attribute:
    """``#sdy.mesh`` of axes."""
    return sdy.MeshAttr.get([sdy.MeshAxisAttr.get(name, size) for name, size in axes])


def mesh_tensor(stage: int, tensor: ir.Type, sharding: ir.Attribute | None = None) -> ir.Type:
    """A tensor on a stage's mesh, in a layout if one is chosen."""
    layout = "" if sharding is None else f", sharding={str(sharding).removeprefix('#sdy.sharding')}"
    return ir.Type.parse(f'{_PREFIX}{stage}", {tensor}{layout}>')


def mesh_tensor_parts(type_: ir.Type) -> tuple[int, ir.RankedTensorType, ir.Attribute | None]:
    """Stage, tensor type and sharding of a mesh tensor."""
    text = str(type_)
    assert text.startswith(_PREFIX) and text.endswith(">"), text
    stage, _, rest = text[len(_PREFIX) : -1].partition('", ')
    tensor, _, layout = rest.partition(", sharding=")
    sharding = ir.Attribute.parse(f"#sdy.sharding{layout}") if layout else None
    return int(stage), ir.RankedTensorType(ir.Type.parse(tensor)), sharding


def axis_names(sharding: ir.Attribute | None) -> tuple[tuple[str, ...], ...]:
    """The axes over which each dim is cut; nothing at all without a sharding."""
    if sharding is None:
        return ()
    dims = [sdy.DimensionShardingAttr(dim) for dim in sdy.TensorShardingAttr(sharding).dimension_shardings]
    return tuple(tuple(sdy.AxisRefAttr(axis).name for axis in dim.axes) for dim in dims)


def mesh_name(sharding: ir.Attribute) -> str:
    """The symbol of the mesh that a sharding is over."""
    return str(sharding).removeprefix("#sdy.sharding<@").partition(",")[0]


def whole_sharding(mesh_name: str, rank: int) -> ir.Attribute:
    """The sharding of a tensor that every device has whole."""
    return sdy.TensorShardingAttr.get(mesh_name, [sdy.DimensionShardingAttr.get([], is_closed=True)] * rank)


def value_shardings(main: ir.Operation, values: Iterable[ir.Value]) -> list[ir.Attribute | None]:
    """The chosen sharding of each value of ``@main``, or of the body of a loop; None where nothing was chosen."""
    present = "arg_attrs" in main.attributes
    arguments = [ir.DictAttr(entry) for entry in ir.ArrayAttr(main.attributes["arg_attrs"])] if present else []
    found = list[ir.Attribute | None]()
    for value in values:
        if isinstance(value.owner, ir.Block):
            number = ir.BlockArgument(value).arg_number
            around = value.owner.owner.operation
            if around != main:  # what a loop carries has one layout
                found.append(_of_result(around, number))
                continue
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
