"""Layouts that somebody has decided: of arguments, and by constraints."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.errors import PassError, ProgramError
from bactrian.passes.program import body
from bactrian.passes.sharding.layouts import Layout
from bactrian.passes.sharding.mesh import Mesh

SHARDING = "sdy.sharding"


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a tensor; () of all else."""
    return tuple(value.type.shape) if isinstance(value.type, ir.RankedTensorType) else ()


def layout_of(sharding: ir.Attribute, mesh: Mesh) -> Layout:
    """An ``sdy.sharding`` as a layout; axes of size 1 cut nothing and are left out.

    Raises:
        PassError: it names axes that the mesh doesn't have, or parts of axes; it leaves dims open.
    """
    numbers = {axis.name: number for number, axis in enumerate(mesh.axes)}
    layout = list[tuple[int, ...]]()
    for attribute in sdy.TensorShardingAttr(sharding).dimension_shardings:
        dim = sdy.DimensionShardingAttr(attribute)
        if not dim.is_closed:
            raise PassError(
                f"sharding {sharding} leaves a dim open",
                why="a layout that is given in part is not there yet",
                fix="give the axes of every dim, or no sharding",
            )
        axes = list[int]()
        for reference in dim.axes:
            axis = sdy.AxisRefAttr(reference)
            if axis.name not in numbers or axis.sub_axis_info is not None:
                raise PassError(
                    f"sharding {sharding} is not over whole axes of the mesh", fix=f"axes: {', '.join(numbers)}"
                )
            axes.append(numbers[axis.name])
        layout.append(tuple(axis for axis in axes if mesh.axes[axis].size > 1))
    return tuple(layout)


def refuse_result_shardings(main: ir.Operation) -> None:
    """Refuse layouts of results.

    Raises:
        PassError: a result of ``@main`` has one.
    """
    if "res_attrs" not in main.attributes:
        return
    for number, entry in enumerate(ir.ArrayAttr(main.attributes["res_attrs"])):
        if SHARDING in ir.DictAttr(entry):
            raise PassError(
                f"result {number} of @main has an {SHARDING} already",
                why="layouts of results follow from those of their values",
                fix="constrain the value with sdy.sharding_constraint",
            )


def fixed_arguments(main: ir.Operation, mesh: Mesh) -> list[tuple[int, Layout]]:
    """The arguments of ``@main`` whose layouts were given.

    Raises:
        PassError, ProgramError: as `layout_of`; one does not cut evenly.
    """
    if "arg_attrs" not in main.attributes:
        return []
    arguments, found = body(main).arguments, list[tuple[int, Layout]]()
    for number, attribute in enumerate(ir.ArrayAttr(main.attributes["arg_attrs"])):
        entry = ir.DictAttr(attribute)
        if SHARDING in entry:
            found.append((number, _checked(entry[SHARDING], arguments[number], mesh)))
    return found


def given_layout(op: ir.Operation, mesh: Mesh) -> Layout | None:
    """The layout that a constraint asks for; None of other ops.

    Raises:
        PassError, ProgramError: as `fixed_arguments`.
    """
    if op.name != "sdy.sharding_constraint":
        return None
    return _checked(op.attributes["sharding"], op.results[0], mesh)


def _checked(sharding: ir.Attribute, value: ir.Value, mesh: Mesh) -> Layout:
    """A layout that was asked for.

    Raises:
        ProgramError: it does not cut the value into equal pieces.
    """
    layout, shape = layout_of(sharding, mesh), shape_of(value)
    for dim, (size, axes) in enumerate(zip(shape, layout, strict=True)):
        if size % mesh.parts(axes):
            names = ", ".join(mesh.axes[axis].name for axis in axes)
            raise ProgramError(
                f"dim {dim} of size {size} can't be cut into {mesh.parts(axes)} equal pieces",
                where=str(value.location),
                why=f"it is asked to be cut over {names}",
                fix="make the dim a multiple of that, or cut another one",
            )
    return layout
