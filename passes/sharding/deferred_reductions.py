"""Which reductions may be deferred: gradients that are accumulated over microbatches while they are partial sums."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import ACCUMULATE, UPDATE
from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import LINEAR, SCALING
from bactrian.passes.sharding.strategies import Defers

_SUMS = ("stablehlo.dot_general", "stablehlo.reduce", "stablehlo.scatter")


def deferred_sums(flow: MainDataflow, value_of: Sequence[int], forwards: Sequence[bool]) -> dict[int, Defers]:
    """The ops that lie between a sum over a batch and the accumulator that only the update reads.

    All that is between is linear, and nothing else reads it, so devices can accumulate parts of the sum, each its own,
    and add them up once per step.

    Args:
        flow: the program.
        value_of: of each value the one that it is, where ops forward what they read.
        hands_on: which ops do so.
    """
    finder = _Finder(flow, value_of, forwards)
    found = dict[int, Defers]()
    for index, op in enumerate(flow.ops[:-1]):
        if ACCUMULATE in op.attributes and op.name == "stablehlo.add":
            found |= finder.below(index) or {}
    return found


class _Finder:
    def __init__(self, flow: MainDataflow, value_of: Sequence[int], forwards: Sequence[bool]) -> None:
        self._flow, self._value_of = flow, value_of
        self._readers: list[set[int]] = [set() for _ in flow.values]
        for index, reads in enumerate(flow.operands):
            if index == len(flow.ops) - 1 or not forwards[index]:
                for value in reads:
                    self._readers[value_of[value]].add(index)

    def below(self, index: int) -> dict[int, Defers] | None:
        """What leads to an accumulator, and the accumulator itself; None where its sum can't wait."""
        flow = self._flow
        stage, end = flow.stages[index], len(flow.ops) - 1
        readers = self._readers[flow.results[index][0]]
        if not readers or flow.phases[index] == UPDATE or not _is_float(flow.ops[index]):
            return None
        if any(r == end or flow.phases[r] != UPDATE or flow.stages[r] != stage for r in readers):
            return None
        zeros, value = flow.operands[index]
        source = self._chain(value, index)
        if source is None or not self._is_zero(zeros):
            return None
        return {**source, index: Defers.PASSES}

    def _chain(self, value: int, reader: int) -> dict[int, Defers] | None:
        flow = self._flow
        value = self._value_of[value]
        index = flow.producer[value]
        if index < 0 or self._readers[value] != {reader} or flow.stages[index] != flow.stages[reader]:
            return None
        op = flow.ops[index]
        if flow.phases[index] == UPDATE or len(op.results) != 1 or not _is_float(op):
            return None
        if op.name in _SUMS:
            begins = {"stablehlo.reduce": 1, "stablehlo.scatter": 0}.get(op.name)
            if begins is not None and (len(op.operands) > 3 - begins or not self._begins_at_zero(index, begins)):
                return None
            return {index: Defers.STARTS}
        if op.name == "stablehlo.add":
            left, right = (self._chain(operand, index) for operand in flow.operands[index])
            return None if left is None or right is None else {**left, **right, index: Defers.PASSES}
        if op.name in LINEAR:
            if not isinstance(ir.RankedTensorType(op.operands[0].type).element_type, ir.FloatType):
                return None
            source = self._chain(flow.operands[index][0], index)
            return None if source is None else {**source, index: Defers.PASSES}
        if op.name in SCALING and splat_of(flow.values[self._value_of[flow.operands[index][1]]]) is not None:
            source = self._chain(flow.operands[index][0], index)
            return None if source is None else {**source, index: Defers.PASSES}
        return None

    def _begins_at_zero(self, index: int, position: int) -> bool:
        """Whether a sum begins at zero and does nothing but add."""
        op = self._flow.ops[index]
        names = [nested.operation.name for nested in op.regions[0].blocks[0].operations]
        return names == ["stablehlo.add", "stablehlo.return"] and self._is_zero(self._flow.operands[index][position])

    def _is_zero(self, value: int) -> bool:
        constant = splat_of(self._flow.values[self._value_of[value]])
        return constant is not None and ir.FloatAttr(constant).value == 0.0


def _is_float(op: ir.Operation) -> bool:
    return isinstance(ir.RankedTensorType(op.results[0].type).element_type, ir.FloatType)
