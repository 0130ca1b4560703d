"""The options of ``bactrian.parallelize``, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import MAX_COUNT
from bactrian.passes.machine.cluster_file import read_cluster
from bactrian.passes.machine.spec import MeshAxes, axes_text, meshes_text, num_devices, parse_axes
from bactrian.passes.plan.schema import Plan
from bactrian.passes.schedules.by_name import DEFAULT_SCHEDULE, schedule_named
from bactrian.passes.sharding.baselines import check_strategy

_LEAVE_OUT = "leave it out, or make the plan again"


@dataclass(frozen=True)
class Options:
    """The options of ``parallelize``, checked. Where a plan is given, what it decides stands in ``num_stages`` and so on.

    Attributes:
        mesh: of all stages, as it was given; `meshes` has those of a plan.
        given: what `of` was told, without what is None.
    """

    num_stages: int | None
    num_microbatches: int
    schedule: str
    batch_argnums: tuple[int, ...]
    state: Mapping[int, int | None] | None
    plan: Plan | None
    donate: bool
    forward_only: bool
    out_reduction: Any
    static_argnums: tuple[int, ...]
    static_argnames: tuple[str, ...]
    axis_name: str | None
    mesh: MeshAxes | None
    cluster: str
    strategy: str
    check_inputs: bool
    given: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def of(cls, **user_options: Any) -> Options:
        """The options that a user gave ``parallelize``; None stands for the default, or for what the plan has.

        Raises:
            ConfigError: an option is not known, is wrong, or differs from the plan.
        """
        _check_names(user_options)
        given = {name: value for name, value in user_options.items() if value is not None}
        plan = given.get("plan")
        if plan is not None and not isinstance(plan, Plan):
            plan = given["plan"] = Plan.load(plan)  # what is changed later is held against the same plan
        mesh, strategy = mesh_axes(given.get("mesh")), given.get("strategy", "auto")
        if plan is not None:
            _check_against_plan(plan, given, mesh, strategy)
        return cls(
            num_stages=given.get("num_stages") if plan is None else plan.num_stages,
            num_microbatches=given.get("num_microbatches", 1) if plan is None else plan.num_microbatches,
            schedule=given.get("schedule", DEFAULT_SCHEDULE) if plan is None else plan.schedule,
            batch_argnums=_argnums("batch_argnums", given.get("batch_argnums", 1)),
            state=given.get("state"),
            plan=plan,
            donate=given.get("donate", True),
            forward_only=given.get("forward_only", False),
            out_reduction=given.get("out_reduction", "concat"),
            static_argnums=_argnums("static_argnums", given.get("static_argnums", ())),
            static_argnames=_argnames(given.get("static_argnames", ())),
            axis_name=_axis_name(given.get("axis_name")),
            mesh=mesh,
            cluster=cluster_file(given["cluster"]) if "cluster" in given else "",
            strategy=strategy,
            check_inputs=given.get("check_inputs", True),
            given=given,
        )

    def changed(self, **user_options: Any) -> Options:
        """These options with some given anew, as `of` takes them."""
        return Options.of(**{**self.given, **user_options})

    @property
    def meshes(self) -> tuple[MeshAxes, ...]:
        """The mesh of each of the plan's stages, or the one that was given for all stages; none without either."""
        if self.plan is not None:
            return tuple(stage.mesh for stage in self.plan.stages)
        return () if self.mesh is None else (self.mesh,)

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_microbatches"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, Integral) or not 1 <= int(count) <= MAX_COUNT):
                raise ConfigError(f"{name} is {count!r}", fix=f"give a number from 1 to {MAX_COUNT}, or leave it out")
        schedule_named(self.schedule)
        check_strategy(self.strategy)
        if self.strategy != "auto" and num_devices(self.mesh or ()) == 1:
            raise ConfigError(
                f"strategy is {self.strategy}, but there is no mesh", fix='give a mesh, as in mesh="data=8"'
            )


def _check_names(user_options: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(Options) if each.name != "given"]
    for name in user_options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {nearest[0]}?" if nearest else f"the options are {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r}", fix=fix)


def _check_against_plan(plan: Plan, given: Mapping[str, Any], mesh: MeshAxes | None, strategy: str) -> None:
    """Refuse an option that was given and says otherwise than the plan."""
    check_stages(plan, given.get("num_stages"))
    for name, has in (("num_microbatches", plan.num_microbatches), ("schedule", plan.schedule)):
        if given.get(name, has) != has:
            raise ConfigError(f"{name} is {given[name]}, but the plan has {has}", fix=_LEAVE_OUT)
    if strategy != "auto":
        raise ConfigError(
            f"strategy is {strategy}, but a plan is given", fix="leave out one of the two: a plan decides the shardings"
        )
    meshes = [stage.mesh for stage in plan.stages]
    if mesh is not None and any(each != mesh for each in meshes):
        raise ConfigError(f"mesh is {axes_text(mesh)}, but the plan has {meshes_text(meshes)}", fix=_LEAVE_OUT)


def check_stages(plan: Plan, num_stages: int | None, num_layers: int | None = None) -> None:
    """Refuse numbers of stages and layers that a plan which is applied does not have; None is none that was given."""
    for name, asked, has in (
        ("stages", num_stages, plan.num_stages),
        ("layers", num_layers, plan.num_layers),
    ):
        if asked not in (None, has):
            raise ConfigError(f"num_{name} is {asked}, but the plan has {has} {name}", fix=_LEAVE_OUT)


def _argnums(option: str, argnums: Any) -> tuple[int, ...]:
    numbers = (argnums,) if isinstance(argnums, Integral) else argnums
    if not isinstance(numbers, Sequence) or not all(isinstance(each, Integral) for each in numbers):
        raise ConfigError(f"{option} is {argnums!r}", fix="give the position of an argument, or several")
    return tuple(numbers)


def _argnames(argnames: Any) -> tuple[str, ...]:
    names = (argnames,) if isinstance(argnames, str) else argnames
    if not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise ConfigError(f"static_argnames is {argnames!r}", fix="give the name of an argument, or several")
    return tuple(names)


def _axis_name(name: Any) -> str | None:
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"axis_name is {name!r}", fix="give the name of one axis, as jax.pmap has it")
    return name


def mesh_axes(mesh: Any) -> MeshAxes | None:
    """Names and sizes of axes, from what a user gave as a mesh: a text, a mapping or None.

    Raises:
        ConfigError: they are no mesh.
    """
    if mesh is None:
        return None
    if isinstance(mesh, str):
        return parse_axes(mesh)
    if not isinstance(mesh, Mapping):
        raise ConfigError(f"mesh is {mesh!r}, neither a text nor a mapping", fix='as in {"data": 2, "model": 4}')
    axes = parse_axes(",".join(f"{name}={size}" for name, size in mesh.items()))
    if [name for name, _ in axes] != list(mesh):
        raise ConfigError(f"invalid name of an axis in mesh {dict(mesh)!r}", fix="use letters, digits and _")
    return axes


def cluster_file(cluster: str | Path) -> str:
    """The file of a cluster, or ``file.toml:name``, once it is seen that it can be read."""
    read_cluster(cluster)
    return str(cluster)
