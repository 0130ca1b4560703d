"""Following and editing ops of ``@main`` through their regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxlib.mlir import ir

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import phase_of
from bactrian.passes.ir.op_traits import MATRIX_PRODUCTS


def main_function(module: ir.Module) -> ir.Operation:
    """The ``func.func @main`` of a captured or staged module.

    Raises:
        PassError: there is none.
    """
    for op in module.body.operations:
        operation = op.operation
        if operation.name == "func.func" and ir.StringAttr(operation.attributes["sym_name"]).value == "main":
            return operation
    raise error_at(
        PassError,
        module.operation,
        "the module has no @main",
        fix="start from `step.trace(*args).text`, or pass a module with one public @main",
    )


def body(main: ir.Operation) -> ir.Block:
    """The single block of ``@main``."""
    return main.regions[0].blocks[0]


def terminator(main: ir.Operation) -> ir.Operation:
    """The ``return`` of ``@main``."""
    operations = body(main).operations
    return operations[len(operations) - 1].operation


def custom_call_target(op: ir.Operation) -> str | None:
    """The target of a ``stablehlo.custom_call``, or None for any other op."""
    if op.name != "stablehlo.custom_call":
        return None
    return ir.StringAttr(op.attributes["call_target_name"]).value


def nested_operations(op: ir.Operation) -> list[ir.Operation]:
    """All ops inside ``op``'s regions, outer ones before those that they contain."""
    found: list[ir.Operation] = []
    blocks = [block for region in op.regions for block in region.blocks]
    while blocks:
        for nested in blocks.pop().operations:
            operation = nested.operation
            found.append(operation)
            if len(operation.regions):
                blocks.extend(inner for region in operation.regions for inner in region.blocks)
    return found


def has_product(op: ir.Operation) -> bool:
    """Whether an op is a matrix product or convolution, or one runs in its regions: the loop of a scan over layers."""
    if op.name in MATRIX_PRODUCTS:
        return True
    return len(op.regions) > 0 and any(nested.name in MATRIX_PRODUCTS for nested in nested_operations(op))


def nested_operands(op: ir.Operation) -> Iterator[tuple[ir.Operation, int, ir.Value]]:
    """Operands that ops inside ``op``'s regions take from outside: (nested op, operand number, value)."""
    if not len(op.regions):
        return
    nested = nested_operations(op)
    inside = {operation.block for operation in nested}
    made = {result for operation in nested for result in operation.results}
    for operation in nested:
        for number, value in enumerate(operation.operands):
            if value in made:
                continue
            owner = value.owner
            block = owner if isinstance(owner, ir.Block) else owner.operation.block
            if block not in inside:
                yield operation, number, value


def set_operand(op: ir.Operation, number: int, value: ir.Value) -> None:
    """Replace one operand of an op."""
    op.operands[number] = value


def replace_reads(op: ir.Operation, old: ir.Value, new: ir.Value) -> None:
    """Make ``op`` (its regions included) read ``new`` where it read ``old``."""
    op.replace_uses_of_with(old, new)
    if len(op.regions):
        for nested in nested_operations(op):
            nested.replace_uses_of_with(old, new)


def top_level(op: ir.Operation, block: ir.Block) -> ir.Operation:
    """The ancestor of ``op`` that stands directly in ``block``."""
    current = op
    while current.block != block:
        parent = current.parent
        if parent is None:
            raise error_at(PassError, op, f"{op.name} stands outside of @main")
        current = parent.operation
    return current


def erase_dead(candidates: Sequence[ir.Operation], phase: str | None = None) -> None:
    """Erase those ops that nobody reads, and whatever only they kept alive (of ``phase``, if one is given)."""
    stack = dict.fromkeys(candidates)
    while stack:
        op, _ = stack.popitem()
        if any(next(iter(result.uses), None) is not None for result in op.results):
            continue
        producers = {v.owner.operation: None for v in op.operands if not isinstance(v.owner, ir.Block)}
        op.erase()
        stack |= {producer: None for producer in producers if phase in (None, phase_of(producer))}
