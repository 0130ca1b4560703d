"""From stages that ops are assigned to, to functions that fit into devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxlib.mlir import ir

from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.planning.infeasible_core import with_conflict
from bactrian.driver.planning.memory_refinement import (
    MemoryRefinementResult,
    check_memory,
    clone_unsolved,
    is_fitting,
    refine_memory,
)
from bactrian.driver.planning.predictions import is_timed, placed_ops, stage_work
from bactrian.driver.planning.simulated_step import PlacedProgram
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.frame.pipeline import Diagnostic, PipelineReport, run_pipeline
from bactrian.passes.ir.attributes import PREPARE, phase_of, read_first_devices, stage_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.machine.cluster_file import cluster_or_cores
from bactrian.passes.network.solver import Solved
from bactrian.passes.plan.step_timing import StageTiming
from bactrian.passes.sharding.solve_snapshot import before_solving
from bactrian.passes.stages.op_times import OpTimes

_MOST_UNHOISTED = 3  # stages, one after the other: each takes another round


@dataclass(frozen=True)
class FittedStages:
    """Stages that fit.

    Attributes:
        program: the staged module and what was chosen for it.
        timings: of stages of one device, where they are known.
        unsolved: the module before shardings were chosen; None where there is nothing to choose.
        diagnostics: of the passes.
    """

    program: MemoryRefinementResult
    timings: tuple[StageTiming, ...]
    unsolved: ir.Operation | None
    diagnostics: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class StageFitter:
    """Localizes stages, chooses their shardings and cuts them.

    Attributes:
        decisions: what the passes carry out.
        platform: of the devices.
        fingerprint: of the program.
        sources: who gave the arguments their shardings that have one, by number.
        paths: of the arguments, for people.
        reproducer_dir: where a failing pass writes its reproducer.
        clock: measures the passes and what is between them.
    """

    decisions: Decisions
    platform: str
    fingerprint: str
    sources: Mapping[int, str]
    paths: Sequence[str]
    reproducer_dir: str | None
    clock: PhaseClock

    def fit(self, module: ir.Module, kept: Mapping[type, Any]) -> FittedStages:
        """The stages of a module, which is consumed.

        What no microbatch changes is computed once per step and held. Where that is why a stage does not fit, it computes
        it for each microbatch.

        Args:
            module: with stages and phases on the ops of ``@main``.
            kept: analyses that hold for it.

        Raises:
            InfeasiblePlanError: a stage does not fit.
        """
        with module.context:
            before = module.operation.clone().operation
        unhoisted, solved = list[int](), Solved()
        while True:
            localized = run_pipeline(
                module, self.decisions.localizing(unhoisted), reproducer_dir=self.reproducer_dir, kept=kept
            )
            self.clock.add(localized.phases)
            hoisted = _hoisted_stages(module)
            try:
                return self._fit(module, localized, solved)
            except InfeasiblePlanError as error:
                if error.stage is None or error.stage not in hoisted or len(unhoisted) == _MOST_UNHOISTED:
                    raise
                unhoisted.append(error.stage)
            with before.context:
                module, kept = clone_unsolved(before), {}

    def _fit(self, module: ir.Module, localized: PipelineReport, solved: Solved) -> FittedStages:
        """Choose shardings, where there are any, and cut."""
        decisions = self.decisions
        with self.clock.phase("predict"):
            timings = self._one_device_timings(module)
        unsolved = None
        if decisions.is_wide:
            # The choice of shardings starts from here each time that it is made: with less memory, or for an explanation.
            with module.context:
                unsolved = before_solving(module, self.fingerprint, decisions.cluster, decisions.strategy, self.sources)
        program = self._refined(module, unsolved, localized, solved)
        if decisions.cluster and not program.shardings:
            with self.clock.phase("estimate memory"):
                devices = placed_stages(program, decisions.cluster).memory_bytes
                check_memory(program.module, program.program, devices)
        return FittedStages(program, timings, unsolved, (*localized.diagnostics, *program.report.diagnostics))

    def _one_device_timings(self, module: ir.Module) -> tuple[StageTiming, ...]:
        """The seconds of each stage on one device; nothing where a file says nothing of the devices, or stages have
        several.

        The ops are those that run: residuals are chosen, and what no microbatch changes is apart.
        """
        decisions = self.decisions
        if decisions.is_wide or not is_timed(self.platform, decisions.cluster):
            return ()
        with module.context:
            times = OpTimes.of(module, decisions.cluster, lambda op, text: None)  # told of before, if at all
            ops = placed_ops(MainDataflow.of(main_function(module)), times)
            return tuple(work.timing for work in stage_work(ops, decisions.num_stages))

    def _refined(
        self, module: ir.Module, unsolved: ir.Operation | None, localized: PipelineReport, solved: Solved
    ) -> MemoryRefinementResult:
        """The program in stages that fit. Where nothing fits, the error names the given shardings that are to blame."""

        def cut(whole: ir.Module, limits: Sequence[int] = ()) -> PipelineReport:
            kept = {**(localized.kept if whole is module else {}), Solved: solved}
            passes = self.decisions.emitting(limits)
            report = run_pipeline(whole, passes, reproducer_dir=self.reproducer_dir, kept=kept)
            self.clock.add(report.phases)
            return report

        try:
            make_unsolved = None if unsolved is None else partial(clone_unsolved, unsolved)
            return refine_memory(module, make_unsolved, cut, self.clock, self.paths, self.decisions.memory_bytes)
        except InfeasiblePlanError as error:
            if unsolved is None:
                raise
            with module.context:
                raise with_conflict(error, unsolved, partial(is_fitting, cut=cut)) from error


def placed_stages(fitted: MemoryRefinementResult, cluster: str) -> PlacedProgram:
    """The program on the line of a cluster's hosts; of this host's cores if the file is ""."""
    with fitted.module.context:
        firsts = read_first_devices(fitted.module)
    return PlacedProgram.of(fitted.program, cluster_or_cores(cluster), firsts)


def _hoisted_stages(module: ir.Module) -> frozenset[int | None]:
    """The stages that compute anything once per step, before the first microbatch."""
    with module.context:
        ops = [view.operation for view in body(main_function(module)).operations]
        return frozenset(stage_of(op) for op in ops if phase_of(op) == PREPARE)
