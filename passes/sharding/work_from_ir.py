"""From ``@main`` to what the sharding model sees of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    ACCUMULATE,
    BACKWARD,
    COUNTER,
    FORWARD,
    GRADIENT_BOUNDARY,
    MICROBATCH_INDEX,
    ROLE,
    UPDATE,
    argument_attributes,
    argument_pinned_stages,
    result_updates,
)
from bactrian.passes.ir.op_costs import CostModel, trip_count
from bactrian.passes.ir.op_traits import MATRIX_PRODUCTS
from bactrian.passes.ir.regions import custom_call_target, nested_operations
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.cluster import Cluster
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.deferred_reductions import deferred_sums
from bactrian.passes.sharding.fusion_costs import (
    PART_WRITTEN,
    is_separate,
    op_seconds,
    read_from_memory,
    repack_seconds,
)
from bactrian.passes.sharding.halo_rules import RULE, Fillings, with_borders
from bactrian.passes.sharding.loop_dataflow import CARRY, END, INSIDE, OP, LoopFlow
from bactrian.passes.sharding.sharding_model import Operation, Tensor, Work
from bactrian.passes.sharding.sharding_rules import Dims, Rule, elementwise, whole
from bactrian.passes.sharding.strategies import Defers
from bactrian.passes.sharding.user_shardings import (
    constrained_values,
    fixed_arguments,
    given_specs,
    refuse_result_shardings,
)

_WITHOUT_RULE = frozenset(
    f"stablehlo.{name}" for name in ("constant", "iota", "custom_call", "while", "case", "if", "optimization_barrier")
)


@dataclass(frozen=True)
class Part:
    """One op.

    Attributes:
        index: its number in the data flow.
        operation: what the model sees.
        rule: its rule, also where it is free.
        reads: values of the data flow: its operands, then what only its regions read.
    """

    index: int
    operation: Operation
    rule: Rule
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """A program, and where its parts come from.

    Attributes:
        work: what the model sees.
        flow: the data flow of ``@main`` and of its loops.
        parts: of each op of ``work``.
        value_of: of each value of ``flow`` the one of ``work``: what a barrier or the boundary hands on is one value, and
            so is what a loop carries, in its body and after it.
        together: phases that are one function, whose ops share the copies of a value.
    """

    work: Work
    flow: LoopFlow
    parts: tuple[Part, ...]
    value_of: tuple[int, ...]
    together: frozenset[str] = frozenset()

    def function_of(self, phase: str | None) -> str:
        """A word for the function that a phase is in; what is done for the results is part of the update."""
        phase = phase or UPDATE
        return "together" if phase in self.together else phase


def read_program(
    main: ir.Operation,
    mesh: Mesh,
    cluster: Cluster,
    num_microbatches: int,
    remark: Callable[[ir.Operation, str], None],
    in_flight: int = 1,
    stage: int | None = None,
) -> Reading:
    """Read ``@main``.

    Args:
        main: with ``sdy.sharding_rule`` on its ops (``sdy-populate-op-sharding-rules``) and phases.
        mesh: the devices; layouts that are given name its axes.
        cluster: whose devices do the work.
        num_microbatches: how often forward and backward run in a step.
        remark: told of ops that nothing is known of.
        in_flight: microbatches whose activations are there at once.
        stage: only what this one does; what others send it is an input.

    Raises:
        PassError: no op has a rule; a sharding that is given names other axes.
        ProgramError: a sharding that is given does not cut evenly.
    """
    flow = LoopFlow.of(main)
    ops = [op for op, kind in zip(flow.ops, flow.kinds, strict=True) if kind == OP]
    ruled = [op for op in ops if op.name.startswith("stablehlo.") and op.name not in _WITHOUT_RULE]
    if ruled and not any(RULE in op.attributes for op in ruled):
        raise error_at(
            PassError,
            ruled[0],
            "no op of @main has an sdy.sharding_rule",
            fix="run func.func(sdy-populate-op-sharding-rules) first",
        )
    refuse_result_shardings(main)
    reader = _Reader(flow, mesh, cluster, num_microbatches, remark, in_flight)
    own = [
        index
        for index in range(len(flow.ops) - 1)
        if flow.kinds[index] != END and not _hands_on(flow, index) and stage in (None, flow.stages[index])
    ]
    for loop in flow.loops:
        if stage in (None, flow.stages[loop.first]) and trip_count(loop.op) is None:
            remark(loop.op, "unknown trip count: the loop body is costed as one iteration")
    parts = [reader.part(index) for index in own]
    value_of = reader.value_of
    inputs = list(range(flow.num_arguments))
    made = {value for index in own for value in flow.results[index]}
    partial = {value for index in reader.defers for value in flow.results[index]}
    carried = [
        (value_of[value], value_of[result], reader.weight(loop.end) * flow.value_turns[value])
        for loop in flow.loops
        if stage in (None, flow.stages[loop.end])
        for value, result in zip(loop.returned, loop.results, strict=True)
    ]
    if stage is not None:
        read = {value for part in parts for value in part.operation.operands} | {value for value, _, _ in carried}
        pinned = argument_pinned_stages(main)
        inputs = [number for number in inputs if number in read or stage in pinned.get(number, ())]
        inputs += sorted(value for value in read - made if value >= flow.num_arguments)
    updates = [
        (value_of[value], argument)
        for value, argument in zip(flow.operands[-1], result_updates(main), strict=True)
        if argument is not None and (stage is None or (argument in inputs and value_of[value] in made.union(inputs)))
    ]
    counted = dict(_counted(flow, own, result_updates(main)) if stage is not None else ())
    loads = [
        (number, num_microbatches * flow.sizes[number] / cluster.device.bytes_per_second)
        for number in _batch_arguments(main)
        if number in inputs
    ]
    loads += [
        (number, _times(flow, number, num_microbatches) * flow.sizes[number] / cluster.intra_host_bytes_per_second)
        for number in inputs
        if number >= flow.num_arguments
    ]
    elsewhere = {
        value_of[value]
        for index, reads in enumerate(flow.operands[:-1])
        if stage is not None and flow.stages[index] not in (None, stage)
        for value in reads
    }
    kept = [value_of[value] for value in flow.operands[-1]] + sorted(elsewhere)
    fixed = dict(fixed_arguments(main, flow, mesh) + constrained_values(main, flow, mesh)) | {
        argument: Spec.replicated(len(value_shape(flow.values[argument]))) for argument in counted.values()
    }
    position = {part.index: at for at, part in enumerate(parts)}
    work = Work(
        values=tuple(
            Tensor(value_shape(value), size, number in partial)
            for number, (value, size) in enumerate(zip(flow.values, flow.sizes, strict=True))
        ),
        inputs=tuple(inputs),
        operations=tuple(part.operation for part in parts),
        updates=tuple(dict.fromkeys(pair for pair in updates if pair[0] != pair[1])),
        fixed=tuple((number, layout) for number, layout in sorted(fixed.items()) if number in inputs),
        loads=tuple(loads),
        kept=tuple(value for value in dict.fromkeys(kept) if value in made or value in inputs),
        wanted=tuple((value, Spec.replicated(len(value_shape(flow.values[value])))) for value in counted),
        batch_copies=in_flight,
        carried=tuple(dict.fromkeys(tie for tie in carried if tie[0] != tie[1])),
        lasting=tuple(_lasting(flow, value_of, position)),
        in_place=tuple(_in_place(flow, value_of)),
    )
    return Reading(work, flow, tuple(parts), tuple(value_of))


def _lasting(flow: LoopFlow, value_of: list[int], position: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Values that are there until the ends of loops, and the last ops of these."""
    for value, end in flow.lasting():
        last = next((position[index] for index in range(end, -1, -1) if index in position), None)
        if last is not None:
            yield value_of[value], last


def _in_place(flow: LoopFlow, value_of: list[int]) -> Iterator[int]:
    """What the bodies of loops make for the next turn."""
    for loop in flow.loops:
        for value in loop.returned:
            if flow.producer[value_of[value]] > loop.first + len(loop.results):
                yield value_of[value]


def _times(flow: LoopFlow, value: int, num_microbatches: int) -> int:
    """How often in a step a value is made."""
    index = flow.producer[value]
    return flow.turns[index] * (1 if flow.phases[index] == UPDATE else num_microbatches)


def _counted(flow: LoopFlow, own: list[int], updates: list[int | None]) -> Iterator[tuple[int, int]]:
    """Counters that a stage brings up to date for itself: their next value, and the argument that it is one of."""
    for index in own:
        op = flow.ops[index]
        if COUNTER in op.attributes:
            for entry in ir.ArrayAttr(op.attributes[COUNTER]):
                argument = updates[ir.IntegerAttr(entry).value]
                if argument is not None:
                    yield flow.results[index][0], argument


class _Reader:
    """Reads op by op, in their order."""

    def __init__(
        self,
        flow: LoopFlow,
        mesh: Mesh,
        cluster: Cluster,
        num_microbatches: int,
        remark: Callable[[ir.Operation, str], None],
        in_flight: int,
    ) -> None:
        self._flow, self._mesh, self._cluster = flow, mesh, cluster
        self._num_microbatches, self._remark, self._in_flight = num_microbatches, remark, in_flight
        self._model, self._fillings = CostModel(), Fillings(flow.ops)
        self._free = [False] * len(flow.values)
        self._kept = [True] * len(flow.values)  # takes memory: all but what is made here, and fused
        self.value_of = list(range(len(flow.values)))
        for index in range(len(flow.ops)):
            if _hands_on(flow, index):
                for value, operand in zip(flow.results[index], flow.operands[index], strict=True):
                    self.value_of[value] = self.value_of[operand]
        self._from_memory = read_from_memory(flow, self.value_of)
        self.defers = deferred_sums(flow, self.value_of, [_hands_on(flow, index) for index in range(len(flow.ops))])
        self._in_backward = {
            self.value_of[value]
            for reads, phase in zip(flow.operands, flow.phases, strict=True)
            if phase == BACKWARD
            for value in reads
        }

    def weight(self, index: int) -> float:
        """How often in a step an entry runs, but for loops."""
        return 1.0 if self._flow.phases[index] == UPDATE else float(self._num_microbatches)

    def _copies(self, index: int) -> int:
        """How many of an entry's results are there at once."""
        activations = self._flow.phases[index] == FORWARD
        return self._in_flight if activations and self._in_backward.intersection(self._flow.results[index]) else 1

    def _moves(self, index: int, reads: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(self.weight(index) * self._flow.value_turns[value] for value in reads)

    def _of_loop(self, index: int) -> Part:
        """What a loop does with one value that it carries, or its condition with all."""
        flow, reads = self._flow, tuple(dict.fromkeys(self._flow.operands[index]))
        shapes = tuple(value_shape(flow.values[value]) for value in reads)
        rule = elementwise(shapes[0], 1) if flow.kinds[index] == CARRY else whole(shapes, ())
        operation = Operation(
            operands=tuple(self.value_of[value] for value in reads),
            results=tuple(flow.results[index]),
            rule=rule,
            weight=self.weight(index) * flow.turns[index],
            copies=self._copies(index),
            moves=self._moves(index, reads),
        )
        return Part(index, operation, rule, reads)

    def part(self, index: int) -> Part:
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
        rule = elementwise(value_shape(op.results[0]), 1) if given else _rule_of(op, self._flow, index)
        if rule is not None and rule.borders:
            rule = self._fillings.agreed(op, rule)
        if rule is None and _is_source(op):  # every device makes its own piece
            rule = elementwise(value_shape(op.results[0]), 0)
        if rule is None:
            shapes = [tuple(value_shape(self._flow.values[value]) for value in each) for each in (read, results)]
            if not is_free and any(shapes[0] + shapes[1]):
                self._remark(op, f"no sharding rule for {op.name}: it is replicated on every device")
            rule = whole(*shapes)
        separate = is_separate(self._flow, index)
        keeps = separate or any(self._from_memory[value] for value in results)
        is_there = bool(given) and self._kept[operands[0]]  # what a constraint makes is what it reads
        keeps = keeps and not is_there
        for value in results:
            self._kept[value] = keeps or is_there
        operation = Operation(
            operands=operands[: len(rule.operands)],
            results=results,
            rule=None if is_free else rule,
            seconds=0.0
            if is_there
            else op_seconds(op, self._model, self._cluster, keeps, separate, self._from_memory, operands),
            repack_seconds=repack_seconds(op, self._cluster),
            weight=self.weight(index) * self._flow.turns[index],
            keeps=keeps,
            given=given,
            lasts=ACCUMULATE in op.attributes,
            copies=self._copies(index),
            defers=self.defers.get(index, Defers.NOT),
            moves=self._moves(index, read[: len(rule.operands)]),
        )
        return Part(index, operation, rule, read[: len(rule.operands)])


def _hands_on(flow: LoopFlow, index: int) -> bool:
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


def _rule_of(op: ir.Operation, flow: LoopFlow, index: int) -> Rule | None:
    if RULE not in op.attributes:
        return None
    rule = sdy.OpShardingRuleAttr(op.attributes[RULE])

    def dims(mapping: ir.Attribute) -> Dims:
        tensor = sdy.TensorMappingAttr(mapping)
        return tuple(tuple(sdy.DimMappingAttr(dim).factor_indices) for dim in tensor.dim_mappings)

    sizes = tuple(rule.factor_sizes)
    operands = tuple(dims(mapping) for mapping in rule.operand_mappings)
    results = tuple(dims(mapping) for mapping in rule.result_mappings)
    shapes = [value_shape(flow.values[v]) for v in flow.operands[index]][: len(operands)]
    shapes += [value_shape(flow.values[v]) for v in flow.results[index]]
    # A dim may be smaller than its factors (the result of a slice): equal pieces of one are none of the other.
    uneven = {
        factor
        for tensor, shape in zip((*operands, *results), shapes, strict=True)
        for dim, size in zip(tensor, shape, strict=True)
        if math.prod(sizes[factor] for factor in dim) != size
        for factor in dim
    }
    if op.name == PART_WRITTEN and not is_separate(flow, index):
        # XLA finds the device of a part of one, for wider ones it gathers everything, in every turn.
        whole_and_part = zip(operands[0], *shapes[:2], strict=True)
        uneven |= {factor for dim, size, part in whole_and_part if part not in (1, size) for factor in dim}
    made = Rule(
        sizes=sizes,
        operands=operands,
        results=results,
        reduction=frozenset(rule.reduction_factors),
        replicated=frozenset(rule.need_replication_factors) | uneven,
        permuted=frozenset(rule.permutation_factors),
    )
    return with_borders(op, made, shapes)


def drop_rules(main: ir.Operation) -> None:
    """Take the rules off all ops: nothing after the choice reads them."""
    for op in nested_operations(main):
        if RULE in op.attributes:
            del op.attributes[RULE]


def _batch_arguments(main: ir.Operation) -> list[int]:
    batch = ir.StringAttr.get("batch")
    entries = argument_attributes(main)
    return [number for number, entry in enumerate(entries) if ROLE in entry and entry[ROLE] == batch]
