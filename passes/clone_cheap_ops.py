"""``clone-cheap-ops``: constants, masks and random bits are computed where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.ir.attributes import argument_roles
from bactrian.passes.ir.cloning import StageRule, clone_into_readers, copy_stage, stage_key, stage_keys
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import main_function
from bactrian.passes.stages.counters import clone_counters


@dataclass(frozen=True)
class CloneCheapOps(Pass):
    """Give each stage its own copy of what is cheaper to compute than to send.

    Four rules, each a statement about data flow, none about names. An op of the forward or backward phase that depends
    on no batch value and on no large argument (constants, iota, masks, bits drawn from a key) is cloned to each stage
    that reads it. So is an elementwise op on batch arguments, small arguments and constants, if the batch arguments have
    no more bytes than its result (masks and rotary tables of positions): each stage can load the batch. In a program
    without products, where such ops are all the work, it is sent. A small value of the update that is computed from small values only (a learning rate, a bias
    correction, the factor of a global-norm clip) is cloned likewise. A counter of the state (small integers whose next
    value depends on such state alone: a step count, the words of a key) is brought up to date by every stage that reads it
    and all that it depends on; a scalar one by every stage there is, so that every rank knows it.

    Requires: ``bactrian.phase`` and ``bactrian.stage`` on every op (``assign-stages``).
    Ensures: no value of these kinds crosses stages; ``bactrian.counter`` names the results of ``@main`` that an op computes
    for its own stage.

    Input:

    ```mlir
    module attributes {bactrian.num_stages = 2 : i64} {
      func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %c = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<2.0> : tensor<4xf32>
        %y = stablehlo.multiply %x, %c {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %z = stablehlo.add %y, %c {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
        return %z : tensor<4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_stages = 2 : i64} {
      func.func public @main(%arg0: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %cst = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 1 : i64} dense<2.000000e+00> : tensor<4xf32>
        %cst_0 = stablehlo.constant {bactrian.phase = "forward", bactrian.stage = 0 : i64} dense<2.000000e+00> : tensor<4xf32>
        %0 = stablehlo.multiply %arg0, %cst_0 {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %1 = stablehlo.add %0, %cst {bactrian.phase = "forward", bactrian.stage = 1 : i64} : tensor<4xf32>
        return %1 : tensor<4xf32>
      }
    }
    ```

    Each stage has the constant that it reads.
    """

    name: ClassVar[str] = "clone-cheap-ops"
    summary: ClassVar[str] = "compute constants, masks and random bits on every stage that reads them"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat", "typed", "marked", "phased", "with-stages")
    ensures: ClassVar[tuple[str, ...]] = ("phased", "assigned", "localized")
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("clones", "ops computed on one more stage"),)

    small_bytes: int = option(
        256, help="values of at most this many bytes may be recomputed on each stage that reads them"
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Clone for the stages that read."""
        main = main_function(module)
        flow = MainDataflow.kept_or_read(module, ctx)
        rule = StageRule(flow, argument_roles(main), self.small_bytes)
        ctx.count("clones", clone_into_readers(flow, stage_keys(flow), stage_key, copy_stage, rule))
        ctx.count("clones", clone_counters(main, self.small_bytes))
