"""Shardings between the plan, the user's arguments and the IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    PREPARE,
    SHARDING_ESTIMATES,
    STAGE_SHARDINGS,
    UPDATE,
    argument_attributes,
)
from bactrian.passes.ir.meshes import SHARDING, USER_MESH, moved_to_mesh, sharding_attribute, spec_of
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.spec import REPLICATED, MeshAxes, Spec
from bactrian.passes.plan.schema import Plan
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan
from bactrian.passes.plan.step_timing import StageTiming
from bactrian.runtime.staged_program import StagedProgram

GivenSpecs = Mapping[int, Mapping[int, Spec]]
"""The shardings that arguments are given, by their number and by stage."""


def plan_specs(plan: Plan, paths: Sequence[str], ranks: Sequence[int]) -> GivenSpecs:
    """The shardings that a plan gives to arguments; ``paths`` and ``ranks`` are the arguments'.

    Raises:
        ConfigError: it names an argument that is not there, or gives one an invalid sharding.
    """
    numbers = {path: number for number, path in enumerate(paths)}
    found = dict[int, dict[int, Spec]]()
    for stage in plan.stages:
        for path, text in () if stage.sharding is None else stage.sharding.shardings:
            if path not in numbers:
                raise ConfigError(
                    f"the plan has a sharding for {path}, which is no argument of the step",
                    fix="take it out of the plan",
                )
            spec = check_spec(text, ranks[numbers[path]], stage.mesh, path)
            found.setdefault(numbers[path], {})[stage.stage] = spec
    return found


def check_spec(text: str, rank: int, axes: MeshAxes, path: str) -> Spec:
    """A sharding as its text says.

    Raises:
        ConfigError: it has not one entry for each dim, names an axis that the mesh has not, or one twice.
    """
    spec = Spec.parse(text)
    known = [name for name, _ in axes]
    problem = ""
    if spec.unreduced:
        problem = "an argument can't be unreduced"
    elif len(spec.dims) != rank:
        problem = f"it has {len(spec.dims)} dims, the argument has {rank}"
    elif unknown := [name for name in spec.axes if name not in known]:
        problem = f"the mesh has no axis {unknown[0]!r}"
    elif len(set(spec.axes)) != len(spec.axes):
        problem = "it names an axis twice"
    if problem:
        raise ConfigError(
            f"invalid sharding {text!r} for {path} in the plan",
            why=problem,
            fix=f"give one entry for each dim, {REPLICATED} or axes of {', '.join(known)} joined by +",
        )
    return spec


def refuse_moved(given: GivenSpecs, placed: GivenSpecs, paths: Sequence[str]) -> None:
    """Refuse a plan for arguments that another step has placed otherwise.

    Raises:
        ConfigError: names the first one.
    """
    for number in sorted(given.keys() & placed.keys()):
        for stage in sorted(given[number].keys() & placed[number].keys()):
            if given[number][stage] != placed[number][stage]:
                raise ConfigError(
                    f"the plan has the sharding {given[number][stage]} for {paths[number]}, "
                    f"which another step has placed as {placed[number][stage]}",
                    why="arguments that are placed stay where they are",
                    fix="pass bactrian.gather(...) of the state, or leave the plan out",
                )


def refuse_overruled(module: ir.Module, given: GivenSpecs, meshes: Sequence[MeshAxes], paths: Sequence[str]) -> None:
    """Refuse shardings of a plan, or of another step, for arguments for which the program specifies other ones.

    Args:
        module: whose arguments have the shardings that users asked for, after ``adopt-shardings``.
        given: to arguments.
        meshes: of the stages.
        paths: of the arguments.

    Raises:
        ConfigError: names the first one.
    """
    for number, entry in enumerate(argument_attributes(main_function(module))):
        for stage, spec in given.get(number, {}).items() if SHARDING in entry else ():
            asked = spec_of(moved_to_mesh(entry[SHARDING], USER_MESH, meshes[stage]))
            if asked != spec:
                raise ConfigError(
                    f"{paths[number]} is {spec} in the plan or from another step, and the program asks for {asked}",
                    why="with_sharding_constraint, in_shardings and arguments that are sharded specify its sharding",
                    fix="specify the same sharding; or make the plan again, and pass bactrian.gather(...) of the state",
                )


def write_specs(module: ir.Module, given: GivenSpecs) -> None:
    """Give arguments of ``@main`` their shardings, each over the mesh of its stage."""
    if not given:
        return
    main = main_function(module)
    entries = argument_attributes(main)
    for number, specs in given.items():
        shardings = {f"stage{stage}": sharding_attribute(spec, f"stage{stage}") for stage, spec in specs.items()}
        entries[number][STAGE_SHARDINGS] = ir.DictAttr.get(shardings)
    main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])


def read_shardings(module: ir.Module, program: StagedProgram, paths: Sequence[str]) -> tuple[ShardingPlan, ...]:
    """What ``solve-shardings`` has written of each stage; nothing where it had nothing to choose."""
    with module.context:
        if SHARDING_ESTIMATES not in module.operation.attributes:
            return ()
        found = ir.ArrayAttr(module.operation.attributes[SHARDING_ESTIMATES])
        return tuple(_read(ir.DictAttr(entry), stage, program, paths) for stage, entry in enumerate(found))


def read_timings(module: ir.Module, num_microbatches: int) -> tuple[StageTiming, ...]:
    """The seconds of each stage that ``solve-shardings`` has written; nothing where it had nothing to choose."""
    with module.context:
        if SHARDING_ESTIMATES not in module.operation.attributes:
            return ()
        found = ir.ArrayAttr(module.operation.attributes[SHARDING_ESTIMATES])
        return tuple(_timing(ir.DictAttr(ir.DictAttr(entry)["phase_seconds"]), num_microbatches) for entry in found)


def _timing(seconds: ir.DictAttr, num_microbatches: int) -> StageTiming:
    forward, backward, update, prepare = (_float(seconds[phase]) for phase in (FORWARD, BACKWARD, UPDATE, PREPARE))
    return StageTiming(forward / num_microbatches, backward / num_microbatches, update, prepare)


def read_least_bytes(module: ir.Module) -> tuple[int, ...]:
    """The bytes of a device that each stage's values hold at least, as ``solve-shardings`` has written them."""
    return _read_each(module, "least_bytes")


def read_device_bytes(module: ir.Module) -> tuple[int, ...]:
    """The memory of a device of each stage, as ``solve-shardings`` has written it."""
    return _read_each(module, "device_bytes")


def _read_each(module: ir.Module, name: str) -> tuple[int, ...]:
    with module.context:
        entries = ir.ArrayAttr(module.operation.attributes[SHARDING_ESTIMATES])
        return tuple(_integer(ir.DictAttr(entry)[name]) for entry in entries)


def as_before(new: ShardingPlan, old: ShardingPlan | None) -> ShardingPlan:
    """What is predicted of a plan that is applied: if it takes as long as it says, its proof and comparison stand."""
    if old is None or abs(new.seconds - old.seconds) > 1e-9 * old.seconds or new.shardings != old.shardings:
        return new
    return replace(new, given=old.given, bound_seconds=old.bound_seconds, compared=new.compared or old.compared)


def _read(found: ir.DictAttr, stage: int, program: StagedProgram, paths: Sequence[str]) -> ShardingPlan:
    memory = [ir.DictAttr(entry) for entry in ir.ArrayAttr(found["memory_bytes"])]
    compared = [ir.DictAttr(entry) for entry in ir.ArrayAttr(found["compared"])] if "compared" in found else []
    shardings = {
        piece.argument: str(program.values[piece.value].spec)
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
        shardings=tuple((paths[number], text) for number, text in sorted(shardings.items()) if number < len(paths)),
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
