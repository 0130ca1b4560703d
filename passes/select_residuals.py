"""``select-residuals``: what is kept from forward to backward, and what is computed again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    MICROBATCH_INDEX,
    PREPARE,
    argument_roles,
    read_num_stages,
)
from bactrian.passes.ir.cloning import clone_into_readers, copy_phase, is_elementwise, phase_key, phase_keys
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.module_schedule import schedule_of
from bactrian.passes.ir.op_traits import SLOW_TO_RECOMPUTE
from bactrian.passes.ir.regions import custom_call_target, main_function
from bactrian.passes.stages.layer_placement import LayerPlacement
from bactrian.passes.stages.rematerialization import LayersAgain, Rematerializer

# Prices are eighths of a byte: XLA fuses a simple op into its reader, which costs an eighth of keeping its result.
_KEEP, _FUSED_OP, _SLOW_OP = 8, 1, 16
_BEFORE, _BEHIND = LayerPlacement.at(1), LayerPlacement.at(0)


@dataclass(frozen=True)
class SelectResiduals(Pass):
    """Choose what each stage keeps for its backward phase: a minimum cut between what is there and what is read.

    Whatever a backward op reads is either kept since the forward phase or computed again by elementwise ops from what
    is kept, from state and what the phase ``prepare`` makes of it, or from nothing. Keeping a value costs its bytes and ``overhead-bytes`` for the buffer;
    computing an op again costs an eighth of its result's bytes, twice its bytes for a transcendental function, and the
    result's bytes more where an op that can't take it in by fusion reads it. The set of least total price is a minimum
    cut of the data flow, found exactly. The idea is that of PyTorch's partitioner ("Min-cut optimal(*) recomputation
    (i.e. activation checkpointing) with AOTAutograd", PyTorch developer discussions, thread 467); network and prices
    are our own. What ``jax.checkpoint`` computes again is in the backward phase already and stays as it is.

    A stage whose forward and backward phases are one function (the last one of 1F1B) keeps nothing, and is left alone.

    A layer whose word in ``bactrian.remat`` is ``all`` keeps only what comes into it, and the backward phase computes the
    rest again, products included; with ``products``, products without batch dims are kept too. What a layer gives to
    others comes into these. A layer is computed again behind an optimization barrier that waits for a gradient of the
    layer, as with ``jax.checkpoint``: else XLA would see that all of it is there already, or do it too early. Bits from a
    key are drawn again, and are the same.

    Requires: ``bactrian.phase`` and ``bactrian.stage`` on every op (``assign-stages``); ``bactrian.layer`` on those that
    are computed again.
    Ensures: the values that go from a stage's forward to its backward phase are the cheapest set, and in layers that are
    computed again what their words say.

    Input:

    ```mlir
    module attributes {bactrian.num_stages = 1 : i64} {
      func.func public @main(%x: tensor<8xf32> {bactrian.role = "batch"}) -> (tensor<8xf32>, tensor<8xf32>) {
        %h = stablehlo.tanh %x {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8xf32>
        %s = stablehlo.multiply %h, %h {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8xf32>
        %g = stablehlo.add %h, %s {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<8xf32>
        return %s, %g : tensor<8xf32>, tensor<8xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_stages = 1 : i64} {
      func.func public @main(%arg0: tensor<8xf32> {bactrian.role = "batch"}) -> (tensor<8xf32>, tensor<8xf32>) {
        %0 = stablehlo.tanh %arg0 {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8xf32>
        %1 = stablehlo.multiply %0, %0 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<8xf32>
        %2 = stablehlo.multiply %0, %0 {bactrian.phase = "forward", bactrian.stage = 0 : i64} : tensor<8xf32>
        %3 = stablehlo.add %0, %1 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<8xf32>
        return %2, %3 : tensor<8xf32>, tensor<8xf32>
      }
    }
    ```

    The square is computed again: one value is kept in the place of two.
    """

    name: ClassVar[str] = "select-residuals"
    summary: ClassVar[str] = "keep the cheapest set of values from forward to backward, compute the rest again"
    requires: ClassVar[tuple[str, ...]] = (
        "formed",
        "flat",
        "typed",
        "marked",
        "phased",
        "with-stages",
        "with-num-stages",
    )
    ensures: ClassVar[tuple[str, ...]] = ("phased", "assigned", "localized")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("recomputed", "ops that the backward phase computes again"),
        Statistic("kept-bytes", "bytes kept per microbatch, all stages"),
    )

    overhead_bytes: int = option(8192, help="what handling a kept buffer costs, as so many bytes")

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """One minimum cut per stage, then clones."""
        main = main_function(module)
        flow = MainDataflow.of(main)
        num_stages = read_num_stages(module)
        rule = _Rule(flow, argument_roles(main), LayersAgain.of(module, flow))
        schedule = schedule_of(module)
        for stage in sorted(rule.wanted):
            if schedule is None or not schedule.fuses(stage, num_stages):  # one function keeps nothing for another
                ctx.count("kept-bytes", rule.solve(stage, self.overhead_bytes))
        number = {op: index for index, op in enumerate(flow.ops)}
        if rule.again_by_layer:
            writer = Rematerializer(flow, rule.constant)
            for (layer, _), again in sorted(rule.again_by_layer.items(), reverse=True):
                writer.write(sorted(again), layer)
                ctx.count("recomputed", len(again))
            writer.order()
            flow = MainDataflow.of(main)
        numbers = [number.get(op, -1) for op in flow.ops]  # what was written now is no one else's
        ctx.count(
            "recomputed",
            clone_into_readers(
                flow,
                phase_keys(flow),
                phase_key,
                copy_phase,
                lambda index, key: numbers[index] >= 0 and rule(numbers[index], key),
            ),
        )


class _Rule:
    """Which forward ops a later phase of the same stage computes again.

    Attributes:
        wanted: by stage, the values of the forward phase and of the batch that its backward ops read, and what else those
            ops read that are computed again because their layer is.
        again_by_layer: these ops, by layer and stage.
        constant: of each op whether it is an elementwise one on constants.
    """

    def __init__(self, flow: MainDataflow, roles: list[str], layers: LayersAgain) -> None:
        self._flow, phases = flow, flow.phases
        self._again: set[int] = set()  # forward ops that the backward phase computes again
        self._simple = [is_elementwise(op) or custom_call_target(op) == MICROBATCH_INDEX for op in flow.ops]
        self.constant: list[bool] = []
        self._layers = layers
        self._free = [roles[i] != "batch" for i in range(flow.num_arguments)]  # of each value: it is there anyway
        constant = [False] * len(flow.values)
        for index, simple in enumerate(self._simple):
            self.constant.append(simple and all(constant[value] for value in flow.operands[index]))
            for result in flow.results[index]:
                constant[result] = self.constant[index]
                self._free.append(self.constant[index] or phases[index] == PREPARE)
        self.wanted: dict[int, dict[int, None]] = {}
        self.again_by_layer: dict[tuple[int, int], set[int]] = {}
        self._materialized: set[int] = set()  # values that a backward op reads from memory, whatever makes them
        for index, phase in enumerate(phases):
            stage = flow.stages[index]
            if phase == BACKWARD and stage is not None:
                self._want(index, stage)

    def _want(self, index: int, stage: int) -> None:
        """Note what an op of the backward phase reads; and what the ops read that are computed again for it."""
        flow, stack = self._flow, [index]
        while stack:
            index = stack.pop()
            fuses = self._simple[index] or flow.ops[index].name == "stablehlo.reduce"
            for value in flow.operands[index]:
                producer = flow.producer[value]
                if self._free[value] or (producer >= 0 and flow.phases[producer] != FORWARD):
                    continue
                layer = self._layers.again[producer] if producer >= 0 and flow.stages[producer] == stage else None
                if layer is not None:
                    again = self.again_by_layer.setdefault((layer, stage), set())
                    if producer not in again:
                        again.add(producer)
                        stack.append(producer)
                    continue
                self.wanted.setdefault(stage, {})[value] = None
                if not fuses:
                    self._materialized.add(value)

    def __call__(self, index: int, key: Hashable) -> bool:
        """Whether a reader in group ``key`` (stage, phase) may have its own copy."""
        if not isinstance(key, tuple) or key[0] != self._flow.stages[index]:
            return False
        return self.constant[index] or (key[1] == BACKWARD and index in self._again)

    def solve(self, stage: int, overhead: int) -> int:
        """Decide for one stage; gives the bytes that are kept."""
        flow, placement = self._flow, LayerPlacement(2)
        # A value is made, then there for the backward phase; 1 is before the cut, 0 behind it. Made behind the cut: it
        # is computed again. Made before and there behind: it is kept.
        made = dict[int, int]()
        there = dict.fromkeys(self.wanted[stage], _BEHIND)
        stack = list(there)
        while stack:
            value = stack.pop()
            if value in made or self._free[value]:
                continue
            again = self._may_be_again(value, stage)
            made[value] = placement.node() if again else _BEFORE
            if value not in there:
                there[value] = placement.node()
            placement.pay(made[value], there[value], _KEEP * (flow.sizes[value] + overhead))
            if again:
                placement.pay(_BEFORE, made[value], self._price(value))
                stack.extend(flow.operands[flow.producer[value]])
        for value, node in made.items():
            if node != _BEFORE:
                for read in flow.operands[flow.producer[value]]:
                    if there.get(read, _BEHIND) != _BEHIND:
                        placement.require(node, there[read])
        layers = placement.solve()

        def behind(node: int) -> bool:
            return node == _BEHIND or (node != _BEFORE and layers[node] == 0)

        self._again |= {flow.producer[value] for value, node in made.items() if behind(node)}
        return sum(flow.sizes[v] for v, node in made.items() if not behind(node) and behind(there[v]))

    def _may_be_again(self, value: int, stage: int) -> bool:
        index = self._flow.producer[value]
        return (
            index >= 0
            and self._simple[index]
            and self._flow.phases[index] == FORWARD
            and self._flow.stages[index] == stage
            and not self._layers.ends[index]
        )

    def _price(self, value: int) -> int:
        name, size = self._flow.ops[self._flow.producer[value]].name, self._flow.sizes[value]
        return size * (_SLOW_OP if name in SLOW_TO_RECOMPUTE else _FUSED_OP) + size * _KEEP * (
            value in self._materialized
        )
