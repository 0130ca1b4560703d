"""``solve-shardings``: choose the sharding of every value over the mesh of its stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.ir.attributes import SHARDING_ESTIMATES, argument_roles, integer
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster import CPU_HOST, read_cluster
from bactrian.passes.network.solver import Solution, solve
from bactrian.passes.sharding.baseline_costs import BaselinePlan, no_worse_than_baselines, solve_baseline
from bactrian.passes.sharding.baselines import AUTO, BASELINES, check_strategy, pin_baseline
from bactrian.passes.sharding.cost_breakdown import cost_breakdown
from bactrian.passes.sharding.infeasible import out_of_memory
from bactrian.passes.sharding.loop_dataflow import capture_unchanged
from bactrian.passes.sharding.reduce_scatter_choice import prefer_reduce_scatters
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.stage_programs import StageProgram, read_stages, stage_meshes
from bactrian.passes.sharding.work_from_ir import drop_rules

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
    then the accumulator and what leads to it has one dim more in front for each unreduced axis, and the update adds the
    partial sums up. Between the two a gradient may also be reduced in every microbatch, which takes less memory.

    A dim that is read through windows (of convolutions, poolings, pads, slices) may be sharded too: neighbours exchange
    halos, which takes latency and bytes. XLA does so when it partitions the op; nothing is written for it.

    Shardings that are there already (``sdy.sharding`` on arguments, ``sdy.sharding_constraint``) stay. With
    ``strategy``, the arguments have the shardings of a baseline, and the rest is chosen. Ops without a rule are
    replicated on every device, with a remark; barriers and the gradient boundary forward shardings.

    The body of a ``while`` is chosen with all the rest, and counts as often as it runs: once, with a remark, where the
    module does not say how often. What a loop carries has one sharding; what it reads from outside, or never changes,
    is resharded before it.

    Each stage is a program of its own; what it gets of other stages comes with the sharding that it needs, in an
    ``sdy.reshard`` from one mesh to another.

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
    module attributes {bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 1 : i64, bactrian.sharding = [{bound_seconds = 1.9398655999999998E-4 : f64, communication_seconds = 0.000000e+00 : f64, given = 0 : i64, limit_bytes = 4294967296 : i64, memory_bytes = [{bytes = 262144 : i64, name = "batch"}, {bytes = 262144 : i64, name = "activations"}, {bytes = 16384 : i64, name = "parameters"}], seconds = 1.9398655999999998E-4 : f64, sent_bytes = {}, strategy = "auto"}]} {
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
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("strategies", "choices of all ops and arguments"),
        Statistic("reshards", "collectives and slices between ops"),
    )

    cluster: str = option("", help="TOML file of the cluster; the host's cores by default")
    memory_bytes: int = option(0, help="of each device; 0 for what the cluster says")
    time_limit: float = option(
        60.0,
        help="seconds for the solver, by the clock: where it ends the search, another machine may choose otherwise",
    )
    strategy: str = option(AUTO, help=f"auto, or a baseline: {', '.join(BASELINES)}")
    compare: bool = option(False, help="say what the baselines would take")

    def check_options(self) -> None:
        """Refuse what has no meaning."""
        if self.memory_bytes < 0:
            raise ConfigError(f"option memory-bytes of {self.name} is {self.memory_bytes}, must not be negative")
        if not self.time_limit > 0:
            raise ConfigError(f"option time-limit of {self.name} is {self.time_limit}, must be positive")
        check_strategy(self.strategy)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Read, solve, write."""
        main = main_function(module)
        meshes = stage_meshes(module)
        if not meshes:
            drop_rules(main)
            return
        cluster = read_cluster(self.cluster) if self.cluster else CPU_HOST
        limit = self.memory_bytes or cluster.memory_bytes
        roles = argument_roles(main)
        capture_unchanged(main)
        compared = list[list[ir.Attribute]]()
        solved = list[tuple[Writer, Solution]]()
        given = list[int]()
        for each in read_stages(module, meshes, cluster, ctx.remark):
            mesh, reading = each.mesh, each.reading
            given.append(sum(number < reading.flow.num_arguments for number, _ in reading.problem.pinned))
            names = BASELINES if self.compare else ()
            known = {name: solve_baseline(reading, mesh, roles, name, limit, self.time_limit) for name in names}
            compared.append([_figures(name, plan) for name, plan in known.items()])
            if self.strategy != AUTO:
                reading = pin_baseline(reading, mesh, roles, self.strategy)
            model = ShardingModel(reading.problem, mesh, limit)
            ctx.count("strategies", model.network.num_strategies)
            solution = self._solved(each, model, roles, known)
            solution = prefer_reduce_scatters(model, solution)
            shardings = model.shardings(solution.choice)
            writer = Writer(main, reading, model, shardings, each.mesh_name, each.num_microbatches, each.only)
            solved.append((writer, solution))
        write_stages([writer for writer, _ in solved])
        ctx.count("reshards", sum(writer.num_reshards for writer, _ in solved))
        predicted = [
            self._predicted(main, writer, solution, limit, roles, ctx, fixed)
            for (writer, solution), fixed in zip(solved, given, strict=True)
        ]
        for entries, rows in zip(predicted, compared, strict=True):
            if rows:
                entries["compared"] = ir.ArrayAttr.get(rows)
        module.operation.attributes[SHARDING_ESTIMATES] = ir.ArrayAttr.get(
            [ir.DictAttr.get(entries) for entries in predicted]
        )

    def _solved(
        self, stage: StageProgram, model: ShardingModel, roles: Sequence[str], known: dict[str, BaselinePlan | None]
    ) -> Solution:
        """The solver's answer; where it is not proved, no worse than any baseline."""
        try:
            solution, failure = solve(model.network, self.time_limit), None
        except InfeasiblePlanError as error:
            raise out_of_memory(model, stage.reading, roles, stage.stage) or error from error
        except ConfigError as error:
            solution, failure = None, error
        if self.strategy == AUTO and (solution is None or not solution.optimal):
            share = _BASELINES_SHARE * self.time_limit / len(BASELINES)
            plans = known or {
                name: solve_baseline(stage.reading, stage.mesh, roles, name, model.memory, share) for name in BASELINES
            }
            solution = no_worse_than_baselines(model, solution, [plan for plan in plans.values() if plan is not None])
        if solution is None:
            assert failure is not None  # else there is a solution
            raise failure
        return solution

    def _predicted(
        self,
        main: ir.Operation,
        writer: Writer,
        solution: Solution,
        limit: int,
        roles: Sequence[str],
        ctx: PassContext,
        given: int,
    ) -> dict[str, ir.Attribute]:
        """What is said of one stage."""
        gap = "optimal" if solution.optimal else f"at least {solution.lower_bound:.4g} s"
        ctx.remark(
            main,
            f"{'a step' if writer.stage is None else f'stage {writer.stage}'} takes {solution.cost:.4g} s ({gap}), a device holds {solution.memory / 2**20:.1f} MiB",
        )
        model = writer.model
        taken = cost_breakdown(model, writer.reading, roles, solution.choice, model.shardings(solution.choice))
        sent = {kind: round(nbytes) for kind, nbytes in sorted(writer.sent_in_step.items())}
        return {
            "strategy": ir.StringAttr.get(self.strategy),
            "given": integer(given),
            "seconds": _number(solution.cost),
            "bound_seconds": _number(solution.lower_bound),
            "communication_seconds": _number(taken.communication_seconds),
            "limit_bytes": integer(limit),
            "sent_bytes": ir.DictAttr.get({kind: integer(nbytes) for kind, nbytes in sent.items()}),
            "memory_bytes": ir.ArrayAttr.get(
                [ir.DictAttr.get({"name": ir.StringAttr.get(n), "bytes": integer(b)}) for n, b in taken.memory]
            ),
        }


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
