"""Layouts between the plan, the user's arguments and the IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import SHARDING_ESTIMATES, argument_attributes
from bactrian.passes.ir.meshes import SHARDING, axis_names
from bactrian.passes.ir.regions import main_function
from bactrian.passes.plan.schema import Axes, Plan
from bactrian.passes.plan.stage_sharding import WHOLE, ShardingFigures, ShardingPlan, layout_text
from bactrian.runtime.staged_program import StagedProgram

Layout = tuple[tuple[str, ...], ...]


def _layout_of(text: str) -> Layout:
    return tuple(() if dim == WHOLE else tuple(dim.split("+")) for dim in text.split(",")) if text else ()


def plan_layouts(plan: Plan, paths: Sequence[str], ranks: Sequence[int]) -> dict[int, Layout]:
    """The layouts that a plan gives to arguments, by number; ``paths`` and ``ranks`` are the arguments'.

    Raises:
        ConfigError: it names an argument that is not there, or gives one no layout.
    """
    layouts = dict[str, str]()
    for stage in plan.stages:  # of an argument that several stages read, the first one's
        for path, text in () if stage.sharding is None else stage.sharding.layouts:
            layouts.setdefault(path, text)
    numbers = {path: number for number, path in enumerate(paths)}
    unknown = [path for path in layouts if path not in numbers]
    if unknown:
        raise ConfigError(
            f"the plan has a layout for {unknown[0]}, which is no argument of the step", fix="take it out of the plan"
        )
    axes = plan.stages[0].mesh
    return {numbers[path]: check_layout(text, ranks[numbers[path]], axes, path) for path, text in layouts.items()}


def check_layout(text: str, rank: int, axes: Axes, path: str) -> Layout:
    """A layout as its text says.

    Raises:
        ConfigError: it has not one entry for each dim, names an axis that the mesh has not, or one twice.
    """
    layout = _layout_of(text)
    names = [axis for dim in layout for axis in dim]
    known = [name for name, _ in axes]
    problem = ""
    if len(layout) != rank:
        problem = f"it has {len(layout)} dims, the argument has {rank}"
    elif unknown := [name for name in names if name not in known]:
        problem = f"the mesh has no axis {unknown[0]!r}"
    elif len(set(names)) != len(names):
        problem = "an axis cuts one dim, once"
    if problem:
        raise ConfigError(
            f"the plan's layout {text!r} of {path} is none",
            why=problem,
            fix=f"one entry for each dim, {WHOLE} or axes of {', '.join(known)} joined by +",
        )
    return layout


def refuse_moved(given: Mapping[int, Layout], placed: Mapping[int, Layout], paths: Sequence[str]) -> None:
    """Refuse a plan for arguments that another step has placed otherwise.

    Raises:
        ConfigError: names the first one.
    """
    for number in sorted(given.keys() & placed.keys()):
        if given[number] != placed[number]:
            raise ConfigError(
                f"the plan has the layout {layout_text(given[number])} for {paths[number]}, "
                f"which another step has placed as {layout_text(placed[number])}",
                why="arguments that are placed stay where they are",
                fix="pass bactrian.gather(...) of the state, or leave the plan out",
            )


def refuse_overruled(module: ir.Module, layouts: Mapping[int, Layout], paths: Sequence[str]) -> None:
    """Refuse layouts of a plan, or of another step, for arguments that the program asks to be laid out otherwise.

    Args:
        module: whose arguments have the layouts that users asked for, after ``adopt-shardings``.
        layouts: of arguments, by number.
        paths: of the arguments.

    Raises:
        ConfigError: names the first one.
    """
    for number, entry in enumerate(argument_attributes(main_function(module))):
        if number in layouts and SHARDING in entry and axis_names(entry[SHARDING]) != layouts[number]:
            raise ConfigError(
                f"{paths[number]} is {layout_text(layouts[number])} in the plan or from another step, "
                f"and the program asks for {layout_text(axis_names(entry[SHARDING]))}",
                why="with_sharding_constraint, in_shardings and arguments that are sharded give an argument its layout",
                fix="ask for the same layout; or make the plan again, and pass bactrian.gather(...) of the state",
            )


def write_layouts(module: ir.Module, layouts: Mapping[int, Layout]) -> None:
    """Give arguments of ``@main`` their layouts (the mesh is named by its axes: those of all stages are equal)."""
    if not layouts:
        return
    main = main_function(module)
    entries = argument_attributes(main)
    for number, layout in layouts.items():
        dims = [
            sdy.DimensionShardingAttr.get([sdy.AxisRefAttr.get(axis) for axis in axes], is_closed=True)
            for axes in layout
        ]
        entries[number][SHARDING] = sdy.TensorShardingAttr.get("stage0", dims)
    main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])


def read_shardings(module: ir.Module, program: StagedProgram, paths: Sequence[str]) -> tuple[ShardingPlan, ...]:
    """What ``solve-shardings`` has written of each stage; nothing where it had nothing to choose."""
    with module.context:
        if SHARDING_ESTIMATES not in module.operation.attributes:
            return ()
        found = ir.ArrayAttr(module.operation.attributes[SHARDING_ESTIMATES])
        return tuple(_read(ir.DictAttr(entry), stage, program, paths) for stage, entry in enumerate(found))


def as_before(new: ShardingPlan, old: ShardingPlan | None) -> ShardingPlan:
    """What is predicted of a plan that is applied: if it takes as long as it says, its proof and comparison stand."""
    if old is None or abs(new.seconds - old.seconds) > 1e-9 * old.seconds or new.layouts != old.layouts:
        return new
    return replace(new, given=old.given, bound_seconds=old.bound_seconds, compared=new.compared or old.compared)


def _read(found: ir.DictAttr, stage: int, program: StagedProgram, paths: Sequence[str]) -> ShardingPlan:
    memory = [ir.DictAttr(entry) for entry in ir.ArrayAttr(found["memory_bytes"])]
    compared = [ir.DictAttr(entry) for entry in ir.ArrayAttr(found["compared"])] if "compared" in found else []
    layouts = {
        piece.argument: layout_text(program.values[piece.value].layout)
        for piece in program.arguments
        if program.values[piece.value].stage == stage
    }
    return ShardingPlan(
        strategy=ir.StringAttr(found["strategy"]).value,
        seconds=_float(found["seconds"]),
        bound_seconds=_float(found["bound_seconds"]),
        given=_integer(found["given"]),
        communication_seconds=_float(found["communication_seconds"]),
        sent_bytes=tuple((item.name, _integer(item.attr)) for item in ir.DictAttr(found["sent_bytes"])),
        memory_bytes=tuple((ir.StringAttr(entry["name"]).value, _integer(entry["bytes"])) for entry in memory),
        limit_bytes=_integer(found["limit_bytes"]),
        layouts=tuple((paths[number], text) for number, text in sorted(layouts.items()) if number < len(paths)),
        compared=tuple(_figures(entry) for entry in compared),
    )


def _figures(entry: ir.DictAttr) -> ShardingFigures:
    name = ir.StringAttr(entry["name"]).value
    if "seconds" not in entry:
        return ShardingFigures(name)
    return ShardingFigures(
        name, _float(entry["seconds"]), _float(entry["communication_seconds"]), _integer(entry["memory_bytes"])
    )


def _float(attribute: ir.Attribute) -> float:
    return ir.FloatAttr(attribute).value


def _integer(attribute: ir.Attribute) -> int:
    return ir.IntegerAttr(attribute).value
