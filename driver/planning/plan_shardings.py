"""Shardings between the plan, the user's arguments and the IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import SHARDING_ESTIMATES, argument_attributes
from bactrian.passes.ir.meshes import SHARDING, USER_MESH, make_user_mesh, moved_to_mesh, sharding_attribute, spec_of
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.spec import REPLICATED, MeshAxes, Spec
from bactrian.passes.plan.schema import Plan
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan
from bactrian.runtime.staged_program import StagedProgram


@dataclass(frozen=True)
class GivenSpec:
    """A sharding that an argument is given.

    Attributes:
        spec: the sharding.
        mesh: names and sizes of the axes of the mesh that it is over.
    """

    spec: Spec
    mesh: MeshAxes


def plan_specs(plan: Plan, paths: Sequence[str], ranks: Sequence[int]) -> dict[int, GivenSpec]:
    """The shardings that a plan gives to arguments, by number; ``paths`` and ``ranks`` are the arguments'.

    Raises:
        ConfigError: it names an argument that is not there, or gives one an invalid sharding.
    """
    shardings = dict[str, tuple[str, MeshAxes]]()
    for stage in plan.stages:  # of an argument that several stages read, the first one's
        for path, text in () if stage.sharding is None else stage.sharding.shardings:
            shardings.setdefault(path, (text, stage.mesh))
    numbers = {path: number for number, path in enumerate(paths)}
    unknown = [path for path in shardings if path not in numbers]
    if unknown:
        raise ConfigError(
            f"the plan has a sharding for {unknown[0]}, which is no argument of the step", fix="take it out of the plan"
        )
    return {
        numbers[path]: GivenSpec(check_spec(text, ranks[numbers[path]], axes, path), axes)
        for path, (text, axes) in shardings.items()
    }


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


def refuse_moved(given: Mapping[int, GivenSpec], placed: Mapping[int, GivenSpec], paths: Sequence[str]) -> None:
    """Refuse a plan for arguments that another step has placed otherwise.

    Raises:
        ConfigError: names the first one.
    """
    for number in sorted(given.keys() & placed.keys()):
        if given[number].spec != placed[number].spec:
            raise ConfigError(
                f"the plan has the sharding {given[number].spec} for {paths[number]}, "
                f"which another step has placed as {placed[number].spec}",
                why="arguments that are placed stay where they are",
                fix="pass bactrian.gather(...) of the state, or leave the plan out",
            )


def refuse_overruled(module: ir.Module, given: Mapping[int, GivenSpec], paths: Sequence[str]) -> None:
    """Refuse shardings of a plan, or of another step, for arguments for which the program specifies other ones.

    Args:
        module: whose arguments have the shardings that users asked for, after ``adopt-shardings``.
        given: to arguments, by number.
        paths: of the arguments.

    Raises:
        ConfigError: names the first one.
    """
    for number, entry in enumerate(argument_attributes(main_function(module))):
        if number not in given or SHARDING not in entry:
            continue
        spec, asked = given[number].spec, spec_of(moved_to_mesh(entry[SHARDING], USER_MESH, given[number].mesh))
        if asked != spec:
            raise ConfigError(
                f"{paths[number]} is {spec} in the plan or from another step, and the program asks for {asked}",
                why="with_sharding_constraint, in_shardings and arguments that are sharded specify its sharding",
                fix="specify the same sharding; or make the plan again, and pass bactrian.gather(...) of the state",
            )


def write_specs(module: ir.Module, given: Mapping[int, GivenSpec], meshes: Sequence[MeshAxes]) -> None:
    """Give arguments of ``@main`` their shardings, over the mesh ``@user`` with the axes of the stages' meshes."""
    if not given:
        return
    make_user_mesh(module, meshes)
    main = main_function(module)
    entries = argument_attributes(main)
    for number, each in given.items():
        entries[number][SHARDING] = sharding_attribute(each.spec, USER_MESH)
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
