"""A traced step: its program, and the way to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bactrian.driver.arrays.placed_arguments import PlacedArguments
from bactrian.driver.capture.captured_step import Captured
from bactrian.driver.gc_pause import paused_collection
from bactrian.driver.planned_step import Planned
from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.planning.find_pipeline import FixedDecisions, FoundPipeline, PipelineFinder
from bactrian.driver.planning.options import Options, check_stages, cluster_file
from bactrian.driver.planning.plan_broadcast import staged_together
from bactrian.driver.planning.plan_program import plan_program
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.profile.profiled_plan import find_profiled, profiled, with_measurements
from bactrian.driver.profile.stage_profiler import StageProfiler, default_folder
from bactrian.driver.ranks import World
from bactrian.driver.run.session import num_groups
from bactrian.driver.source import line_here
from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.machine.spec import MeshAxes, meshes_of_stages, meshes_text, num_devices
from bactrian.passes.pipelining.measured_stages import MeasuredStage
from bactrian.passes.plan.pipeline_record import FOUND
from bactrian.passes.plan.remat_words import words_of_layers
from bactrian.passes.plan.schema import Plan
from bactrian.runtime import faults


class Traced:
    """A traced step. `plan` cuts it into stages."""

    def __init__(
        self,
        captured: Captured,
        options: Options,
        placed: PlacedArguments | None,
        retrace: Callable[[int, str], Captured],
    ) -> None:
        """``retrace``: the same step for another number of microbatches and another schedule."""
        self.captured, self.options, self.placed, self._retrace = captured, options, placed, retrace

    @property
    def text(self) -> str:
        """The captured module, with locations."""
        return self.captured.text_with(self.placed)

    @property
    def fingerprint(self) -> str:
        """What identifies the program: equal for equal programs, whatever the process."""
        return self.captured.fingerprint

    def __str__(self) -> str:
        return self.text

    def plan(
        self,
        cluster: str | Path | None = None,
        *,
        num_stages: int | None = None,
        num_layers: int | None = None,
        plan: Plan | None = None,
        compare: bool = False,
    ) -> Planned:
        """Cut the program into stages; needs no device.

        With a cluster file and no mesh, or where anything is ``auto``, what is not given is found: stages, their meshes,
        microbatches, schedule, and what layers compute again.

        Args:
            cluster: the file that describes the machines, in the place of what ``parallelize`` was told.
            num_stages: overrides what ``parallelize`` was told; by default that of the step that placed the state,
                or one per rank.
            num_layers: groups of forward ops that stages are made of; by default as many as ``remat`` has words, or as
                stages.
            plan: decisions to apply, in the place of those that ``parallelize`` was told.
            compare: on a mesh, predict what the baselines would take too.

        Raises:
            ProgramError: the program can't be cut so; the plan was made for another program.
            ConfigError: the state was placed by a step with another number of stages; the plan has other numbers than
                those that were given.
        """
        faults.at("plan")
        cluster = self.options.cluster if cluster is None else cluster_file(cluster)
        plan, clock, profiler = plan or self.options.plan, PhaseClock(), self._profiler(cluster)
        if num_layers is not None and plan is None and self.options.finds:
            raise ConfigError(
                f"num_layers is {num_layers}, but the pipeline is to be found",
                why=f"an option is {FOUND}, or boundaries are given: they count the layers that the search makes",
                fix="leave out one of the two",
            )
        if plan is None and num_layers is None and self._finds(cluster):
            staged = self._found(num_stages, cluster, compare, profiler, clock)
            staged.phases = (*clock.phases, *staged.phases)
            return Planned(self.captured, staged, check_inputs=self.options.check_inputs)
        if plan is not None:
            check_stages(plan, num_stages or self.options.decided("num_stages"), num_layers)
            decisions = self._decisions_of(plan, cluster)
        else:
            decisions = self._decisions(num_stages or self.options.num_stages, num_layers, cluster)
        staged = self._stage(replace(decisions, compare=compare), plan)
        if profiler is not None:
            staged = profiled(staged, profiler, clock)
        elif plan is not None:
            staged = with_measurements(staged, plan)
        staged.phases = (*clock.phases, *staged.phases)
        return Planned(self.captured, staged, check_inputs=self.options.check_inputs)

    def _stage(self, decisions: Decisions, plan: Plan | None = None) -> StagedPlan:
        """The step as it was last captured, cut into the stages that are decided.

        Args:
            decisions: what the passes carry out.
            plan: that is applied.
        """
        cluster = decisions.cluster
        if decisions.is_wide and not cluster and self.captured.platform != "cpu":
            raise ConfigError(
                f"a mesh of {self.captured.platform} devices needs a cluster file",
                why="shardings depend on what the devices and their links can do, and only the cores of this host are known",
                fix="parallelize(cluster='cluster.toml')",
            )
        with paused_collection():
            return plan_program(
                self.captured.module(self.placed),
                decisions,
                fingerprint=self.captured.fingerprint,
                platform=self.captured.platform,
                schedule=self.captured.schedule,
                num_microbatches=self.captured.num_microbatches,
                plan=plan,
                paths=[argument.path for argument in self.captured.arguments],
                placed=None if self.placed is None else self.placed.specs,
            )

    def _profiler(self, cluster: str) -> StageProfiler | None:
        """What measures stages, if that was asked for."""
        profile = self.options.profile
        if profile is False:
            return None
        if not cluster:
            raise ConfigError(
                "cannot profile stages without a cluster file",
                why="what is not measured is predicted of its devices",
                fix="parallelize(cluster='cluster.toml'), as `bactrian profile-cluster` writes it",
            )
        if (ranks := World.current().num_ranks) > 1:
            raise ConfigError(
                f"cannot profile stages in a job of {ranks} ranks",
                why="they keep the devices and cores that stages are measured on",
                fix="plan before with `bactrian plan --profile --save plan`, and give parallelize(plan='plan')",
            )
        return StageProfiler(cluster, default_folder() if profile is True else Path(profile))

    def _found(
        self, num_stages: int | None, cluster: str, compare: bool, profiler: StageProfiler | None, clock: PhaseClock
    ) -> StagedPlan:
        """The pipeline of the least step time, cut into stages; with a profiler, the fastest of those that it measures."""
        finder = self._finder(num_stages, cluster, clock)

        def plan(measured: Sequence[MeasuredStage] = ()) -> tuple[FoundPipeline, StagedPlan]:
            return self._fitting(finder, measured, compare, clock)

        if profiler is None:
            return plan()[1]
        staged = find_profiled(plan, profiler, clock)
        self.captured = self._retrace(staged.plan.num_microbatches, staged.plan.schedule)
        return staged

    def _finds(self, cluster: str) -> bool:
        """Whether the pipeline is found: where it is asked for, or there is a cluster, and neither a mesh nor a step that
        placed the state."""
        if self.options.finds:
            self._check_can_find(cluster)
        return self.options.leaves_open(cluster) and self.placed is None

    def _check_can_find(self, cluster: str) -> None:
        asked = "stages with given boundaries" if self.options.boundaries else f"what is {FOUND}"
        if not cluster:
            raise ConfigError(
                f"cannot find {asked}: there is no cluster file",
                why="a pipeline is found for devices whose rates, links and memory are known",
                fix="give cluster='cluster.toml', as `bactrian profile-cluster` writes one",
            )
        if self.captured.forward_only:
            raise ConfigError(
                f"cannot find {asked}: the step takes no gradient",
                why="the search knows steps with a backward phase",
                fix="give num_stages, num_microbatches and mesh",
            )
        if self.placed is not None:
            raise ConfigError(
                f"cannot find {asked}: another step has placed the arguments",
                where=line_here(),
                why="steps that share state share its stages and meshes",
                fix=f"leave {FOUND} and boundaries out, or pass bactrian.gather(...) of the state",
            )

    def _fitting(
        self, finder: PipelineFinder, measured: Sequence[MeasuredStage], compare: bool, clock: PhaseClock
    ) -> tuple[FoundPipeline, StagedPlan]:
        """The pipeline of the least step time whose stages fit, and its plan: where one needs more memory than the search
        knew of, the search is made again. The step is then traced as the pipeline has it."""
        with paused_collection(), clock.phase("find pipeline"):
            found = finder.find(measured)
        while True:
            clock.add(self.captured.phases)
            self.captured = self._retrace(found.num_microbatches, found.chosen.schedule.name)
            decisions = found.decisions(self.options.donate, finder.cluster)
            try:
                return found, self._stage(replace(decisions, compare=compare))
            except InfeasiblePlanError as error:
                with paused_collection(), clock.phase("find pipeline"):
                    found = finder.find_leaner(found, error)

    def _finder(self, num_stages: int | None, cluster: str, clock: PhaseClock) -> PipelineFinder:
        """What looks for a pipeline, with what was given."""
        remat = self.options.remat
        if self.options.strategy != "auto" or len(remat) > 1:
            name = "strategy" if self.options.strategy != "auto" else "remat"
            raise ConfigError(
                f"cannot find stages and meshes with {name} {self.options.strategy if name == 'strategy' else ', '.join(remat)}",
                why="it belongs to given meshes" if name == "strategy" else "layers are not known yet",
                fix=f"leave it out, or give num_stages and mesh and nothing as {FOUND}"
                if name == "strategy"
                else "give one word for all layers",
            )
        fixed = FixedDecisions(
            num_stages or self.options.num_stages,
            self.options.decided("num_microbatches"),
            self.options.decided("schedule"),
            self.options.boundaries,
            self.options.mesh,
            remat[0] if remat else "",
        )
        batch = [argument.shape[0] for argument in self.captured.arguments if argument.role == "batch"]
        return PipelineFinder(
            lambda count: self._retrace(count, self.options.schedule).module(), math.gcd(*batch), fixed, cluster, clock
        )

    def _decisions_of(self, plan: Plan, cluster: str) -> Decisions:
        """The decisions of a plan, once it is seen that it fits this program and its options."""
        plan.check_program(self.captured.fingerprint)
        self._check_plan(plan)
        self._check_placed(plan.num_stages)
        return Decisions.of_plan(plan, self.options.donate, cluster)

    def _decisions(self, num_stages: int | None, num_layers: int | None, cluster: str) -> Decisions:
        """What the options decide; as many stages as the step that placed the state has, or one per rank, by default."""
        meshes = self._meshes()
        if num_stages is not None:
            self._check_placed(num_stages)
        elif self.placed is not None:
            num_stages = self.placed.num_stages
        else:
            num_stages = len(meshes) if len(meshes) > 1 else num_groups(*meshes)
        remat = self.options.remat
        num_layers = num_layers or (len(remat) if len(remat) > 1 else num_stages)
        return Decisions(
            num_layers,
            meshes_of_stages(meshes, num_stages),
            donate=self.options.donate,
            cluster=cluster,
            strategy=self._strategy(),
            remat=words_of_layers(remat, num_layers),
        )

    def plan_with_all(self) -> Planned:
        """Cut the program into stages; on a mesh, rank 0 chooses shardings for all ranks (collective).

        Raises:
            BactrianError: as `plan` does, on every rank; or ranks have other programs or options.
        """
        world, meshes = World.current(), self._meshes()
        finds = self._finds(self.options.cluster)
        if world.num_ranks == 1 or (not finds and all(num_devices(mesh) == 1 for mesh in meshes)):
            return self.plan()
        staged = staged_together(lambda: self.plan().staged, self.fingerprint, self.options, meshes, world)
        if finds:
            self.captured = self._retrace(staged.plan.num_microbatches, staged.plan.schedule)
        return Planned(self.captured, staged, is_shared=True, check_inputs=self.options.check_inputs)

    def _meshes(self) -> tuple[MeshAxes, ...]:
        """The mesh of each stage, or one for all stages: those that were asked for, or on which the arguments are."""
        asked, placed = self.options.meshes, () if self.placed is None else self.placed.meshes
        if asked and placed and meshes_of_stages(asked, len(placed)) != placed:
            raise ConfigError(
                f"mesh is {meshes_text(asked)}, but the arguments were placed on {meshes_text(placed)}",
                where=line_here(),
                why="steps that share state share its meshes",
                fix="leave mesh out, or pass bactrian.gather(...) of the state",
            )
        one_device: MeshAxes = (("data", 1),)
        return asked or placed or (one_device,)

    def _strategy(self) -> str:
        """How shardings are chosen; arguments that are placed already leave a baseline nothing to say."""
        if self.options.strategy != "auto" and self.placed is not None and self.placed.shardings:
            raise ConfigError(
                f"strategy is {self.options.strategy}, but another step has placed the arguments",
                where=line_here(),
                why="arguments that are placed stay where they are",
                fix="pass bactrian.gather(...) of the state, or leave strategy out",
            )
        return self.options.strategy

    def _check_placed(self, num_stages: int) -> None:
        placed = num_stages if self.placed is None else self.placed.num_stages
        if placed != num_stages:
            raise ConfigError(
                f"num_stages is {num_stages}, but the arguments were placed by a step of {placed} stages",
                where=line_here(),
                why="steps that share state share its stages",
                fix=f"say num_stages={placed} or leave it out, or pass bactrian.gather(...) of the state",
            )

    def _check_plan(self, plan: Plan) -> None:
        mine = (self.captured.num_microbatches, self.captured.schedule)
        if (plan.num_microbatches, plan.schedule) != mine:
            raise ConfigError(
                f"the plan has {plan.num_microbatches} microbatches and schedule {plan.schedule}, "
                f"the step was traced with {mine[0]} and {mine[1]}",
                fix="give the plan to parallelize(plan=...)",
            )
