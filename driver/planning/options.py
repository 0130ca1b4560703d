"""The options of ``bactrian.parallelize``, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.cluster import read_cluster
from bactrian.passes.machine.spec import MeshAxes, axes_text, num_devices, parse_axes
from bactrian.passes.plan.schema import Plan
from bactrian.passes.schedules.by_name import DEFAULT_SCHEDULE, schedule_named
from bactrian.passes.sharding.baselines import check_strategy


@dataclass(frozen=True)
class Options:
    """The options of ``parallelize``, checked; a plan's decisions stand in ``num_stages`` and so on."""

    num_stages: int | None
    num_microbatches: int
    schedule: str
    batch_argnums: tuple[int, ...]
    state: Mapping[int, int | None] | None
    plan: Plan | None
    donate: bool
    forward_only: bool
    out_reduction: Any
    mesh: MeshAxes | None = None
    cluster: str = ""
    strategy: str = "auto"

    def __post_init__(self) -> None:
        if self.num_stages is not None and self.num_stages < 1:
            raise ConfigError(f"num_stages is {self.num_stages}", fix="give a number of 1 or more, or None")
        if self.num_microbatches < 1:
            raise ConfigError(f"num_microbatches is {self.num_microbatches}", fix="give a number of 1 or more")
        schedule_named(self.schedule)
        check_strategy(self.strategy)
        if self.strategy != "auto" and num_devices(self.mesh or ()) == 1 and self.plan is None:
            raise ConfigError(
                f"strategy is {self.strategy}, but there is no mesh", fix='give a mesh, as in mesh="data=8"'
            )
        plan = self.plan
        if plan is not None:
            if self.num_stages not in (None, plan.num_stages):
                raise ConfigError(f"num_stages is {self.num_stages}, but the plan has {plan.num_stages} stages")
            num_microbatches, schedule = _of_plan(plan, self.num_microbatches, self.schedule)
            if self.strategy != "auto":
                raise ConfigError(
                    f"strategy is {self.strategy}, but a plan is given",
                    fix="leave out one of the two: a plan has layouts",
                )
            if self.mesh not in (None, plan.stages[0].mesh):
                raise ConfigError(
                    f"mesh is {axes_text(self.mesh)}, but the plan has {axes_text(plan.stages[0].mesh)}",
                    fix="leave it out, or make the plan again",
                )
            object.__setattr__(self, "mesh", plan.stages[0].mesh)
            object.__setattr__(self, "num_stages", plan.num_stages)
            object.__setattr__(self, "num_microbatches", num_microbatches)
            object.__setattr__(self, "schedule", schedule)


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
    """The file of a cluster, once it is seen that it can be read."""
    read_cluster(cluster)
    return str(Path(cluster))


def _of_plan(plan: Plan, num_microbatches: int, schedule: str) -> tuple[int, str]:
    """What the plan decides; an option that was given and says otherwise is refused."""
    if num_microbatches not in (1, plan.num_microbatches):
        raise ConfigError(
            f"num_microbatches is {num_microbatches}, but the plan has {plan.num_microbatches}",
            fix="leave it out, or make the plan again",
        )
    if schedule not in (DEFAULT_SCHEDULE, plan.schedule):
        raise ConfigError(f"schedule is {schedule}, but the plan has {plan.schedule}", fix="leave it out")
    return plan.num_microbatches, plan.schedule
