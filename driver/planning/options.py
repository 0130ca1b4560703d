"""The options of ``bactrian.parallelize``, checked."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import MAX_COUNT
from bactrian.passes.machine.cluster_file import read_cluster
from bactrian.passes.machine.spec import MeshAxes, meshes_of_stages, meshes_text, num_devices, parse_axes, parse_meshes
from bactrian.passes.plan.pipeline_record import FOUND
from bactrian.passes.plan.remat_words import NO_REMAT, check_words, parse_remat, words_of_layers
from bactrian.passes.plan.schema import Plan
from bactrian.passes.schedules.by_name import DEFAULT_SCHEDULE, schedule_named
from bactrian.passes.sharding.baselines import check_strategy

_LEAVE_OUT = "leave it out, or make the plan again"

_FINDABLE = ("num_stages", "num_microbatches", "schedule", "mesh", "remat")


@dataclass(frozen=True)
class Options:
    """The options of ``parallelize``, checked. Where a plan is given, what it decides stands in ``num_stages`` and so on.

    Attributes:
        mesh: of each stage, or one of all stages, as it was given; `meshes` has those of a plan.
        boundaries: the first layer of each stage; none if they are open.
        finds: whether the user asks for a search: something is ``auto``, or stages have given layers.
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
    mesh: tuple[MeshAxes, ...]
    boundaries: tuple[int, ...]
    cluster: str
    strategy: str
    remat: tuple[str, ...]
    check_inputs: bool
    finds: bool
    profile: bool | str | Path
    given: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def of(cls, **user_options: Any) -> Options:
        """The options that a user gave ``parallelize``; None stands for the default, or for what the plan has.

        Raises:
            ConfigError: an option is not known, is wrong, or differs from the plan.
        """
        _check_names(user_options)
        told = {name: value for name, value in user_options.items() if value is not None}
        plan = told.get("plan")
        if plan is not None and not isinstance(plan, Plan):
            plan = told["plan"] = Plan.load(plan)  # what is changed later is held against the same plan
        found = [name for name in _FINDABLE if isinstance(told.get(name), str) and told[name] == FOUND]
        if found and plan is not None:
            raise ConfigError(f"{found[0]} is {FOUND}, but a plan is given", fix=_LEAVE_OUT)
        given = {name: value for name, value in told.items() if name not in found}
        boundaries = _boundaries(given.get("boundaries"))
        mesh, strategy = given_meshes(given.get("mesh")), given.get("strategy", "auto")
        remat = remat_words(given.get("remat"))
        if plan is not None:
            _check_against_plan(plan, given, mesh, boundaries, strategy)
            if remat and words_of_layers(remat, plan.num_layers) != plan.remat:
                has = ", ".join(plan.remat) or NO_REMAT
                raise ConfigError(f"remat is {', '.join(remat)}, but the plan has {has}", fix=_LEAVE_OUT)
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
            boundaries=boundaries,
            cluster=cluster_file(given["cluster"]) if "cluster" in given else "",
            strategy=strategy,
            remat=remat if plan is None else plan.remat,
            check_inputs=given.get("check_inputs", True),
            finds=plan is None and bool(found or boundaries),
            profile=_profile(given.get("profile", False)),
            given=told,
        )

    def changed(self, **user_options: Any) -> Options:
        """These options with some given anew, as `of` takes them."""
        return Options.of(**{**self.given, **user_options})

    def decided(self, name: str) -> Any:
        """What the user said of an option; None where it is left open or to be found."""
        value = self.given.get(name)
        return None if isinstance(value, str) and value == FOUND else value

    def leaves_open(self, cluster: str) -> bool:
        """Whether stages and meshes are found, with such a cluster file: it is asked for, or there is a file and no mesh."""
        is_given = self.plan is not None or self.mesh or self.forward_only
        return self.finds or (bool(cluster) and not is_given)

    @property
    def meshes(self) -> tuple[MeshAxes, ...]:
        """The mesh of each of the plan's stages, or those that were given, of which one is that of all stages; none
        without either."""
        return self.mesh if self.plan is None else tuple(stage.mesh for stage in self.plan.stages)

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_microbatches"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, Integral) or not 1 <= int(count) <= MAX_COUNT):
                raise ConfigError(f"{name} is {count!r}", fix=f"give a number from 1 to {MAX_COUNT}, or leave it out")
        schedule_named(self.schedule)
        check_strategy(self.strategy)
        self._check_number_of_stages()
        if self.strategy != "auto" and all(num_devices(axes) == 1 for axes in self.mesh):
            raise ConfigError(
                f"strategy is {self.strategy}, but there is no mesh", fix='give a mesh, as in mesh="data=8"'
            )

    def _check_number_of_stages(self) -> None:
        """Stages, their meshes and their boundaries are equally many."""
        stages, boundaries = self.num_stages, self.boundaries
        if boundaries and stages not in (None, len(boundaries)):
            raise ConfigError(
                f"num_stages is {stages}, but boundaries are those of {len(boundaries)} stages",
                why=f"they begin at layers {', '.join(map(str, boundaries))}",
                fix="leave out one of the two",
            )
        count = len(boundaries) or stages
        if count is not None and self.mesh:
            meshes_of_stages(self.mesh, count)


def _check_names(user_options: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(Options) if each.name not in ("given", "finds")]
    for name in user_options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {nearest[0]}?" if nearest else f"the options are {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r}", fix=fix)


def _check_against_plan(
    plan: Plan,
    given: Mapping[str, Any],
    meshes: tuple[MeshAxes, ...],
    boundaries: tuple[int, ...],
    strategy: str,
) -> None:
    """Refuse an option that was given and says otherwise than the plan."""
    check_stages(plan, given.get("num_stages"))
    for name, has in (("num_microbatches", plan.num_microbatches), ("schedule", plan.schedule)):
        if given.get(name, has) != has:
            raise ConfigError(f"{name} is {given[name]}, but the plan has {has}", fix=_LEAVE_OUT)
    planned_layers = tuple(stage.first_layer for stage in plan.stages)
    if boundaries not in ((), planned_layers):
        has = ", ".join(map(str, planned_layers))
        raise ConfigError(f"boundaries are {', '.join(map(str, boundaries))}, but the plan has {has}", fix=_LEAVE_OUT)
    if strategy != "auto":
        raise ConfigError(
            f"strategy is {strategy}, but a plan is given", fix="leave out one of the two: a plan decides the shardings"
        )
    planned = [stage.mesh for stage in plan.stages]
    if meshes and meshes_of_stages(meshes, plan.num_stages) != tuple(planned):
        raise ConfigError(f"mesh is {meshes_text(meshes)}, but the plan has {meshes_text(planned)}", fix=_LEAVE_OUT)


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


def _profile(profile: Any) -> bool | str | Path:
    if not isinstance(profile, (bool, str, Path)):
        raise ConfigError(
            f"profile is {profile!r}", fix="give True, or the folder in which measurements are kept, or leave it out"
        )
    return profile


def remat_words(remat: Any) -> tuple[str, ...]:
    """The words of a user's ``remat``: one, several in a text with commas or in a sequence; none for None.

    Raises:
        ConfigError: they are none.
    """
    if remat is None:
        return ()
    words = parse_remat(remat) if isinstance(remat, str) else remat
    if not isinstance(words, Sequence) or not words or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"remat is {remat!r}", fix='give a word, as in remat="all", or one for each layer')
    check_words(words)
    return tuple(words)


def _boundaries(boundaries: Any) -> tuple[int, ...]:
    """The first layer of each stage, from a text with commas or a sequence; none for None."""
    if boundaries is None:
        return ()
    words = boundaries.split(",") if isinstance(boundaries, str) else boundaries
    try:
        found = tuple(int(word) if isinstance(word, str) else operator.index(word) for word in words)
    except (TypeError, ValueError):
        found = ()
    if found[:1] != (0,) or any(a >= b for a, b in itertools.pairwise(found)):
        raise ConfigError(
            f"boundaries is {boundaries!r}, not the first layer of each stage",
            why="stages follow one another, and the first one begins at layer 0",
            fix="as in (0, 3, 5)",
        )
    return found


def given_meshes(mesh: Any) -> tuple[MeshAxes, ...]:
    """Names and sizes of the axes of each stage's mesh, or of one for all stages, from what a user gave: a text, a
    mapping, or a sequence of mappings; none for None.

    Raises:
        ConfigError: they are no meshes.
    """
    if mesh is None:
        return ()
    if isinstance(mesh, str):
        return parse_meshes(mesh)
    if isinstance(mesh, Sequence) and mesh:
        return tuple(_mesh_axes(each) for each in mesh)
    return (_mesh_axes(mesh),)


def _mesh_axes(mesh: Any) -> MeshAxes:
    if not isinstance(mesh, Mapping):
        raise ConfigError(
            f"mesh is {mesh!r}, neither a text nor a mapping, nor a mapping for each stage",
            fix='as in {"data": 2, "model": 4}',
        )
    axes = parse_axes(",".join(f"{name}={size}" for name, size in mesh.items()))
    if [name for name, _ in axes] != list(mesh):
        raise ConfigError(f"invalid name of an axis in mesh {dict(mesh)!r}", fix="use letters, digits and _")
    return axes


def cluster_file(cluster: str | Path) -> str:
    """The file of a cluster, or ``file.toml:name``, once it is seen that it can be read."""
    read_cluster(cluster)
    return str(cluster)
