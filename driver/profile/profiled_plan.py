"""Plans whose stages were measured: searched, measured, and searched again with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from bactrian.driver.planning.find_pipeline import FoundPipeline
from bactrian.driver.planning.simulated_step import simulated
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.profile.stage_profiler import StageFailure, StageProfile, StageProfiler
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.machine.spec import axes_text
from bactrian.passes.pipelining.measured_stages import MeasuredStage
from bactrian.passes.pipelining.pipeline_problem import StageChoice
from bactrian.passes.plan.schema import Plan, Remark, StagePlan

MOST_ROUNDS = 8
_FAR_OFF = 10.0

_Profiles = Sequence[StageProfile | StageFailure | None]
_Key = tuple[object, ...]  # what the functions of a stage depend on


def find_profiled(
    plan: Callable[[tuple[MeasuredStage, ...]], tuple[FoundPipeline, StagedPlan]],
    profiler: StageProfiler,
    clock: PhaseClock,
) -> StagedPlan:
    """The fastest plan whose stages were measured.

    A round searches with the times of all stages that were measured before, and measures those of the pipeline that it
    finds. Rounds end with a pipeline of which all is known, or with the last one; stages that can't run are left out of the
    search from then on.

    Args:
        plan: finds a pipeline, with measured stages in the place of those that the model knows, and makes a plan of it.
        profiler: measures the stages of a plan.
        clock: measures how long that takes.

    Raises:
        InfeasiblePlanError: no pipeline fits, or of those that were found none can run.
    """
    measured, left_out, rounds = dict[_Key, MeasuredStage](), dict[str, None](), 0
    best, remarks = None, list[Remark]()
    while rounds < MOST_ROUNDS:
        rounds += 1
        try:
            found, staged = plan(tuple(measured.values()))
        except InfeasiblePlanError:
            if best is not None or left_out:
                break
            raise
        with clock.phase("measure stages"):
            profiles = profiler.profile(staged)
        left_out |= dict.fromkeys(failure_texts(staged.plan, profiles))
        new = _measured(found, profiles)
        if not any(isinstance(each, StageFailure) for each in profiles):
            staged = with_profiles(staged, profiles)
            if best is None or _seconds(staged) <= _seconds(best):
                best = staged
        if new.keys() <= measured.keys():
            break
        measured |= new
    else:
        remarks.append(
            Remark("remark", f"other pipelines may be faster: measuring ended at its limit of searches, {MOST_ROUNDS}")
        )
    if best is None:
        raise InfeasiblePlanError(
            "cannot run any of the pipelines that were found",
            why="; ".join(left_out),
            fix="describe the memory of the devices as it is, or give stages and meshes",
        )
    assert best.plan.pipeline is not None, "it was found"
    best = replace(best, plan=replace(best.plan, pipeline=replace(best.plan.pipeline, profile_rounds=rounds)))
    return with_remarks(best, [*map(_left_out, left_out), *remarks, *profiler.cache.remarks])


def profiled(staged: StagedPlan, profiler: StageProfiler, clock: PhaseClock) -> StagedPlan:
    """A plan that was given, with what was measured of its stages; those that can't run keep their predictions."""
    with clock.phase("measure stages"):
        profiles = profiler.profile(staged)
    failed = [Remark("warning", f"a stage can't run: {text}") for text in failure_texts(staged.plan, profiles)]
    return with_remarks(with_profiles(staged, profiles), [*failed, *profiler.cache.remarks])


def with_measurements(staged: StagedPlan, plan: Plan) -> StagedPlan:
    """The plan with what was measured of the stages of a plan that it applies."""
    profiles = [
        None if stage.measured is None or stage.timing is None else StageProfile(stage.timing, stage.measured)
        for stage in plan.stages
    ]
    return with_profiles(staged, profiles) if any(profiles) else staged


def with_profiles(staged: StagedPlan, profiles: _Profiles) -> StagedPlan:
    """The plan with what was measured of its stages in the place of what was predicted."""
    plan = staged.plan
    stages = tuple(_with_profile(plan, stage, profiles[stage.stage]) for stage in plan.stages)
    peak = max((stage.device_memory_bytes or 0 for stage in stages), default=0)
    made, _ = simulated(replace(plan, stages=stages, peak_memory_bytes=peak), staged.program)
    return with_remarks(replace(staged, plan=made), _far_off(made))


def _far_off(plan: Plan) -> Iterator[Remark]:
    """Where the model is wrong by so much that it must be of other devices."""
    measured = [(stage.predicted_seconds or 0.0, stage.measured) for stage in plan.stages if stage.measured is not None]
    taken, model = sum(seconds for seconds, _ in measured), sum(each.model_seconds for _, each in measured)
    if model and not 1 / _FAR_OFF <= taken / model <= _FAR_OFF:
        yield Remark(
            "warning",
            f"measured stages take {taken / model:.3g} times as long as the cluster file predicts",
            why="it may describe other devices than those of this host",
            fix="plan on a host of the cluster, or measure this one with `bactrian profile-cluster`",
        )


def with_remarks(staged: StagedPlan, remarks: Iterable[Remark]) -> StagedPlan:
    """The plan with more remarks, warnings first."""
    every = dict.fromkeys([*staged.plan.remarks, *remarks])
    ordered = tuple(sorted(every, key=lambda remark: remark.severity != "warning"))
    return replace(staged, plan=replace(staged.plan, remarks=ordered))


def failure_texts(plan: Plan, profiles: _Profiles) -> list[str]:
    """What is said of the stages that can't run."""
    return [
        f"layers {stage.first_layer} to {stage.last_layer} on {axes_text(stage.mesh)}, {plan.num_microbatches} "
        f"microbatches: {profile.reason}"
        for stage, profile in zip(plan.stages, profiles, strict=True)
        if isinstance(profile, StageFailure)
    ]


def _left_out(text: str) -> Remark:
    return Remark("warning", f"a stage that can't run was left out of the search: {text}")


def _with_profile(plan: Plan, stage: StagePlan, profile: StageProfile | StageFailure | None) -> StagePlan:
    if not isinstance(profile, StageProfile):
        return stage
    busy = profile.timing.busy_seconds(plan.num_microbatches)
    return replace(stage, timing=profile.timing, predicted_seconds=busy, measured=profile.measurement)


def _seconds(staged: StagedPlan) -> float:
    assert staged.plan.predicted_step_seconds is not None, "there is a cluster"
    return staged.plan.predicted_step_seconds


def _measured(found: FoundPipeline, profiles: _Profiles) -> dict[_Key, MeasuredStage]:
    """What was measured, as factors of what the search took stages to need."""
    made, schedule = dict[_Key, MeasuredStage](), found.chosen.schedule.name
    for stage, profile in zip(found.chosen.choice.stages, profiles, strict=True):
        if profile is None:
            continue
        first, end = stage.place.first_layer, stage.place.end_layer
        remat = tuple(option.remat for option in stage.options)
        place = first, end, stage.mesh, found.num_microbatches
        made[first, end, found.num_microbatches, stage.mesh, remat, schedule, stage.in_flight] = (
            MeasuredStage.unusable(*place)
            if isinstance(profile, StageFailure)
            else MeasuredStage(*place, *_factors(stage, profile))
        )
    return made


def _factors(stage: StageChoice, profile: StageProfile) -> tuple[float, float]:
    """By how much longer a stage takes than its options say: a microbatch, and what is done once."""
    timing = profile.timing
    options = stage.seconds / stage.seconds_factor, stage.update_seconds / stage.update_factor
    taken = timing.forward_seconds + timing.backward_seconds, timing.once_seconds
    seconds, update = (new / old if new > 0 and old > 0 else 1.0 for new, old in zip(taken, options, strict=True))
    return seconds, update
