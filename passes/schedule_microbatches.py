"""``schedule-microbatches``: the order of work of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    FUSED,
    ORDER,
    phase_of,
    read_num_microbatches,
    read_num_stages,
    read_schedule,
    stage_of,
)
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.schedules.by_name import schedule_named
from bactrian.passes.schedules.schedule import fused, parse_token

_TOKEN_PHASE = {"F": FORWARD, "B": BACKWARD, "FB": FUSED}


@dataclass(frozen=True)
class ScheduleMicrobatches(Pass):
    """Write the order in which each stage works on the microbatches.

    ``gpipe`` runs all forward functions, then all backward functions. ``1f1b`` lets stage ``i`` of ``p`` run ``p - i - 1``
    forward functions ahead and then alternates, so that at most ``p - i`` microbatches of activations are held;
    ``eager-1f1b`` lets it run twice as many ahead. On the last stage of both, forward and backward are one function.
    Functions that a stage doesn't have are left out.

    Requires: the staged form (``split-stages``).
    Ensures: ``bactrian.order`` on the module, one list of ``F<m>``, ``B<m>`` or ``FB<m>`` per stage.

    Input:

    ```mlir
    module attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.schedule = "gpipe"} {
      func.func @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>> attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>>} {
        %y = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @stage0.forward(%x) {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
        return %y : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      }
      func.func private @stage0.forward(%x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        return %x : tensor<4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64, bactrian.order = [["F0", "F1"]], bactrian.schedule = "gpipe"} {
      func.func @main(%arg0: !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>> attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>>} {
        %0 = mpmd.fragment_call<mesh="stage0", origin=["forward"]> @stage0.forward(%arg0) {bactrian.phase = "forward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
        return %0 : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      }
      func.func private @stage0.forward(%arg0: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        return %arg0 : tensor<4xf32>
      }
    }
    ```

    The stage has a forward function only, which runs for each of the two microbatches.
    """

    name: ClassVar[str] = "schedule-microbatches"
    summary: ClassVar[str] = "write the order of work of every stage"
    requires: ClassVar[tuple[str, ...]] = ("formed", "called")
    ensures: ClassVar[tuple[str, ...]] = ("scheduled",)
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("tasks", "stage functions run in one step"),)

    schedule: str = option("", help="gpipe, 1f1b or eager-1f1b; empty: what the module says")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Write ``bactrian.order``."""
        root = module.operation
        name = self.schedule or read_schedule(module) or ""
        try:
            schedule = schedule_named(name)
        except ConfigError as error:
            ctx.error(main_function(module), error.message, fix=error.fix)
            return
        num_stages = read_num_stages(module)
        count = read_num_microbatches(module)
        phases: list[set[str]] = [set() for _ in range(num_stages)]
        for view in body(main_function(module)).operations:
            stage = stage_of(view.operation)
            if stage is not None:
                phases[stage].add(phase_of(view.operation) or "")
        order = [
            [
                token
                for token in (fused(tokens) if FUSED in present else tokens)
                if _TOKEN_PHASE[parse_token(token)[0]] in present
            ]
            for tokens, present in zip(schedule.order(num_stages, count), phases, strict=True)
        ]
        ctx.count("tasks", sum(len(tokens) for tokens in order))
        root.attributes[ORDER] = ir.ArrayAttr.get(
            [ir.ArrayAttr.get([ir.StringAttr.get(token) for token in tokens]) for tokens in order]
        )
