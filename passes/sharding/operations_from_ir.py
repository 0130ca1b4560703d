"""From one op of ``@main`` to what the sharding model sees of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import (
    ACCUMULATE,
    BACKWARD,
    FORWARD,
    GRADIENT_BOUNDARY,
    MICROBATCH_INDEX,
    ONCE_PER_STEP,
    PREPARE,
    ROLE,
    argument_attributes,
    argument_pinned_stages,
    result_updates,
)
from bactrian.passes.ir.op_costs import CostModel
from bactrian.passes.ir.op_traits import MATRIX_PRODUCTS
from bactrian.passes.ir.regions import custom_call_target
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.device import Device
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.sharding.deferred_reductions import deferred_sums
from bactrian.passes.sharding.fusion_costs import (
    accumulating_scatters,
    is_separate,
    op_seconds,
    read_from_memory,
    repack_seconds,
)
from bactrian.passes.sharding.loop_dataflow import CARRY, INSIDE, OP, LoopFlow
from bactrian.passes.sharding.sharding_model import ShardedOp, Tensor
from bactrian.passes.sharding.strategies import Defers
from bactrian.passes.sharding.user_shardings import (
    given_specs,
    refuse_result_shardings,
)
from bactrian.passes.spmd.op_rules import rule_of
from bactrian.passes.spmd.sharding_rules import Rule, elementwise, replicated_rule


@dataclass(frozen=True)
class FlowOp:
    """One op.

    Attributes:
        index: its number in the data flow.
        op: what the model sees.
        rule: its rule, also where it is free.
        reads: values of the data flow: its operands, then what only its regions read.
    """

    index: int
    op: ShardedOp
    rule: Rule
    reads: tuple[int, ...]


@dataclass(frozen=True)
class FlowFacts:
    """What is known of a program whatever part of it is read, found once.

    Attributes:
        flow: the data flow.
        value_of: of each value the one that it is (`forwarded_values`).
        from_memory: whether each value must exist (`read_from_memory`).
        in_place: ops that scatter into an accumulator (`accumulating_scatters`).
        defers: ops whose sums can wait (`deferred_sums`).
        in_backward: values that the backward phase reads.
        by_microbatches: values that the forward or the backward phase reads.
        tensors: all values.
        updates: for each result, the argument whose next value it is.
        batch: the arguments that are parts of the batch.
        pinned: the stages that hold an argument already.
    """

    flow: LoopFlow
    value_of: list[int]
    from_memory: list[bool]
    in_place: frozenset[int]
    defers: dict[int, Defers]
    in_backward: frozenset[int]
    by_microbatches: frozenset[int]
    tensors: tuple[Tensor, ...]
    updates: list[int | None]
    batch: tuple[int, ...]
    pinned: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, main: ir.Operation) -> FlowFacts:
        """Read ``@main``.

        Raises:
            PassError: a result has a sharding.
        """
        refuse_result_shardings(main)
        flow = LoopFlow.of(main)
        value_of = forwarded_values(flow)
        defers = deferred_sums(flow, value_of, [forwards(flow, index) for index in range(len(flow.ops))])
        return cls(
            flow=flow,
            value_of=value_of,
            from_memory=read_from_memory(flow, value_of),
            in_place=accumulating_scatters(flow),
            defers=defers,
            in_backward=_read_in(flow, value_of, (BACKWARD,)),
            by_microbatches=_read_in(flow, value_of, (FORWARD, BACKWARD)),
            tensors=_tensors(flow, defers),
            updates=result_updates(main),
            batch=_batch_arguments(main),
            pinned=argument_pinned_stages(main),
        )


def _tensors(flow: LoopFlow, defers: Collection[int]) -> tuple[Tensor, ...]:
    """All values of the flow."""
    partial = {value for index in defers for value in flow.results[index]}
    values = enumerate(zip(flow.values, flow.sizes, strict=True))
    return tuple(Tensor(value_shape(value), size, number in partial) for number, (value, size) in values)


def _batch_arguments(main: ir.Operation) -> tuple[int, ...]:
    batch = ir.StringAttr.get("batch")
    entries = argument_attributes(main)
    return tuple(number for number, entry in enumerate(entries) if ROLE in entry and entry[ROLE] == batch)


class OperationReader:
    """Reads op by op, in their order."""

    def __init__(
        self,
        facts: FlowFacts,
        mesh: Mesh,
        device: Device,
        num_microbatches: int,
        remark: Callable[[ir.Operation, str], None],
        in_flight: int,
        model: CostModel,
    ) -> None:
        self._facts, self._flow, self._mesh, self._device = facts, facts.flow, mesh, device
        self._num_microbatches, self._remark, self._in_flight = num_microbatches, remark, in_flight
        self._model = model
        self._free = [False] * len(facts.flow.values)
        self._kept = [True] * len(facts.flow.values)  # takes memory: all but what is made here, and fused
        self.value_of = facts.value_of

    def runs_per_step(self, index: int) -> float:
        """How often in a step an entry runs, but for loops."""
        return 1.0 if self._flow.phases[index] in ONCE_PER_STEP else float(self._num_microbatches)

    def _live_instances(self, index: int) -> int:
        """How many of an entry's results are there at once."""
        activations = self._flow.phases[index] == FORWARD
        return self._in_flight if activations and self._facts.in_backward.intersection(self._flow.results[index]) else 1

    def _is_held(self, index: int) -> bool:
        """Whether what an entry makes once is there for all microbatches."""
        return self._flow.phases[index] == PREPARE and not self._facts.by_microbatches.isdisjoint(
            self._flow.results[index]
        )

    def _reshards_per_step(self, index: int, reads: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(self.runs_per_step(index) * self._flow.value_iterations[value] for value in reads)

    def _narrows(self, index: int, operands: tuple[int, ...], results: tuple[int, ...]) -> bool:
        """Whether an op casts to a shorter type, in the loop in which its operand is made."""
        if self._flow.ops[index].name != "stablehlo.convert":
            return False
        (read,), (made,) = ([self._facts.tensors[value] for value in each] for each in (operands, results))
        iterations = self._flow.value_iterations[operands[0]]
        return (
            made.nbytes < read.nbytes
            and not (made.partial or read.partial)
            and iterations == self._flow.iterations[index]
        )

    def _of_loop(self, index: int) -> FlowOp:
        """What a loop does with one value that it carries, or its condition with all."""
        flow, reads = self._flow, tuple(dict.fromkeys(self._flow.operands[index]))
        shapes = tuple(value_shape(flow.values[value]) for value in reads)
        rule = elementwise(shapes[0], 1) if flow.kinds[index] == CARRY else replicated_rule(shapes, ())
        operation = ShardedOp(
            operands=tuple(self.value_of[value] for value in reads),
            results=tuple(flow.results[index]),
            rule=rule,
            runs_per_step=self.runs_per_step(index) * flow.iterations[index],
            live_instances=self._live_instances(index),
            reshards_per_step=self._reshards_per_step(index, reads),
        )
        return FlowOp(index, operation, rule, reads)

    def entry(self, index: int) -> FlowOp:
        """One op."""
        if self._flow.kinds[index] != OP:
            return self._of_loop(index)
        op = self._flow.ops[index]
        read = _distinct(self._flow.operands[index], len(op.operands))
        operands = tuple(self.value_of[value] for value in read)
        results = tuple(self._flow.results[index])
        given = given_specs(op, self._mesh)
        is_free = not given and (
            _is_source(op)
            or (bool(operands) and all(self._free[v] for v in operands) and op.name not in MATRIX_PRODUCTS)
        )
        for value in results:
            self._free[value] = is_free
        rule = elementwise(value_shape(op.results[0]), 1) if given else rule_of(op)
        if rule is None:
            shapes = [tuple(value_shape(self._flow.values[value]) for value in each) for each in (read, results)]
            if not is_free and any(shapes[0] + shapes[1]):
                self._remark(op, f"{op.name} can't be sharded: every device does all of it")
            rule = replicated_rule(*shapes)
        separate = is_separate(self._flow, index)
        keeps = separate or any(self._facts.from_memory[value] for value in results)
        is_there = bool(given) and self._kept[operands[0]]  # what a constraint makes is what it reads
        keeps = keeps and not is_there
        for value in results:
            self._kept[value] = keeps or is_there
        operation = ShardedOp(
            operands=operands[: len(rule.operands)],
            results=results,
            rule=None if is_free else rule,
            seconds=0.0
            if is_there
            else op_seconds(
                op,
                self._model,
                self._device,
                keeps,
                separate,
                self._facts.from_memory,
                operands,
                in_place=index in self._facts.in_place,
            ),
            repack_seconds=repack_seconds(op, self._device),
            narrows=self._narrows(index, operands, results),
            runs_per_step=self.runs_per_step(index) * self._flow.iterations[index],
            materialized=keeps,
            constraint_specs=given,
            live_whole_step=ACCUMULATE in op.attributes or self._is_held(index),
            live_instances=self._live_instances(index),
            defers=self._facts.defers.get(index, Defers.NOT),
            reshards_per_step=self._reshards_per_step(index, read[: len(rule.operands)]),
        )
        return FlowOp(index, operation, rule, read[: len(rule.operands)])


def _read_in(flow: LoopFlow, value_of: list[int], phases: Collection[str]) -> frozenset[int]:
    """The values that ops of some phases read."""
    reads = zip(flow.operands, flow.phases, strict=True)
    return frozenset(value_of[value] for values, phase in reads if phase in phases for value in values)


def forwarded_values(flow: LoopFlow) -> list[int]:
    """Of each value that an entry forwards, the one that it is; of others themselves."""
    value_of = list(range(len(flow.values)))
    for index in range(len(flow.ops)):
        if forwards(flow, index):
            for value, operand in zip(flow.results[index], flow.operands[index], strict=True):
                value_of[value] = value_of[operand]
    return value_of


def forwards(flow: LoopFlow, index: int) -> bool:
    """Whether the results of an entry are its operands, one by one."""
    op = flow.ops[index]
    return (
        flow.kinds[index] == INSIDE
        or op.name == "stablehlo.optimization_barrier"
        or custom_call_target(op) == GRADIENT_BOUNDARY
    )


def _distinct(values: tuple[int, ...], num_operands: int) -> tuple[int, ...]:
    """The operands of an op, and once each what its regions read besides."""
    direct = values[:num_operands]
    return direct + tuple(value for value in dict.fromkeys(values[num_operands:]) if value not in direct)


def _is_source(op: ir.Operation) -> bool:
    return op.name in ("stablehlo.constant", "stablehlo.iota") or custom_call_target(op) == MICROBATCH_INDEX
