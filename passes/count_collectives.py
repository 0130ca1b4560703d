"""``count-collectives``: how many bytes a partitioned module sends, by kind of collective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.attributes import SENT_BYTES, integer
from bactrian.passes.spmd.collective_bytes import count_collectives, sent_bytes


@dataclass(frozen=True)
class CountCollectives(Pass):
    """Count what each device sends when every function runs once, in all turns of its loops.

    The collectives are those that run: a check of what ``solve-shardings`` has predicted that shares no code with it. Slices
    send nothing.

    Requires: the programs of one device (``partition``).
    Ensures: ``bactrian.sent_bytes`` on the module, with an entry for each kind that occurs.

    Input:

    ```mlir
    module {
      func.func private @stage0.forward(%x: tensor<4x2xf32>, %w: tensor<2x4xf32>) -> tensor<4x4xf32> {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4x2xf32>, tensor<2x4xf32>) -> tensor<4x4xf32>
        %s = "stablehlo.all_reduce"(%y) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>, use_global_device_ids}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %c = stablehlo.add %a, %b : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) : (tensor<4x4xf32>) -> tensor<4x4xf32>
        return %s : tensor<4x4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.sent_bytes = {all_reduce = 96 : i64}} {
      func.func private @stage0.forward(%x: tensor<4x2xf32>, %w: tensor<2x4xf32>) -> tensor<4x4xf32> {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4x2xf32>, tensor<2x4xf32>) -> tensor<4x4xf32>
        %s = "stablehlo.all_reduce"(%y) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>, use_global_device_ids}> ({
        ^bb0(%a: tensor<f32>, %b: tensor<f32>):
          %c = stablehlo.add %a, %b : tensor<f32>
          stablehlo.return %c : tensor<f32>
        }) : (tensor<4x4xf32>) -> tensor<4x4xf32>
        return %s : tensor<4x4xf32>
      }
    }
    ```

    The product sums over a dim that is sharded in four: 2 · 3/4 · 64 bytes.
    """

    name: ClassVar[str] = "count-collectives"
    summary: ClassVar[str] = "count the bytes that a partitioned module sends"
    requires: ClassVar[tuple[str, ...]] = ("formed", "typed")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("collectives", "that send something"),
        Statistic("bytes", "that each device sends"),
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Count, write the sums."""
        found = count_collectives(module.operation)
        sent = sent_bytes(found)
        ctx.count("collectives", sum(collective.nbytes > 0 for collective in found))
        ctx.count("bytes", round(sum(sent.values())))
        entries = {kind: integer(round(nbytes)) for kind, nbytes in sorted(sent.items())}
        module.operation.attributes[SENT_BYTES] = ir.DictAttr.get(entries)
