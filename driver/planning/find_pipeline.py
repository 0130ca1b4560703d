"""The pipeline of a step, found: the number of microbatches here, all else by ``choose-pipeline`` for each number."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.source import line_of_error
from bactrian.passes import pipelines
from bactrian.passes.choose_pipeline import KnownMenus
from bactrian.passes.frame.errors import BactrianError, InfeasiblePlanError, OtherSizeError, ProgramError
from bactrian.passes.frame.module_text import copy_module
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import NUM_LAYERS, required_integer
from bactrian.passes.machine.cluster_file import read_cluster
from bactrian.passes.machine.host_cores import num_cores
from bactrian.passes.machine.spec import MeshAxes, meshes_text
from bactrian.passes.pipelining.layer_programs import LayerReading
from bactrian.passes.pipelining.measured_stages import MeasuredStage, stages_text
from bactrian.passes.pipelining.pipeline_candidates import ChosenPipeline
from bactrian.passes.plan.pipeline_record import PipelineRecord, TriedMicrobatches

MOST_LAYERS = 96
_MOST_ROUNDS = 4  # of searches, each with less memory
_LEAST_CHANGE = 0.98  # of the memory that stages may fill, from one to the next
# What XLA needs beside values is known when the stages are there. Until then some memory is left to it, which saves tries.
_FIRST_SHARE = 0.95  # of a device's memory, that the search lets stages fill
_SOLVER_SHARE = 0.95  # of that, that shardings may fill at first
_STAGE_TOLERANCE = 2e-3  # of the time of a stage: what layers take, of which stages were chosen, is no nearer
_DEVICES_OF_A_WORKER = 8  # with fewer devices there is too little to solve for more processes to pay


@dataclass(frozen=True)
class FixedDecisions:
    """What the user decides about a pipeline; None, or nothing, is what is found.

    Attributes:
        num_stages, num_microbatches, schedule: as ``parallelize`` has them.
        boundaries: the first layer of each stage.
        meshes: of all stages, or of each.
        remat: one word for all layers.
    """

    num_stages: int | None = None
    num_microbatches: int | None = None
    schedule: str | None = None
    boundaries: tuple[int, ...] = ()
    meshes: tuple[MeshAxes, ...] = ()
    remat: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is decided."""
        given = {
            "boundaries": self.boundaries,
            "mesh": self.meshes,
            "num_microbatches": self.num_microbatches,
            "num_stages": self.num_stages,
            "remat": self.remat,
            "schedule": self.schedule,
        }
        return tuple(name for name, value in given.items() if value)


@dataclass(frozen=True)
class FoundPipeline:
    """A pipeline for one number of microbatches.

    Attributes:
        num_microbatches: of a step.
        num_layers: that the program was grouped into.
        chosen: stages and schedule.
        record: of the search.
        memory_bytes: of a device of each stage, that shardings may fill at first.
    """

    num_microbatches: int
    num_layers: int
    chosen: ChosenPipeline
    record: PipelineRecord
    memory_bytes: tuple[int, ...]

    def decisions(self, donate: bool, cluster: str) -> Decisions:
        """What later passes carry out."""
        stages = self.chosen.choice.stages
        return Decisions(
            self.num_layers,
            tuple(stage.mesh for stage in stages),
            tuple(stage.place.first_layer for stage in stages),
            donate,
            cluster,
            tolerance=_STAGE_TOLERANCE,
            memory_bytes=self.memory_bytes,
            remat=self.chosen.remat,
            first_devices=self.chosen.first_devices,
            record=self.record,
        )


class PipelineFinder:
    """Looks for the pipeline of the least step time.

    The step is traced for several numbers of microbatches: from one near four for each device, to fewer and to more as long
    as that makes it faster.

    Args:
        make_module: the captured step for a number of microbatches.
        rows: of the batch.
        fixed: what is not searched for.
        cluster: the file of the machines.
        clock: measures tracing and passes.

    Attributes:
        cluster: the file of the machines.
    """

    def __init__(
        self, make_module: Callable[[int], ir.Module], rows: int, fixed: FixedDecisions, cluster: str, clock: PhaseClock
    ) -> None:
        self._make_module, self._rows, self._fixed = make_module, rows, fixed
        self.cluster, self._hosts, self._clock = cluster, read_cluster(cluster), clock
        self._found: dict[int, FoundPipeline | InfeasiblePlanError | ProgramError] = {}
        self._grouped: ir.Module | None = None  # of the first number
        self._layers: LayerReading | None = None  # of it
        self._is_scalable = True  # to other numbers, as far as is known
        self._measured: Sequence[MeasuredStage] = ()
        self._menus = KnownMenus()
        # Of the memory of a device, by group, that stages may fill.
        self._shares = [_FIRST_SHARE] * len(self._hosts.groups)
        self._rounds = 1

    def find(self, measured: Sequence[MeasuredStage] = ()) -> FoundPipeline:
        """The best pipeline.

        Args:
            measured: stages that correct what layers are said to take.

        Raises:
            ConfigError: decisions contradict each other, or the cluster does not have what they ask for.
            ProgramError: the program can't be run as a pipeline.
            InfeasiblePlanError: no pipeline fits into memory.
        """
        self._measured = measured
        try:
            return self._find()
        except InfeasiblePlanError:
            if self._rounds > 1 or min(self._shares) == 1:
                raise
        self._shares = [1.0] * len(self._shares)  # a plan that may not fit, before none
        return self._find()

    def _find(self) -> FoundPipeline:
        self._found = {}
        if self._fixed.num_microbatches is not None:
            self._step_seconds(self._fixed.num_microbatches)
        else:
            counts = [count for count in range(1, self._rows + 1) if self._rows % count == 0]
            wanted = 4 * self._hosts.num_devices
            self._descend(counts, next((n for n, count in enumerate(counts) if count >= wanted), len(counts) - 1))
        return self._best()

    def find_leaner(self, found: FoundPipeline, error: InfeasiblePlanError) -> FoundPipeline:
        """The best pipeline whose stages leave as much more memory free as the search knew too little of.

        The search adds up what layers hold. The plan knows what each stage's functions need, which may be more.

        Args:
            found: a pipeline that does not fit.
            error: which says what the stage that fits least needs.

        Raises:
            InfeasiblePlanError: this error: there is no other pipeline, or too many were tried.
        """
        if error.stage is None or error.needed_bytes is None or self._rounds == _MOST_ROUNDS:
            raise error
        stage, device = found.chosen.choice.stages[error.stage], found.chosen.first_devices[error.stage]
        group = bisect_right(self._hosts.first_devices, device) - 1
        self._shares[group] *= min(_LEAST_CHANGE, stage.memory_bytes / error.needed_bytes)
        self._rounds += 1
        counts, self._found = list(self._found), {}
        for count in counts:
            self._step_seconds(count)
        try:
            return self._best()
        except (InfeasiblePlanError, ProgramError):
            raise error from None

    def _descend(self, counts: Sequence[int], start: int) -> None:
        """Go from one number to its neighbours as long as steps get faster, or nothing has fitted yet."""
        best = start
        for step in (1, -1):
            number = start
            while 0 <= number + step < len(counts):
                number += step
                known = self._step_seconds(counts[best])
                if self._step_seconds(counts[number]) < known:
                    best = number
                elif math.isfinite(known):
                    break
            if best != start:
                return

    def _step_seconds(self, num_microbatches: int) -> float:
        """Of the best pipeline; infinite where there is none."""
        if num_microbatches not in self._found:
            try:
                self._found[num_microbatches] = self._searched(num_microbatches)
            except (InfeasiblePlanError, ProgramError) as error:
                self._found[num_microbatches] = error
        found = self._found[num_microbatches]
        return found.chosen.simulated_seconds if isinstance(found, FoundPipeline) else math.inf

    def _searched(self, num_microbatches: int) -> FoundPipeline:
        """With the layers of the first trace, made larger or smaller, where that can be done; else traced again."""
        if self._grouped is None:
            self._grouped = self._group(num_microbatches)
            return self._choose(self._grouped, num_microbatches)
        if self._is_scalable:
            try:
                return self._choose(self._grouped, num_microbatches)
            except OtherSizeError:
                self._is_scalable = False
        return self._choose(self._group(num_microbatches), num_microbatches)

    def _group(self, num_microbatches: int) -> ir.Module:
        with self._clock.phase("trace"):
            module = self._traced(num_microbatches)
        passes = pipelines.group_blocks(MOST_LAYERS, self._fixed.num_stages or 0, self.cluster)
        self._clock.add(run_pipeline(module, passes).phases)
        return module

    def _traced(self, num_microbatches: int) -> ir.Module:
        """The step, which need not take every number of rows."""
        try:
            return self._make_module(num_microbatches)
        except ProgramError:
            raise
        except Exception as error:
            said = error.message if isinstance(error, BactrianError) else (str(error).splitlines() or [""])[0]
            raise ProgramError(
                f"the step can't be traced with {num_microbatches} microbatches: {said}",
                where=line_of_error(error),
                why=f"{type(error).__name__}, in the step itself",
                fix="give num_microbatches, if the step takes other numbers of rows",
            ) from error

    def _choose(self, grouped: ir.Module, num_microbatches: int) -> FoundPipeline:
        fixed, num_devices = self._fixed, self._hosts.num_devices
        passes = pipelines.find_stages(
            num_stages=fixed.num_stages or 0,
            num_microbatches=num_microbatches,
            boundaries=",".join(map(str, fixed.boundaries)),
            mesh=meshes_text(fixed.meshes),
            schedule=fixed.schedule or "",
            remat=fixed.remat,
            cluster=self.cluster,
            measured=stages_text(self._measured),
            num_workers=min(num_cores(), max(1, num_devices // _DEVICES_OF_A_WORKER)),
            memory_share=",".join(map(str, self._shares)),
        )
        module = copy_module(grouped)
        known: dict[type, object] = {KnownMenus: self._menus}
        if grouped is self._grouped and self._layers is not None:
            known[LayerReading] = self._layers
        report = run_pipeline(module, passes, kept=known)
        self._clock.add(report.phases)
        if grouped is self._grouped:
            self._layers = report.kept.get(LayerReading, self._layers)
        chosen = report.kept[ChosenPipeline]
        with module.context:
            num_layers = required_integer(module.operation, NUM_LAYERS, "run group-layers first")
        closed_form = chosen.choice.step_seconds
        record = PipelineRecord(
            closed_form,
            chosen.bound_seconds,
            chosen.simulated_seconds,
            MOST_LAYERS,
            num_devices,
            fixed.names,
            next_best=chosen.next_best,
        )
        groups = [bisect_right(self._hosts.first_devices, device) - 1 for device in chosen.first_devices]
        memory_bytes = tuple(
            int(_SOLVER_SHARE * self._shares[group] * self._hosts.groups[group].memory_bytes) for group in groups
        )
        return FoundPipeline(num_microbatches, num_layers, chosen, record, memory_bytes)

    def _best(self) -> FoundPipeline:
        """The fastest of all.

        Raises:
            InfeasiblePlanError, ProgramError: there is none; that of the smallest microbatch, which needs least.
        """
        found = [each for each in self._found.values() if isinstance(each, FoundPipeline)]
        if not found:
            error = self._found[max(self._found)]
            assert not isinstance(error, FoundPipeline)
            raise error
        best = min(found, key=lambda each: (each.chosen.simulated_seconds, each.num_microbatches))
        tried = tuple(_tried(count, each) for count, each in sorted(self._found.items(), key=lambda item: item[0]))
        return replace(best, record=replace(best.record, tried=tried))


def _tried(num_microbatches: int, found: FoundPipeline | InfeasiblePlanError | ProgramError) -> TriedMicrobatches:
    if not isinstance(found, FoundPipeline):
        return TriedMicrobatches(num_microbatches, reason=found.message)
    return TriedMicrobatches(num_microbatches, found.chosen.schedule.name, found.chosen.simulated_seconds)
