"""``count-collectives``: how many bytes a sharded module sends, by kind of collective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.attributes import SENT_BYTES, integer
from bactrian.passes.ir.regions import main_function
from bactrian.passes.sharding.collective_bytes import count_collectives


@dataclass(frozen=True)
class CountCollectives(Pass):
    """Count what each device sends when ``@main`` runs once, in all turns of its loops.

    Shardy makes the collectives of a copy of the module explicit, as its exporter does it, and they are counted one by
    one: a check of what ``solve-shardings`` has predicted that shares no code with it,
    but for how often loops run, and how many rows windows need. Borders of pieces, which Shardy leaves to XLA, are counted
    as ``halo``. Slices send nothing.

    Requires: ``sdy.sharding`` on arguments, results and ops (``solve-shardings``).
    Ensures: ``bactrian.sent_bytes`` on the module, with an entry for each kind that occurs.

    Input:

    ```mlir
    module {
      sdy.mesh @stage0 = <["data"=4]>
      func.func public @main(%x: tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}, %w: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
        return %y : tensor<4x4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.sent_bytes = {all_reduce = 96 : i64}} {
      sdy.mesh @stage0 = <["data"=4]>
      func.func public @main(%x: tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data"}]>}, %w: tensor<8x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {}]>}) -> (tensor<4x4xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {}]>}) {
        %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {}]>]>} : (tensor<4x8xf32>, tensor<8x4xf32>) -> tensor<4x4xf32>
        return %y : tensor<4x4xf32>
      }
    }
    ```

    The product sums over a dim that is cut in four: 2 · 3/4 · 64 bytes.
    """

    name: ClassVar[str] = "count-collectives"
    summary: ClassVar[str] = "count the bytes that a sharded module sends"
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("collectives", "that send something"),
        Statistic("bytes", "that each device sends"),
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Count on a copy, write the sums."""
        main_function(module)
        sent = dict[str, float]()
        for collective in count_collectives(module):
            if collective.nbytes:
                sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.nbytes
                ctx.count("collectives")
        ctx.count("bytes", round(sum(sent.values())))
        entries = {kind: integer(round(nbytes)) for kind, nbytes in sorted(sent.items())}
        module.operation.attributes[SENT_BYTES] = ir.DictAttr.get(entries)
