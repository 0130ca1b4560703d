"""``clone-cheap-ops``: constants, masks and random bits are computed where they are read."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.cloning import (
    StageRule,
    clone_into_readers,
    copy_stage,
    is_elementwise,
    required_stages,
    stage_key,
    stage_keys,
)
from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.program import (
    MICROBATCH_INDEX,
    Dataflow,
    argument_roles,
    custom_call_target,
    main_function,
    phase_of,
    required_integer,
)


@dataclass(frozen=True)
class CloneCheapOps(Pass):
    """Give each stage its own copy of what is cheaper to compute than to send or to keep.

    Three rules, each a statement about data flow, none about names. An op of the forward or backward phase that depends
    on no batch value and on no large argument (constants, iota, masks, bits drawn from a key) is cloned to each stage
    that reads it. A small value of the update that is computed from small values only (a learning rate, a bias
    correction, the factor of a global-norm clip) is cloned likewise. On one stage, what depends on nothing at all, or
    is larger than what it is computed from (a broadcast, a mask widened to floats), is computed again in the backward
    phase, so that no residual is kept for it.

    Requires: ``bactrian.phase`` and ``bactrian.stage`` on every op (``assign-stages``).
    Ensures: no value of these kinds crosses stages, or is kept from forward to backward.

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
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("across-stages", "clones that save a transfer"),
        Statistic("across-phases", "clones that save a residual"),
    )

    small_bytes: int = option(256, help="a value of at most this many bytes is small")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Clone for other stages first, then for the backward phase."""
        main = main_function(module)
        flow = Dataflow.of(main)
        rule = StageRule(flow, argument_roles(main), self.small_bytes)
        ctx.count("across-stages", clone_into_readers(flow, stage_keys(flow), stage_key, copy_stage, rule))
        flow = Dataflow.of(main)
        keys = [None if s is None else (s, p) for s, p in zip(required_stages(flow), flow.phases, strict=True)]
        phases = clone_into_readers(flow, keys, _phase_key, _copy_phase, _ResidualRule(flow))
        ctx.count("across-phases", phases)


def _phase_key(op: ir.Operation) -> Hashable:
    return required_integer(op, "bactrian.stage", "assign-stages"), phase_of(op)


def _copy_phase(clone: ir.Operation, reader: ir.Operation) -> None:
    clone.attributes["bactrian.phase"] = reader.attributes["bactrian.phase"]


class _ResidualRule:
    """Which forward ops the backward phase of the same stage computes again."""

    def __init__(self, flow: Dataflow) -> None:
        self._stages = flow.stages
        independent = [False] * len(flow.values)
        self._allowed: list[bool] = []
        for index, op in enumerate(flow.ops):
            reads = flow.operands[index]
            elementwise = is_elementwise(op) or custom_call_target(op) == MICROBATCH_INDEX
            nothing = elementwise and all(independent[value] for value in reads)
            for result in flow.results[index]:
                independent[result] = nothing
            grows = (
                elementwise and len(reads) == 1 and self._bytes(flow, flow.results[index]) > self._bytes(flow, reads)
            )
            self._allowed.append(nothing or grows)

    @staticmethod
    def _bytes(flow: Dataflow, values: range | tuple[int, ...]) -> int:
        return sum(flow.sizes[value] for value in values)

    def __call__(self, index: int, key: Hashable) -> bool:
        """Whether a reader in group ``key`` may have its own copy: same stage, later phase."""
        return isinstance(key, tuple) and key[0] == self._stages[index] and self._allowed[index]
