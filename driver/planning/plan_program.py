"""From a captured program to a plan and its staged module: the pipelines in their order, and what is read in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxlib.mlir import ir

from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.planning.layer_names import name_layers
from bactrian.driver.planning.memory_refinement import (
    MemoryRefinementResult,
)
from bactrian.driver.planning.plan_remarks import remarks_of
from bactrian.driver.planning.plan_shardings import (
    GivenSpecs,
    as_before,
    plan_specs,
    read_timings,
    refuse_moved,
    refuse_overruled,
    write_specs,
)
from bactrian.driver.planning.predictions import (
    StageWork,
    first_layers,
    is_timed,
    placed_ops,
    stage_plan,
    stage_work,
)
from bactrian.driver.planning.simulated_step import simulated
from bactrian.driver.planning.stage_fitter import StageFitter, placed_stages
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.frame.pipeline import PipelineReport, run_pipeline
from bactrian.passes.ir.attributes import read_remat
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.plan.schema import LayerPlan, Plan, StagePlan
from bactrian.passes.plan.step_timing import StageTiming, TransferTiming
from bactrian.passes.stages.op_times import OpTimes


def plan_program(
    module: ir.Module,
    decisions: Decisions,
    *,
    fingerprint: str,
    platform: str,
    schedule: str,
    num_microbatches: int,
    plan: Plan | None = None,
    paths: Sequence[str] = (),
    placed: GivenSpecs | None = None,
    reproducer_dir: str | None = None,
) -> StagedPlan:
    """Run the passes on a captured module (which is consumed) and say what is predicted of the outcome.

    Args:
        plan: an existing plan to apply; its predictions are replaced by those of this run.
        paths: of the arguments, for people.
        placed: how another step has placed arguments.
        reproducer_dir: where a failing pass writes its reproducer.
    """
    clock = PhaseClock()
    formed = run_pipeline(module, decisions.forming(), reproducer_dir=reproducer_dir)
    clock.add(formed.phases)
    # What is known by layers is read now: split-stages keeps only stages.
    with clock.phase("name layers"):
        layered = _layered(module, decisions, formed, platform)
    sources = _give_shardings(module, decisions, plan, placed or {}, paths) if decisions.is_wide else {}
    fitter = StageFitter(decisions, platform, fingerprint, sources, paths, reproducer_dir, clock)
    stages_that_fit = fitter.fit(module, formed.kept)
    fitted = stages_that_fit.program
    with clock.phase("predict"):
        timings, transfers = _on_devices(fitted, stages_that_fit.timings, decisions.cluster, num_microbatches)
        stages = _stage_plans(fitted, layered, timings, decisions, plan, num_microbatches)
    made = Plan(
        num_stages=decisions.num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
        num_layers=decisions.num_layers,
        stages=stages,
        layers=layered.names,
        remat=layered.remat,
        fingerprint=fingerprint,
        platform=platform,
        peak_memory_bytes=max((s.device_memory_bytes or 0 for s in stages), default=0),
        options=plan.options if plan is not None else (),
        remarks=remarks_of((*formed.diagnostics, *stages_that_fit.diagnostics)),
        transfers=transfers,
        pipeline=decisions.record,
    )
    with clock.phase("simulate"):
        made, _ = simulated(made, fitted.program)
    return StagedPlan(made, fitted.module, decisions.donate, stages_that_fit.unsolved, clock.phases)


@dataclass(frozen=True)
class _Layered:
    """What is read of a program while its ops have layers: their names, which of them are a stage, what they compute
    again, the work of each stage."""

    names: tuple[LayerPlan, ...]
    of_stages: tuple[range, ...]
    remat: tuple[str, ...]
    work: tuple[StageWork, ...]


def _layered(module: ir.Module, decisions: Decisions, formed: PipelineReport, platform: str) -> _Layered:
    with module.context:
        ops = placed_ops(formed.kept[MainDataflow], formed.kept[OpTimes])
        starts = first_layers(ops, decisions.num_stages, decisions.num_layers)
        layers = tuple(range(start, end) for start, end in pairwise((*starts, decisions.num_layers)))
        names = name_layers(ops, decisions.num_layers, is_timed=is_timed(platform, decisions.cluster))
        return _Layered(names, layers, read_remat(module), stage_work(ops, decisions.num_stages))


def _on_devices(
    fitted: MemoryRefinementResult, timings: Sequence[StageTiming], cluster: str, num_microbatches: int
) -> tuple[tuple[StageTiming, ...], tuple[TransferTiming, ...]]:
    """The seconds of each stage with those of its calls, and of each transfer; nothing where nothing is known.

    Args:
        fitted: the program; where its shardings are chosen, it says what stages take.
        timings: of stages of one device.
        cluster: the file of the devices.
        num_microbatches: of a step.
    """
    timings = read_timings(fitted.module, num_microbatches) or timings
    if not timings:
        return (), ()
    placed = placed_stages(fitted, cluster)
    return placed.with_calls(timings), placed.transfers()


def _give_shardings(
    module: ir.Module, decisions: Decisions, plan: Plan | None, placed: GivenSpecs, paths: Sequence[str]
) -> dict[int, str]:
    """Write the shardings of arguments from a plan or another step; returns who gave each, by the argument's number."""
    with module.context:
        ranks = [len(ir.RankedTensorType(value.type).shape) for value in body(main_function(module)).arguments]
        given = {} if plan is None else plan_specs(plan, paths, ranks)
        refuse_moved(given, placed, paths)
        both = {number: {**given.get(number, {}), **placed.get(number, {})} for number in {**given, **placed}}
        refuse_overruled(module, both, decisions.meshes, paths)
        write_specs(module, both)
    return dict.fromkeys(given, "the plan that was applied") | dict.fromkeys(placed, "another step")


def _stage_plans(
    fitted: MemoryRefinementResult,
    layered: _Layered,
    timings: Sequence[StageTiming],
    decisions: Decisions,
    plan: Plan | None,
    num_microbatches: int,
) -> tuple[StagePlan, ...]:
    shardings = list(fitted.shardings)
    if plan is not None:
        shardings = [as_before(new, stage.sharding) for new, stage in zip(shardings, plan.stages, strict=False)]
    return tuple(
        stage_plan(
            fitted.program,
            stage,
            layered.of_stages[stage],
            layered.work[stage],
            num_microbatches=num_microbatches,
            first_device=decisions.first_devices[stage] if decisions.first_devices else None,
            timing=timings[stage] if timings else None,
            sharding=shardings[stage] if shardings else None,
        )
        for stage in range(decisions.num_stages)
    )
