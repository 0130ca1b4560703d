"""The data flow of ``@main`` with that of its loops: what the body of a ``while`` reads, makes and forwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import phase_of, stage_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_costs import trip_count
from bactrian.passes.ir.regions import body, nested_operations

WHILE = "stablehlo.while"

OP = "op"
CARRY = "carry"
INSIDE = "inside"
CONDITION = "condition"
END = "end"


def assumed_trip_count(loop: ir.Operation) -> int:
    """How often the body of a ``while`` is taken to run: once, where the IR does not say."""
    count = trip_count(loop)
    return 1 if count is None else count


def condition_block(loop: ir.Operation) -> ir.Block:
    """The block that says whether a ``while`` goes on."""
    return loop.regions[0].blocks[0]


def body_block(loop: ir.Operation) -> ir.Block:
    """The block that a ``while`` runs again and again."""
    return loop.regions[1].blocks[0]


def capture_unchanged(main: ir.Operation) -> None:
    """Let loops read from outside what they carry but never change: then it is moved once, before the loop, and is in
    memory once. The loop goes on carrying it."""
    for op in nested_operations(main):
        if op.name == WHILE:
            for number, (entering, argument) in enumerate(zip(op.operands, body_block(op).arguments, strict=True)):
                if is_unchanged(op, number):
                    end = _end(op)
                    argument.replace_all_uses_except(entering, end)
                    condition_block(op).arguments[number].replace_all_uses_with(entering)


def is_unchanged(loop: ir.Operation, number: int) -> bool:
    """Whether the body of a ``while`` returns one of its arguments in its place."""
    return _end(loop).operands[number] == body_block(loop).arguments[number]


def _end(loop: ir.Operation) -> ir.Operation:
    operations = body_block(loop).operations
    return operations[len(operations) - 1].operation


@dataclass(frozen=True)
class Loop:
    """One ``while``.

    Attributes:
        op: the ``while``.
        first, end: its first and its last entry in the flow.
        results: the values that it carries, as numbers of its results.
        returned: what its body gives for each of them.
    """

    op: ir.Operation
    first: int
    end: int
    results: tuple[int, ...]
    returned: tuple[int, ...]


@dataclass(frozen=True)
class LoopFlow(MainDataflow):
    """The data flow of ``@main``, where the place of a ``while`` is taken by what it does.

    Its entries are, in this order: for each carried value one that takes what enters, and whose result is the result of
    the ``while`` (``CARRY``; where the body never changes the value, it is forwarded: ``INSIDE``); one that forwards
    the carried values to the arguments of the body (``INSIDE``); where the condition reads more than scalars, such a
    one for its arguments, and one for all that the condition reads (``CONDITION``); the ops of the body; one that reads
    what the body returns (``END``).

    Attributes:
        kinds: of each entry one of these words, ``OP`` for an op as it is.
        tops: of each entry the op that stands in ``@main``.
        iterations: how often each entry runs when ``@main`` runs once.
        value_iterations: how often each value is made anew.
        loops: inner ones first.
    """

    kinds: list[str] = field(default_factory=list[str])
    tops: list[ir.Operation] = field(default_factory=list[ir.Operation])
    iterations: list[int] = field(default_factory=list[int])
    value_iterations: list[int] = field(default_factory=list[int])
    loops: list[Loop] = field(default_factory=list[Loop])

    @classmethod
    def of(cls, main: ir.Operation) -> LoopFlow:
        """Read ``@main`` once."""
        return _Builder(main).flow

    @cached_property
    def phases(self) -> list[str | None]:
        """``bactrian.phase`` of each entry: in a loop that of the loop."""
        return [phase_of(top) for top in self.tops]

    @cached_property
    def stages(self) -> list[int | None]:
        """``bactrian.stage`` of each entry: in a loop that of the loop."""
        return [stage_of(top) for top in self.tops]

    @cached_property
    def ends(self) -> dict[int, Loop]:
        """The loops by their last entries."""
        return {loop.end: loop for loop in self.loops}

    def loop_of(self, index: int) -> int | None:
        """The position in ``loops`` of the innermost loop that an entry is in; None outside of all."""
        return next((at for at, loop in enumerate(self.loops) if loop.first <= index <= loop.end), None)

    def lasting(self) -> list[tuple[int, int]]:
        """Values and the entries that they must be there for, though nobody reads them so late: what a loop carries,
        and what it reads from outside, is there until its end."""
        found = list[tuple[int, int]]()
        for loop in self.loops:
            found += [(value, loop.end) for value in loop.results]
            reads = {value for index in range(loop.first, loop.end + 1) for value in self.operands[index]}
            found += [(value, loop.end) for value in sorted(reads) if self.producer[value] < loop.first]
        return found


class _Builder:
    """Walks ``@main`` and the bodies of its loops."""

    def __init__(self, main: ir.Operation) -> None:
        arguments: list[ir.Value] = list(body(main).arguments)
        count = len(arguments)
        self.flow = LoopFlow([], [], [], [-1] * count, arguments, count, value_iterations=[1] * count)
        self._number: dict[ir.Value, int] = {value: index for index, value in enumerate(arguments)}
        for view in body(main).operations:
            op = view.operation
            self._op(op, op, 1)

    def _entry(
        self,
        kind: str,
        op: ir.Operation,
        top: ir.Operation,
        iterations: int,
        reads: tuple[int, ...],
        results: Iterable[ir.Value],
    ) -> range:
        flow, first = self.flow, len(self.flow.values)
        for result in results:
            self._number[result] = len(flow.values)
            flow.values.append(result)
            flow.producer.append(len(flow.ops))
            flow.value_iterations.append(iterations)
        made = range(first, len(flow.values))
        flow.ops.append(op)
        flow.operands.append(reads)
        flow.results.append(made)
        flow.kinds.append(kind)
        flow.tops.append(top)
        flow.iterations.append(iterations)
        return made

    def _op(self, op: ir.Operation, top: ir.Operation, iterations: int) -> None:
        if op.name == WHILE:
            self._loop(op, top, iterations)
            return
        reads = tuple(self._number[value] for value in op.operands)
        if len(op.regions):
            reads += tuple(self._known(_inside(block) for region in op.regions for block in region.blocks))
        self._entry(OP, op, top, iterations, reads, op.results)

    def _known(self, inside: Iterable[list[ir.Operation]]) -> list[int]:
        captured = [self._number.get(value) for ops in inside for nested in ops for value in nested.operands]
        return [value for value in captured if value is not None]

    def _loop(self, op: ir.Operation, top: ir.Operation, iterations: int) -> None:
        first, each = len(self.flow.ops), iterations * assumed_trip_count(op)
        entering = [self._number[value] for value in op.operands]
        results = tuple(
            self._entry(INSIDE if is_unchanged(op, number) else CARRY, op, top, iterations, (value,), [result])[0]
            for number, (value, result) in enumerate(zip(entering, op.results, strict=True))
        )
        self._condition(op, top, each, results)
        block = body_block(op)
        self._entry(INSIDE, op, top, each, results, block.arguments)
        for view in block.operations:
            nested = view.operation
            if nested.name != "stablehlo.return":
                self._op(nested, top, each)
                continue
            returned = tuple(self._number[value] for value in nested.operands)
            self._entry(END, nested, top, each, returned, [])
            self.flow.loops.append(Loop(op, first, len(self.flow.ops) - 1, results, returned))

    def _condition(self, op: ir.Operation, top: ir.Operation, iterations: int, results: tuple[int, ...]) -> None:
        """What the condition reads, where that is more than scalars."""
        block = condition_block(op)
        inside = _inside(block)
        arguments = {argument: number for number, argument in enumerate(block.arguments)}
        read = dict.fromkeys(value for nested in inside for value in nested.operands if not _is_scalar(value))
        if not any(value in arguments or value in self._number for value in read):
            return
        self._entry(INSIDE, op, top, iterations, results, block.arguments)
        reads = tuple(self._number[value] for value in read if value in self._number)
        self._entry(CONDITION, block.operations[0].operation, top, iterations, reads, [])


def _inside(block: ir.Block) -> list[ir.Operation]:
    """The ops of a block, and those in their regions."""
    found, blocks = list[ir.Operation](), [block]
    while blocks:
        for view in blocks.pop().operations:
            found.append(view.operation)
            blocks.extend(inner for region in view.operation.regions for inner in region.blocks)
    return found


def condition_ops(loop: ir.Operation) -> list[ir.Operation]:
    """All ops of the condition of a ``while``."""
    return _inside(condition_block(loop))


def _is_scalar(value: ir.Value) -> bool:
    return not isinstance(value.type, ir.RankedTensorType) or not value.type.rank
