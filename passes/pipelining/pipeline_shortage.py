"""Why no pipeline fits: how much memory is missing, where, and what would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.frame.units import human_bytes
from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.spec import axes_text
from bactrian.passes.pipelining.pipeline_problem import PipelineProblem, StageChoice
from bactrian.passes.pipelining.pipeline_search import any_stages

_MOST_MEMORY = 2.0**30  # times that of a device
_MOST_HOSTS = 8  # times those of the cluster


@dataclass(frozen=True)
class OpenWays:
    """What the user could change.

    Attributes:
        given: the decisions that he could leave open.
        more_microbatches: whether microbatches have several rows.
    """

    given: tuple[str, ...] = ()
    more_microbatches: bool = True


def shortage(
    cluster: Cluster, problems: Sequence[PipelineProblem], ways: OpenWays, *, is_whole: bool = True
) -> InfeasiblePlanError:
    """The error for problems of which none has a pipeline: of equal ones but for the order of the cluster's hosts.

    Args:
        cluster: for people.
        problems: with the schedule that holds the fewest microbatches.
        ways: what could be changed.
        is_whole: whether stages may fill all of a device; else what the problems have is a part of it.
    """
    found = [(least, problem) for problem in problems if (least := least_memory(problem)) is not None]
    if not found:
        return InfeasiblePlanError(
            f"cannot place the program on {cluster.name}: no mesh of its devices can run all layers",
            why=cluster.description,
            fix="leave the meshes open, or describe other hosts",
        )
    (factor, stages), problem = min(found, key=lambda each: each[0][0])
    number = max(range(len(stages)), key=lambda stage: stages[stage].memory_bytes / _capacity(problem, stages[stage]))
    stage, has = stages[number], _capacity(problem, stages[number])
    state = sum(option.state_bytes for option in stage.options)
    kept = stage.in_flight * sum(option.kept_bytes for option in stage.options)
    layers = f"{stage.place.first_layer} to {stage.place.end_layer - 1}"
    return InfeasiblePlanError(
        f"cannot place the program on {cluster.name}: devices need about {human_bytes(round(has * factor))}, "
        + (
            f"they have {human_bytes(round(has))}" if is_whole else f"stages may fill {human_bytes(round(has))} of each"
        ),
        why=f"in the leanest plan of {len(stages)} stages and {problem.num_microbatches} microbatches, stage {number} "
        f"(layers {layers}, on {axes_text(stage.mesh)}) has {human_bytes(round(state))} of state and "
        f"{human_bytes(round(kept))} for {stage.in_flight} microbatch{'es' * (stage.in_flight > 1)} in flight on each "
        "device",
        fix=_fix(problem, ways),
    )


def _fix(problem: PipelineProblem, ways: OpenWays) -> str:
    hosts = fewest_hosts(problem) if len(problem.line.kinds) == 1 else None
    found = [f"leave {', '.join(ways.given)} open"] * bool(ways.given)
    found += [
        "take more or larger devices" if hosts is None else f"take larger devices, or {hosts} such hosts: there it fits"
    ]
    found += ["more microbatches"] * ways.more_microbatches
    return "; or ".join([*found, "a smaller dtype of state or activations"])


def least_memory(problem: PipelineProblem) -> tuple[float, tuple[StageChoice, ...]] | None:
    """The least memory that a pipeline fits into, as a multiple of what devices have, to one part in a hundred.

    Returns:
        It, with the stages that fit into it; None where no pipeline fits into any memory.
    """
    found, low, high = None, 0.0, 1.0
    while found is None or high > low * 1.01:
        factor = high if found is None else (low + high) / 2
        stages = any_stages(_with_memory(problem, factor))
        if stages is not None:
            found, high = (factor, stages), factor
        elif found is None and factor > _MOST_MEMORY:
            return None
        else:
            low, high = factor, factor * 2 if found is None else high
    return found


def fewest_hosts(problem: PipelineProblem) -> int | None:
    """How many hosts a pipeline fits on, on meshes that the problem has: twice as many as there are, or more.

    None where it does not fit on eight times as many.
    """
    line = problem.line
    for times in range(2, _MOST_HOSTS + 1):
        more = replace(problem, line=replace(line, hosts=line.hosts * times))
        if any_stages(more) is not None:
            return len(more.line.hosts)
    return None


def _with_memory(problem: PipelineProblem, factor: float) -> PipelineProblem:
    kinds = tuple(replace(kind, memory_bytes=kind.memory_bytes * factor) for kind in problem.line.kinds)
    return replace(problem, line=replace(problem.line, kinds=kinds))


def _capacity(problem: PipelineProblem, stage: StageChoice) -> float:
    return problem.line.kinds[stage.place.submesh.kind].memory_bytes
