"""Layouts that are there before any is chosen: of arguments, and where a constraint stands."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.frame.errors import PassError, ProgramError
from bactrian.passes.frame.location import describe
from bactrian.passes.ir.attributes import argument_attributes, result_attributes
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.meshes import SHARDING
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.sharding.reshard_paths import Layout, all_layouts

CONSTRAINT = "sdy.sharding_constraint"


def refuse_result_shardings(main: ir.Operation) -> None:
    """Refuse layouts of results.

    Raises:
        PassError: one has one.
    """
    for number, entry in enumerate(result_attributes(main)):
        if SHARDING in entry:
            raise PassError(
                f"result {number} of @main has an {SHARDING} already",
                why="layouts of results follow from those of their values",
                fix="constrain the value with sdy.sharding_constraint",
            )


def fixed_arguments(main: ir.Operation, flow: MainDataflow, mesh: Mesh) -> list[tuple[int, Layout]]:
    """Arguments that have a layout.

    Raises:
        PassError: one leaves a dim open.
        ProgramError: one does not cut its argument into equal pieces.
    """
    found = list[tuple[int, Layout]]()
    for number, entry in enumerate(argument_attributes(main)):
        if SHARDING in entry:
            layout, open_ = _checked(entry[SHARDING], flow.values[number], mesh)
            if open_:
                raise PassError(
                    f"sharding {entry[SHARDING]} of argument {number} leaves a dim open",
                    fix="give the axes of every dim, or constrain the argument with sdy.sharding_constraint",
                )
            found.append((number, layout))
    return found


def constrained_values(main: ir.Operation, flow: MainDataflow, mesh: Mesh) -> list[tuple[int, Layout]]:
    """Values that a constraint makes, with the layout that they have in every stage."""
    found = list[tuple[int, Layout]]()
    for results, op in zip(flow.results, flow.ops, strict=True):
        if op.name == CONSTRAINT:
            layout, open_ = _checked(op.attributes["sharding"], op.results[0], mesh)
            found += [(results[0], layout)] if not open_ else []
    return found


def given_layouts(op: ir.Operation, mesh: Mesh) -> tuple[Layout, ...]:
    """The layouts that a constraint leaves; nothing for other ops."""
    if op.name != CONSTRAINT:
        return ()
    value = op.results[0]
    layout, open_ = _checked(op.attributes["sharding"], value, mesh)
    if not open_:
        return (layout,)
    return tuple(
        each
        for each in all_layouts(value_shape(value), mesh)
        if all(
            axes[: len(asked)] == asked if dim in open_ else axes == asked
            for dim, (axes, asked) in enumerate(zip(each, layout, strict=True))
        )
    )


def _checked(sharding: ir.Attribute, value: ir.Value, mesh: Mesh) -> tuple[Layout, tuple[int, ...]]:
    """A layout that was asked for, and the dims that are open.

    Raises:
        ProgramError: it does not cut the value into equal pieces.
    """
    (layout, open_), shape = _layout_of(sharding, mesh), value_shape(value)
    for dim, (size, axes) in enumerate(zip(shape, layout, strict=True)):
        if size % mesh.parts(axes):
            names = ", ".join(mesh.axes[axis].name for axis in axes)
            raise ProgramError(
                f"dim {dim} of size {size} can't be cut into {mesh.parts(axes)} equal pieces",
                where=describe(value.location),
                why=f"it is asked to be cut over {names}",
                fix="make the dim a multiple of that, or cut another one",
            )
    return layout, open_


def _layout_of(sharding: ir.Attribute, mesh: Mesh) -> tuple[Layout, tuple[int, ...]]:
    """An ``sdy.sharding`` as a layout, and the dims that it leaves open: other axes may cut these further.

    Axes of size 1 cut nothing and are left out.

    Raises:
        PassError: it names axes that the mesh doesn't have, or parts of axes.
    """
    numbers = {axis.name: number for number, axis in enumerate(mesh.axes)}
    layout, open_ = list[tuple[int, ...]](), list[int]()
    for number, attribute in enumerate(sdy.TensorShardingAttr(sharding).dimension_shardings):
        dim = sdy.DimensionShardingAttr(attribute)
        if not dim.is_closed:
            open_.append(number)
        axes = list[int]()
        for reference in dim.axes:
            axis = sdy.AxisRefAttr(reference)
            if axis.name not in numbers or axis.sub_axis_info is not None:
                raise PassError(
                    f"sharding {sharding} is not over whole axes of the mesh", fix=f"axes: {', '.join(numbers)}"
                )
            axes.append(numbers[axis.name])
        layout.append(tuple(axis for axis in axes if mesh.axes[axis].size > 1))
    return tuple(layout), tuple(open_)
