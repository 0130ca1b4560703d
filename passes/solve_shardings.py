"""``solve-shardings``: choose the sharding of every value over the mesh of its stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.frame.processes import Workers
from bactrian.passes.ir.attributes import SHARDING_ESTIMATES, argument_roles, integer, read_first_devices
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster_file import cluster_or_cores
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.solver import Solution, Solved, solve
from bactrian.passes.sharding.baseline_costs import BaselinePlan, no_worse_than_baselines, solve_baseline
from bactrian.passes.sharding.baselines import AUTO, BASELINES, check_strategy, pin_baseline
from bactrian.passes.sharding.cost_breakdown import CostBreakdown, cost_breakdown, phase_seconds
from bactrian.passes.sharding.infeasible import out_of_memory
from bactrian.passes.sharding.loop_dataflow import capture_unchanged
from bactrian.passes.sharding.reduce_scatter_choice import prefer_reduce_scatters
from bactrian.passes.sharding.repeated_work import is_repeated, what_would_pay
from bactrian.passes.sharding.sharding_model import ShardingModel, Shardings
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.stage_programs import StageProgram, read_stages, stage_meshes
from bactrian.passes.sharding.user_shardings import drop_user_mesh
from bactrian.passes.sharding.work_from_ir import Reading
from bactrian.passes.spmd.op_rules import drop_rules
from bactrian.passes.stages.uneven_stages import warn_of_uneven_meshes

_MOST_STRATEGIES = 100_000  # of a network whose optimum is proved to the last digit
_TOLERANCE = 5e-3  # of the seconds, by which the choice of a larger one may be above its bound
_MANY_STRATEGIES = 20_000  # of all stages: fewer are solved before another process has begun
_BASELINES_SHARE = 0.2  # of the time, on top of it: what all baselines together take where nothing is proved


@dataclass(frozen=True)
class SolveShardings(Pass):
    """Choose the sharding of every value so that a step takes the least time that the cost model knows of.

    The choices of an op are the assignments of mesh axes to the factors of its ``sdy.sharding_rule``; a value that is
    read with another sharding than it is made with is resharded by the cheapest sequence of collectives, each of which
    is an ``sdy.reshard``. All choices are made together, by integer programming, below the memory of a device (of
    arguments and results; resharded copies, and next values of state before they are sharded, are not counted yet).
    Work that devices do twice costs its time, collectives cost latency and bytes over the links of the cluster; forward
    and backward count once per microbatch, the update once per step. The next value of a state has the sharding of the
    state.

    What is accumulated over microbatches may stay unreduced, a partial sum on each device, until the update reads it:
    then the shardings of the accumulator and of what leads to it have unreduced axes, and the update adds the partial
    sums up. Between the two a gradient may also be reduced in every microbatch, which takes less memory.

    A dim that is read through windows (of convolutions, poolings, pads, slices) may be sharded too: neighbours exchange
    halos, which takes latency and bytes.

    Shardings that are there already (``sdy.sharding`` on arguments, ``sdy.sharding_constraint``) stay. Those over the
    mesh ``@user`` are read by the names of their axes on the mesh of each stage, and ``@user`` is erased. With
    ``strategy``, the arguments have the shardings of a baseline, and the rest is chosen. Ops without a rule are
    replicated on every device, with a remark; barriers and the gradient boundary forward shardings.

    The body of a ``while`` is chosen with all the rest, and counts as often as it runs: once, with a remark, where the
    module does not say how often. What a loop carries has one sharding; what it reads from outside, or never changes,
    is resharded before it.

    Each stage is a program of its own; what it gets of other stages comes with the sharding that it needs, in an
    ``sdy.reshard`` from one mesh to another. Each element crosses once, whatever the two shardings, so these don't depend on
    each other: the receiver pays for what its devices gather from each other after that.

    Requires: ``sdy.sharding_rule`` on ops (``func.func(sdy-populate-op-sharding-rules)``); a mesh ``@stage<s>`` for
    each stage.
    Ensures: ``sdy.sharding`` on every argument, result and op; no rules; ``bactrian.sharding`` with what is predicted.

    Input:

    ```mlir
    module attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 1 : i64} {
      sdy.mesh @stage0 = <["data"=4]>
      func.func public @main(%x: tensor<4096x64xf32> {bactrian.role = "batch"}, %w: tensor<64x64xf32> {bactrian.role = "state"}) -> tensor<4096x64xf32> {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64, sdy.sharding_rule = #sdy.op_sharding_rule<([i, k], [k, j])->([i, j]) {i=4096, j=64, k=64} reduction={k}>} : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
        return %y : tensor<4096x64xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 1 : i64, bactrian.sharding = [{bound_seconds = 1.9398655999999998E-4 : f64, communication_seconds = 0.000000e+00 : f64, device_bytes = 4294967296 : i64, given = 0 : i64, least_bytes = 528384 : i64, limit_bytes = 4294967296 : i64, memory_bytes = [{bytes = 262144 : i64, name = "batch"}, {bytes = 262144 : i64, name = "activations"}, {bytes = 16384 : i64, name = "parameters"}], phase_seconds = {backward = 0.000000e+00 : f64, forward = 1.9398655999999998E-4 : f64, prepare = 0.000000e+00 : f64, update = 0.000000e+00 : f64}, seconds = 1.9398655999999998E-4 : f64, sent_bytes = {}, strategy = "auto"}]} {
      sdy.mesh @stage0 = <["data"=4]>
      func.func public @main(%x: tensor<4096x64xf32> {bactrian.role = "batch", sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}, %w: tensor<64x64xf32> {bactrian.role = "state", sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) -> (tensor<4096x64xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {bactrian.phase = "forward", bactrian.stage = 0 : i64, sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {}]>]>} : (tensor<4096x64xf32>, tensor<64x64xf32>) -> tensor<4096x64xf32>
        return %y : tensor<4096x64xf32>
      }
    }
    ```

    The batch is large, so it is sharded.
    """

    name: ClassVar[str] = "solve-shardings"
    summary: ClassVar[str] = "choose the sharding of every value over the mesh of its stage"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat", "typed", "marked", "with-phases")
    ensures: ClassVar[tuple[str, ...]] = ("flat", "verified", "phased", "assigned", "accumulated", "sharded")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("strategies", "choices of all ops and arguments"),
        Statistic("reshards", "collectives and slices between ops"),
    )

    cluster: str = option("", help="TOML file of the cluster; the host's cores by default")
    memory_bytes: str = option(
        "",
        help='of each device at most, of all stages or of each, as in "1000" or "2000,1000"; what the cluster says if '
        "empty",
    )
    time_limit: float = option(
        60.0,
        help="seconds for the solver, by the clock: where it ends the search, another machine may choose otherwise",
    )
    strategy: str = option(AUTO, help=f"auto, or a baseline: {', '.join(BASELINES)}")
    tolerance: float = option(
        0.0, help="how much slower than the best choice a stage may be, as a part of its time; 0 for the best one"
    )
    compare: bool = option(False, help="say what the baselines would take")
    num_workers: int = option(1, help="processes that solve large stages; the result is the same for any number")

    def check_options(self) -> None:
        """Refuse what has no meaning."""
        self._limits()
        if not self.time_limit > 0:
            raise ConfigError(f"option time-limit of {self.name} is {self.time_limit}, must be positive")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"option tolerance of {self.name} is {self.tolerance}, must be from 0 to below 1")
        if self.num_workers < 1:
            raise ConfigError(f"option num-workers of {self.name} is {self.num_workers}, must be positive")
        check_strategy(self.strategy)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Read, solve, write."""
        main = main_function(module)
        meshes = stage_meshes(module)
        if not meshes:
            drop_rules(main)
            return
        if len(self._limits()) not in (0, 1, len(meshes)):
            raise ConfigError(
                f"option memory-bytes of {self.name} is {self.memory_bytes!r}, the module has {len(meshes)} stages",
                fix="give one number for all, or one for each",
            )
        cluster = cluster_or_cores(self.cluster)
        roles = argument_roles(main)
        capture_unchanged(main)
        with ctx.clock.phase("read"):
            programs = read_stages(module, meshes, cluster, ctx.remark)
        known = ctx.kept(Solved) or Solved()
        solved = self._solve_stages(programs, roles, known, ctx.clock)
        ctx.count("strategies", sum(stage.model.network.num_strategies for stage in solved))
        writers = [stage.writer(main) for stage in solved]
        with ctx.clock.phase("write"):
            write_stages(writers)
        drop_user_mesh(module, meshes)
        ctx.count("reshards", sum(writer.num_reshards for writer in writers))
        estimates = [
            self._estimate(main, stage, writer, roles, ctx) for stage, writer in zip(solved, writers, strict=True)
        ]
        if read_first_devices(module) is None:  # else a search has weighed the stages
            warn_of_uneven_meshes(main, [stage.solution.cost for stage in solved], ctx)
        module.operation.attributes[SHARDING_ESTIMATES] = ir.ArrayAttr.get(estimates)

    def _solve_stages(
        self, programs: Sequence[StageProgram], roles: Sequence[str], known: Solved, clock: PhaseClock
    ) -> list[_SolvedStage]:
        """Choose the shardings of all stages, of which some may be known.

        The last ones go first: they have the fewest microbatches in flight, so that what is best for them is best for equal
        stages before them, if it fits there.
        """
        stages = [self._read_stage(program, roles) for program in programs]
        try:
            with clock.phase("solve"):  # networks are built when they are first asked for
                networks = [stage.model.network for stage in reversed(stages)]
                is_large = sum(network.num_strategies for network in networks) > _MANY_STRATEGIES
                with Workers(min(len(stages), self.num_workers) if is_large else 1) as workers:
                    for tolerance in sorted({self._tolerance(network) for network in networks}):
                        alike = [network for network in networks if self._tolerance(network) == tolerance]
                        known.solve(alike, self.time_limit, tolerance, workers)
            return [self._solve_stage(stage, roles, known, clock) for stage in reversed(stages)][::-1]
        except InfeasiblePlanError:
            for stage in stages:  # the first stage that does not fit is the one that holds most
                self._solve_stage(stage, roles, known, clock)
            raise

    def _read_stage(self, program: StageProgram, roles: Sequence[str]) -> _StageModel:
        mesh, reading = program.mesh, program.reading
        if self.strategy != AUTO:
            reading = pin_baseline(reading, mesh, roles, self.strategy)
        return _StageModel(program, reading, ShardingModel(reading.problem, mesh, self._limit(program)))

    def _solve_stage(self, stage: _StageModel, roles: Sequence[str], known: Solved, clock: PhaseClock) -> _SolvedStage:
        """Choose the shardings of one stage: those of an equal one, if they are best here too.

        Args:
            stage: that is read.
            roles: of the arguments.
            known: the stages that are solved; this one is added.
            clock: of what takes time.
        """
        program, model = stage.program, stage.model
        names = BASELINES if self.compare else ()
        baselines: dict[str, BaselinePlan | None] = {}
        for name in names:
            with clock.phase(name):
                baselines[name] = solve_baseline(
                    program.reading, program.mesh, roles, name, model.memory, self.time_limit
                )
        with clock.phase("solve"):
            solution = known.find(model.network, self._tolerance(model.network))
            if solution is None:
                solution = self._solved(program, model, roles, baselines, known.unproved(model.network))
                known.add(model.network, solution)
            solution = prefer_reduce_scatters(model, solution)
        shardings = model.shardings(solution.choice)
        return _SolvedStage(program, stage.reading, model, solution, shardings, baselines)

    def _solved(
        self,
        stage: StageProgram,
        model: ShardingModel,
        roles: Sequence[str],
        baselines: dict[str, BaselinePlan | None],
        unproved: Solution | None,
    ) -> Solution:
        """The solver's answer, if it is not known yet (``unproved``); where it is not proved, no worse than any
        baseline."""
        tolerance = self._tolerance(model.network)
        solution, failure = unproved, None
        try:
            solution = unproved or solve(model.network, self.time_limit, tolerance)
        except InfeasiblePlanError as error:
            raise out_of_memory(model, stage.reading, roles, stage.stage) or error from error
        except ConfigError as error:
            failure = error
        if self.strategy == AUTO and (solution is None or not solution.is_near(tolerance)):
            plans = baselines or {
                name: solve_baseline(stage.reading, stage.mesh, roles, name, model.memory, self._baseline_share())
                for name in BASELINES
            }
            solution = no_worse_than_baselines(model, solution, [plan for plan in plans.values() if plan is not None])
        if solution is None:
            assert failure is not None  # else there is a solution
            raise failure
        return solution

    def _tolerance(self, network: CostNetwork) -> float:
        return max(self.tolerance, _TOLERANCE) if network.num_strategies > _MOST_STRATEGIES else self.tolerance

    def _limit(self, program: StageProgram) -> int:
        """Bytes of a device that a stage may fill."""
        limits = self._limits() or (program.memory_bytes,)
        return min(limits[program.stage % len(limits)], program.memory_bytes)

    def _limits(self) -> tuple[int, ...]:
        """What `memory_bytes` says."""
        words = [word.strip() for word in self.memory_bytes.split(",")] if self.memory_bytes.strip() else []
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            raise ConfigError(
                f"option memory-bytes of {self.name} is {self.memory_bytes!r}, must be positive numbers of bytes",
                fix='as in "17179869184", or "17179869184,8589934592" for two stages',
            )
        return tuple(map(int, words))

    def _baseline_share(self) -> float:
        """Seconds at most for a baseline that nobody asked for: each once, and one more to tell what would pay."""
        return _BASELINES_SHARE * self.time_limit / (len(BASELINES) + 1)

    def _warn_of_repeated_work(
        self, main: ir.Operation, stage: _SolvedStage, taken: CostBreakdown, roles: Sequence[str], ctx: PassContext
    ) -> None:
        program = stage.program
        devices = math.prod(program.mesh.sizes.values())
        message = f"each of the {devices} devices of stage {program.stage} repeats all of its work"
        if self.strategy != AUTO:
            ctx.warning(main, message, why=f"strategy {self.strategy} shards none of it", fix='use strategy="auto"')
            return
        rows = stage.baselines.get("data") or solve_baseline(
            program.reading, program.mesh, roles, "data", None, self._baseline_share()
        )
        why, fix = what_would_pay(devices, taken, rows)
        ctx.warning(main, message, why=why, fix=fix)

    def _estimate(
        self,
        main: ir.Operation,
        stage: _SolvedStage,
        writer: Writer,
        roles: Sequence[str],
        ctx: PassContext,
    ) -> ir.Attribute:
        """What is predicted of one stage."""
        solution, program = stage.solution, stage.program
        gap = "optimal" if solution.optimal else f"at least {solution.lower_bound:.4g} s"
        ctx.note(
            main,
            f"{'a step' if program.only is None else f'stage {program.only}'} takes {solution.cost:.4g} s ({gap}), a device holds {solution.memory / 2**20:.1f} MiB",
        )
        taken = cost_breakdown(stage.model, stage.reading, roles, solution.choice, stage.shardings)
        by_phase = phase_seconds(stage.model, stage.reading, stage.shardings)
        if program.mesh.num_devices > 1 and is_repeated(program.reading, taken):
            self._warn_of_repeated_work(main, stage, taken, roles, ctx)
        given = sum(number < program.reading.flow.num_arguments for number, _ in program.reading.problem.pinned)
        sent = {kind: round(nbytes) for kind, nbytes in sorted(writer.sent_in_step.items())}
        fields: dict[str, ir.Attribute] = {
            "strategy": ir.StringAttr.get(self.strategy),
            "given": integer(given),
            "seconds": _number(solution.cost),
            "bound_seconds": _number(solution.lower_bound),
            "communication_seconds": _number(taken.communication_seconds),
            "limit_bytes": integer(self._limit(program)),
            "device_bytes": integer(program.memory_bytes),
            "least_bytes": integer(round(stage.model.network.least_peak())),
            "phase_seconds": ir.DictAttr.get({phase: _number(seconds) for phase, seconds in by_phase.items()}),
            "sent_bytes": ir.DictAttr.get({kind: integer(nbytes) for kind, nbytes in sent.items()}),
            "memory_bytes": ir.ArrayAttr.get(
                [ir.DictAttr.get({"name": ir.StringAttr.get(n), "bytes": integer(b)}) for n, b in taken.memory]
            ),
        }
        if stage.baselines:
            rows = [_figures(name, plan) for name, plan in stage.baselines.items()]
            fields["compared"] = ir.ArrayAttr.get(rows)
        return ir.DictAttr.get(fields)


@dataclass(frozen=True)
class _StageModel:
    """A stage, the reading of it with the arguments pinned as the baseline of ``strategy`` has them, and its model."""

    program: StageProgram
    reading: Reading
    model: ShardingModel


@dataclass(frozen=True)
class _SolvedStage:
    """What was chosen for one stage.

    Attributes:
        program: of the stage.
        reading: of it, with the arguments pinned as the baseline of ``strategy`` has them.
        model: of the reading.
        solution: of the model's network.
        shardings: what the solution means.
        baselines: what baselines would take, if that was asked for; None for one that does not fit.
    """

    program: StageProgram
    reading: Reading
    model: ShardingModel
    solution: Solution
    shardings: Shardings
    baselines: dict[str, BaselinePlan | None]

    def writer(self, main: ir.Operation) -> Writer:
        """What writes the stage's shardings."""
        program = self.program
        return Writer(
            main, self.reading, self.model, self.shardings, program.mesh_name, program.num_microbatches, program.only
        )


def _figures(name: str, plan: BaselinePlan | None) -> ir.Attribute:
    fields: dict[str, ir.Attribute] = {"name": ir.StringAttr.get(name)}
    if plan is not None:
        fields |= {
            "seconds": _number(plan.seconds),
            "communication_seconds": _number(plan.breakdown.communication_seconds),
            "memory_bytes": integer(plan.memory),
        }
    return ir.DictAttr.get(fields)


def _number(value: float) -> ir.Attribute:
    return ir.FloatAttr.get(ir.F64Type.get(), float(value))
