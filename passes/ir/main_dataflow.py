"""The data flow of ``@main``: which op reads and writes which value, through regions as well.

Every pass between capture and ``split-stages`` works on one straight-line function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    phase_of,
    stage_of,
)
from bactrian.passes.ir.regions import body, custom_call_target, main_function, nested_operations
from bactrian.passes.ir.tensor_sizes import type_bytes


@dataclass(frozen=True)
class MainDataflow:
    """A snapshot of the data flow of ``@main``.

    Values are numbered: arguments first, then op results in program order. ``operands[i]`` holds the value numbers that
    op ``i`` reads, values captured by its regions included; ``results[i]`` the numbers it writes; ``producer[v]`` is
    the op number of value ``v``, or -1 for an argument.
    """

    ops: list[ir.Operation]
    operands: list[tuple[int, ...]]
    results: list[range]
    producer: list[int]
    values: list[ir.Value]
    num_arguments: int

    @classmethod
    def of(cls, main: ir.Operation) -> MainDataflow:
        """Read ``@main`` once. What a region takes from outside is what has a number already."""
        block = body(main)
        values: list[ir.Value] = list(block.arguments)
        num_arguments = len(values)
        number: dict[ir.Value, int] = {value: index for index, value in enumerate(values)}
        producer = [-1] * num_arguments
        ops: list[ir.Operation] = [view.operation for view in block.operations]
        operands: list[tuple[int, ...]] = []
        results: list[range] = []
        number_of, known = number.__getitem__, number.get
        for index, op in enumerate(ops):
            reads = tuple(map(number_of, op.operands))
            if len(op.regions):
                captured = [known(value) for nested in nested_operations(op) for value in nested.operands]
                reads += tuple(value for value in captured if value is not None)
            operands.append(reads)
            first = last = len(values)
            for result in op.results:
                number[result] = last
                values.append(result)
                producer.append(index)
                last += 1
            results.append(range(first, last))
        return cls(ops, operands, results, producer, values, num_arguments)

    @classmethod
    def kept_or_read(cls, module: ir.Module, ctx: PassContext) -> MainDataflow:
        """The data flow that the pass before kept, else read from ``@main``."""
        kept = ctx.kept(cls)
        return cls.of(main_function(module)) if kept is None else kept.again()

    def again(self) -> MainDataflow:
        """The same data flow for the next pass, without the attributes that this one may have changed."""
        other = replace(self)
        other.__dict__.update({name: self.__dict__[name] for name in ("sizes", "boundary") if name in self.__dict__})
        return other

    @cached_property
    def phases(self) -> list[str | None]:
        """``bactrian.phase`` of each op, as it was when first asked for."""
        return [phase_of(op) for op in self.ops]

    @cached_property
    def stages(self) -> list[int | None]:
        """``bactrian.stage`` of each op, as it was when first asked for."""
        return [stage_of(op) for op in self.ops]

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each value."""
        known: dict[ir.Type, int] = {}
        types = [value.type for value in self.values]
        for type_ in types:
            if type_ not in known:
                known[type_] = type_bytes(type_)
        return [known[type_] for type_ in types]

    @cached_property
    def boundary(self) -> int:
        """The number of the gradient boundary, -1 where there is none."""
        calls = (index for index, op in enumerate(self.ops) if op.name == "stablehlo.custom_call")
        return next((index for index in calls if custom_call_target(self.ops[index]) == GRADIENT_BOUNDARY), -1)

    def ancestors(self, values: list[int]) -> list[bool]:
        """Which ops the given values depend on, directly or not."""
        seen = [False] * len(self.ops)
        stack = [self.producer[value] for value in values]
        while stack:
            op = stack.pop()
            if op < 0 or seen[op]:
                continue
            seen[op] = True
            stack.extend(self.producer[value] for value in self.operands[op])
        return seen

    def users(self) -> list[list[int]]:
        """For each value, the ops that read it (each once), in program order."""
        users: list[list[int]] = [[] for _ in self.values]
        for index, reads in enumerate(self.operands):
            for value in dict.fromkeys(reads):
                users[value].append(index)
        return users
