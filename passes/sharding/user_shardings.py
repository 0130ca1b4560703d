"""User-specified shardings: of arguments, and of sharding constraints."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError, ProgramError
from bactrian.passes.ir.attributes import STAGE_SHARDINGS, argument_attributes, result_attributes, stage_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.meshes import SHARDING, USER_MESH, erase_meshes, mesh_name, moved_to_mesh
from bactrian.passes.ir.regions import body, main_function, nested_operations, terminator, top_level
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import MeshAxes, Spec
from bactrian.passes.spmd.reshard_paths import all_specs

CONSTRAINT = "sdy.sharding_constraint"


def refuse_result_shardings(main: ir.Operation) -> None:
    """Refuse shardings of results.

    Raises:
        PassError: one has one.
    """
    for number, entry in enumerate(result_attributes(main)):
        if SHARDING in entry:
            raise error_at(
                PassError,
                terminator(main),
                f"result {number} of @main has an {SHARDING} already",
                why="a result has the sharding of the value that is returned",
                fix="constrain the value with sdy.sharding_constraint",
            )


def is_given(entry: Mapping[str, ir.Attribute]) -> bool:
    """Whether an argument with these attributes is given a sharding, on all stages or on some."""
    return SHARDING in entry or STAGE_SHARDINGS in entry


def fixed_arguments(
    main: ir.Operation, flow: MainDataflow, mesh: Mesh, mesh_symbol: str, inputs: Collection[int]
) -> list[tuple[int, Spec]]:
    """Those of some arguments that a stage is given a sharding for: the one for its mesh alone, else that for all.

    Raises:
        PassError: one leaves a dim open.
        ProgramError: one does not split its argument into equal shards.
    """
    found = list[tuple[int, Spec]]()
    for number, entry in enumerate(argument_attributes(main)):
        of_stages = ir.DictAttr(entry.get(STAGE_SHARDINGS, ir.DictAttr.get()))
        sharding = of_stages[mesh_symbol] if mesh_symbol in of_stages else entry.get(SHARDING)
        if sharding is not None and number in inputs:
            spec, open_ = _checked(sharding, flow.values[number], mesh)
            if open_:
                raise error_at(
                    PassError,
                    flow.values[number],
                    f"sharding {sharding} of argument {number} leaves a dim open",
                    fix="give the axes of every dim, or constrain the argument with sdy.sharding_constraint",
                )
            found.append((number, spec))
    return found


def constrained_values(flow: MainDataflow, mesh: Mesh, inputs: Collection[int]) -> list[tuple[int, Spec]]:
    """Those of some values that a constraint makes, with the sharding that they have in every stage."""
    found = list[tuple[int, Spec]]()
    for results, op in zip(flow.results, flow.ops, strict=True):
        if op.name == CONSTRAINT and results[0] in inputs:
            spec, open_ = _checked(op.attributes["sharding"], op.results[0], mesh)
            found += [(results[0], spec)] if not open_ else []
    return found


def given_specs(op: ir.Operation, mesh: Mesh) -> tuple[Spec, ...]:
    """The specs that a constraint allows; nothing for other ops."""
    if op.name != CONSTRAINT:
        return ()
    value = op.results[0]
    spec, open_ = _checked(op.attributes["sharding"], value, mesh)
    if not open_:
        return (spec,)
    return tuple(
        each
        for each in all_specs(value_shape(value), mesh)
        if all(
            axes[: len(asked)] == asked if dim in open_ else axes == asked
            for dim, (axes, asked) in enumerate(zip(each.dims, spec.dims, strict=True))
        )
    )


def _checked(sharding: ir.Attribute, value: ir.Value, mesh: Mesh) -> tuple[Spec, tuple[int, ...]]:
    """A sharding that was asked for, and the dims that are open.

    Raises:
        PassError: it is of another rank.
        ProgramError: it does not split the value into equal shards.
    """
    (spec, open_), shape = _spec_of(sharding, value, mesh), value_shape(value)
    if len(spec.dims) != len(shape):
        raise error_at(PassError, value, f"sharding {sharding} has {len(spec.dims)} dims, its value {len(shape)}")
    for dim, (size, axes) in enumerate(zip(shape, spec.dims, strict=True)):
        count = mesh.group_size(axes)
        if size % count:
            raise error_at(
                ProgramError,
                value,
                f"dim {dim} of size {size} can't be split into {count} equal shards",
                why=f"its sharding is over {', '.join(axes)}",
                fix="make the dim a multiple of that, or shard another one",
            )
    return spec, open_


def _spec_of(sharding: ir.Attribute, value: ir.Value, mesh: Mesh) -> tuple[Spec, tuple[int, ...]]:
    """An ``sdy.sharding`` as a spec, and the dims that it leaves open: other axes may shard these further.

    Axes of size 1 are left out, and of a sharding over ``@user`` those that only meshes of other stages have.

    Raises:
        PassError: it names axes that the mesh doesn't have, or parts of axes.
    """
    dims, open_ = list[tuple[str, ...]](), list[int]()
    for number, attribute in enumerate(sdy.TensorShardingAttr(sharding).dimension_shardings):
        dim = sdy.DimensionShardingAttr(attribute)
        if not dim.is_closed:
            open_.append(number)
        axes = list[str]()
        for reference in dim.axes:
            axis = sdy.AxisRefAttr(reference)
            if axis.name not in mesh.sizes and mesh_name(sharding) == USER_MESH:
                continue
            if axis.name not in mesh.sizes or axis.sub_axis_info is not None:
                raise error_at(
                    PassError,
                    value,
                    f"sharding {sharding} is not over whole axes of the mesh",
                    fix=f"axes: {', '.join(mesh.sizes)}",
                )
            axes.append(axis.name)
        dims.append(tuple(axis for axis in axes if axis in mesh.wide))
    return Spec(tuple(dims)), tuple(open_)


def drop_user_mesh(module: ir.Module, meshes: Mapping[str, MeshAxes]) -> None:
    """Erase the mesh ``@user``, once the shardings of stages are written: what is still over it moves to a stage's mesh.

    That is the sharding of an argument that no op reads, which stays on the first stage, and of a constraint in the
    regions of an op that every device does whole. What arguments were given for single stages is gone too.

    Args:
        module: whose shardings are chosen.
        meshes: of the stages, by their symbols, in their order.
    """
    main, names = main_function(module), list(meshes)
    entries = argument_attributes(main)
    for entry in entries:
        entry.pop(STAGE_SHARDINGS, None)
        if SHARDING in entry and mesh_name(entry[SHARDING]) == USER_MESH:
            entry[SHARDING] = moved_to_mesh(entry[SHARDING], names[0], meshes[names[0]])
    if entries:
        main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])
    for op in nested_operations(main):
        if op.name != CONSTRAINT:
            continue
        name = names[stage_of(top_level(op, body(main))) or 0]
        if mesh_name(op.attributes["sharding"]) != name:
            op.attributes["sharding"] = moved_to_mesh(op.attributes["sharding"], name, meshes[name])
    erase_meshes(module, (USER_MESH,))
