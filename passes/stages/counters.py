"""Counters of the state, which every stage that has them can bring up to date itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import COUNTER, UPDATE, argument_roles, integer, result_updates, set_stage
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import NEVER_CLONED
from bactrian.passes.ir.regions import custom_call_target, nested_operations, replace_reads


@dataclass(frozen=True)
class _Counter:
    """How a result counts on from argument ``updated``: the ops ``needed`` make it of the arguments ``read``."""

    result: int
    updated: int
    needed: list[int]
    read: frozenset[int]


def clone_counters(main: ir.Operation, small_bytes: int) -> int:
    """Let stages bring counters up to date themselves, in the place of a message per step.

    A counter is a small integer state (a step count, the words of a random key) whose next value depends on such state
    and constants only. Integers, since a compiler may round a floating expression differently in each function that it
    stands in, and the stages' copies must stay equal. Every stage has the scalars among them, so that every rank can say
    which step it is; others are where they are read. The ops that end such a computation are marked with ``COUNTER``.

    Returns:
        How many clones were made.
    """
    flow = MainDataflow.of(main)
    found = _find_counters(flow, main, small_bytes)
    numbers = _numbers(flow, main, found)
    all_stages = {stage for stage in flow.stages if stage is not None}
    readers: dict[int, set[int]] = {}
    for index, stage in enumerate(flow.stages):
        for value in flow.operands[index]:
            if value < flow.num_arguments and stage is not None:
                readers.setdefault(value, set()).add(stage)
    made = 0
    for counter in found:
        if counter.updated in numbers:
            stages = all_stages
        else:
            stages = set[int].intersection(
                *(readers.get(argument, set[int]()) for argument in {counter.updated, *counter.read})
            )
        for stage in sorted(stages - {flow.stages[counter.needed[-1]]}):
            _copy(flow, counter.needed, stage, counter.result)
            made += len(counter.needed)
    return made


def counters(flow: MainDataflow) -> dict[tuple[int, int], int]:
    """(result, stage) -> the value that a stage computes for itself (``COUNTER``)."""
    found: dict[tuple[int, int], int] = {}
    for index, op in enumerate(flow.ops):
        stage = flow.stages[index]
        if COUNTER in op.attributes and stage is not None:
            for result in ir.ArrayAttr(op.attributes[COUNTER]):
                found.setdefault((ir.IntegerAttr(result).value, stage), flow.results[index][0])
    return found


def _find_counters(flow: MainDataflow, main: ir.Operation, small_bytes: int) -> list[_Counter]:
    exact = [_is_exact(value) and size <= small_bytes for value, size in zip(flow.values, flow.sizes, strict=True)]
    roles = argument_roles(main)
    known = [exact[i] and roles[i] != "batch" for i in range(flow.num_arguments)]
    known += [False] * (len(flow.values) - flow.num_arguments)
    for index, op in enumerate(flow.ops):
        if flow.phases[index] == UPDATE and op.name not in NEVER_CLONED and custom_call_target(op) is None:
            computable = all(known[value] for value in flow.operands[index]) and _is_exact_inside(op)
            for result in flow.results[index]:
                known[result] = computable and exact[result]
    found: list[_Counter] = []
    for result, (value, updated) in enumerate(zip(flow.operands[-1], result_updates(main), strict=True)):
        producer = flow.producer[value]
        if updated is None or producer < 0 or not known[value] or len(flow.results[producer]) != 1:
            continue
        needed = _computation(flow, producer)
        read = {operand for index in needed for operand in flow.operands[index] if operand < flow.num_arguments}
        found.append(_Counter(result, updated, needed, frozenset(read)))
    return found


def _numbers(flow: MainDataflow, main: ir.Operation, found: Sequence[_Counter]) -> set[int]:
    """The scalar counters, by argument, that are computed from themselves, other such, and scalars that are only read."""
    counter_of = {counter.updated: counter for counter in found}
    state = {argument for argument in result_updates(main) if argument is not None}
    numbers = {
        argument
        for argument in range(flow.num_arguments)
        if not ir.RankedTensorType(flow.values[argument].type).shape
        and (argument not in state or (argument in counter_of and argument in counter_of[argument].read))
    }
    while lost := {a for a in numbers if a in counter_of and not counter_of[a].read <= numbers}:
        numbers -= lost
    return numbers


def _computation(flow: MainDataflow, producer: int) -> list[int]:
    """An update op and all that it needs, in program order."""
    needed: set[int] = set()
    stack = [producer]
    while stack:
        index = stack.pop()
        if index >= 0 and index not in needed:
            needed.add(index)
            stack.extend(flow.producer[value] for value in flow.operands[index])
    return sorted(needed)


def _copy(flow: MainDataflow, needed: list[int], stage: int, result: int) -> None:
    """Copy a computation to a stage."""
    copies: dict[ir.Value, ir.Value] = {}
    for index in needed:
        op = flow.ops[index]
        clone = op.clone(ip=ir.InsertionPoint(flow.ops[needed[-1]])).operation
        for old, new in copies.items():
            replace_reads(clone, old, new)
        set_stage(clone, stage)
        if index == needed[-1]:
            clone.attributes[COUNTER] = ir.ArrayAttr.get([integer(result)])
        copies.update(zip(op.results, clone.results, strict=True))


def _is_exact(value: ir.Value) -> bool:
    return isinstance(value.type, ir.RankedTensorType) and isinstance(value.type.element_type, ir.IntegerType)


def _is_exact_inside(op: ir.Operation) -> bool:
    if not len(op.regions):
        return True
    return all(_is_exact(result) for nested in nested_operations(op) for result in nested.results)
