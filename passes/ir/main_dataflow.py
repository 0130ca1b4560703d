"""Reading and editing the captured ``@main``: its boundary, phases, stages and data flow.

Every pass between capture and ``split-stages`` works on one straight-line function. These helpers say once how its
attributes are spelled (``docs/ir.md``) and how values are followed through regions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.errors import PassError

BOUNDARY = "bactrian.gradient_boundary"
MICROBATCH_INDEX = "bactrian.microbatch_index"
STAGE_BOUNDARY = "bactrian.stage_boundary"

FORWARD, BACKWARD, UPDATE, INITIALIZE = "forward", "backward", "update", "initialize"


def main_function(module: ir.Module) -> ir.Operation:
    """The ``func.func @main`` of a captured or staged module."""
    for op in module.body.operations:
        operation = op.operation
        if operation.name == "func.func" and ir.StringAttr(operation.attributes["sym_name"]).value == "main":
            return operation
    raise PassError("the module has no @main", fix="pass the output of capture, or a module with one public @main")


def body(main: ir.Operation) -> ir.Block:
    """The single block of ``@main``."""
    return main.regions[0].blocks[0]


def custom_call_target(op: ir.Operation) -> str | None:
    """The target of a ``stablehlo.custom_call``, or None for any other op."""
    if op.name != "stablehlo.custom_call":
        return None
    return ir.StringAttr(op.attributes["call_target_name"]).value


def find_boundary(main: ir.Operation) -> ir.Operation:
    """The gradient boundary of ``@main`` (``verify-program`` has checked that there is exactly one)."""
    for op in body(main).operations:
        if isinstance(op, stablehlo.CustomCallOp) and custom_call_target(op.operation) == BOUNDARY:
            return op.operation
    raise PassError("@main has no gradient boundary", fix="run verify-program first")


def boundary_words(boundary: ir.Operation, key: str) -> list[str]:
    """``kinds`` or ``reductions`` of the boundary, one word per operand."""
    config = ir.DictAttr(boundary.attributes["mhlo.backend_config"])
    text = ir.StringAttr(config[key]).value
    return text.split(",") if text else []


def set_boundary_words(boundary: ir.Operation, kinds: list[str], reductions: list[str]) -> None:
    """Write ``kinds`` and ``reductions`` of the boundary."""
    boundary.attributes["mhlo.backend_config"] = ir.DictAttr.get(
        {"kinds": ir.StringAttr.get(",".join(kinds)), "reductions": ir.StringAttr.get(",".join(reductions))}
    )


def make_boundary(
    values: list[ir.Value], result_types: list[ir.Type], kinds: list[str], reductions: list[str]
) -> ir.Operation:
    """A gradient boundary at the current insertion point."""
    boundary = ir.Operation.create(
        "stablehlo.custom_call",
        results=result_types,
        operands=values,
        attributes={
            "call_target_name": ir.StringAttr.get(BOUNDARY),
            "api_version": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4),
        },
    )
    set_boundary_words(boundary, kinds, reductions)
    return boundary


def string_attribute(op: ir.Operation, name: str) -> str | None:
    """A string attribute's value, or None where it is absent."""
    attributes = op.attributes
    return ir.StringAttr(attributes[name]).value if name in attributes else None


def integer_attribute(op: ir.Operation, name: str) -> int | None:
    """An integer attribute's value, or None where it is absent."""
    attributes = op.attributes
    return ir.IntegerAttr(attributes[name]).value if name in attributes else None


def required_integer(op: ir.Operation, name: str, made_by: str) -> int:
    """An integer attribute that an earlier pass must have written."""
    value = integer_attribute(op, name)
    if value is None:
        raise PassError(f"{name} is missing on {op.name}", where=str(op.location), fix=f"run {made_by} first")
    return value


def integer(value: int) -> ir.Attribute:
    """``value`` as an ``i64`` attribute (in the current context)."""
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)


def phase_of(op: ir.Operation) -> str | None:
    """``bactrian.phase`` of an op."""
    return string_attribute(op, "bactrian.phase")


def stage_of(op: ir.Operation) -> int | None:
    """``bactrian.stage`` of an op."""
    return integer_attribute(op, "bactrian.stage")


def erase_dead(candidates: Sequence[ir.Operation], phase: str | None = None) -> None:
    """Erase those ops that nobody reads, and whatever only they kept alive (of ``phase``, if one is given)."""
    stack = list(dict.fromkeys(candidates))
    while stack:
        op = stack.pop()
        if any(next(iter(result.uses), None) is not None for result in op.results):
            continue
        producers = {v.owner.operation: None for v in op.operands if not isinstance(v.owner, ir.Block)}
        op.erase()
        stack.extend(p for p in producers if phase in (None, phase_of(p)) and p not in stack)


def argument_attributes(main: ir.Operation) -> list[dict[str, ir.Attribute]]:
    """A copy of the attributes of each argument of ``@main``."""
    return _attributes(main, "arg_attrs", len(body(main).arguments))


def result_attributes(main: ir.Operation) -> list[dict[str, ir.Attribute]]:
    """A copy of the attributes of each result of ``@main``."""
    return _attributes(main, "res_attrs", len(terminator(main).operands))


def _attributes(main: ir.Operation, name: str, count: int) -> list[dict[str, ir.Attribute]]:
    if name not in main.attributes:
        return [{} for _ in range(count)]
    return [{item.name: item.attr for item in ir.DictAttr(entry)} for entry in ir.ArrayAttr(main.attributes[name])]


def argument_role(main: ir.Operation, index: int) -> str:
    """``bactrian.role`` of an argument of ``@main``: ``state``, ``batch`` or ``constant``."""
    attributes = ir.DictAttr(ir.ArrayAttr(main.attributes["arg_attrs"])[index])
    return ir.StringAttr(attributes["bactrian.role"]).value


def argument_roles(main: ir.Operation) -> list[str]:
    """The roles of all arguments of ``@main``."""
    count = len(body(main).arguments)
    return [argument_role(main, index) for index in range(count)]


def argument_homes(main: ir.Operation) -> dict[int, tuple[int, ...]]:
    """``bactrian.home``: the stages that hold an argument already, in order, by argument number."""
    homes: dict[int, tuple[int, ...]] = {}
    for argument, entry in enumerate(argument_attributes(main)):
        if "bactrian.home" in entry:
            homes[argument] = tuple(sorted(ir.IntegerAttr(s).value for s in ir.ArrayAttr(entry["bactrian.home"])))
    return {argument: stages for argument, stages in homes.items() if stages}


def result_updates(main: ir.Operation) -> list[int | None]:
    """For each result of ``@main``, the argument whose next value it is."""
    return [
        ir.IntegerAttr(entry["bactrian.updates"]).value if "bactrian.updates" in entry else None
        for entry in result_attributes(main)
    ]


def terminator(main: ir.Operation) -> ir.Operation:
    """The ``return`` of ``@main``."""
    operations = body(main).operations
    return operations[len(operations) - 1].operation


def value_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a tensor; of anything else that of a scalar."""
    return tuple(value.type.shape) if isinstance(value.type, ir.RankedTensorType) else ()


def value_bytes(value: ir.Value) -> int:
    """Bytes of a statically shaped tensor value; sub-byte integers count one byte an element."""
    return type_bytes(value.type)


def type_bytes(type_: ir.Type) -> int:
    """Bytes of a statically shaped tensor type (0 for tokens and other non-tensors)."""
    if not isinstance(type_, ir.RankedTensorType):
        return 0
    element = type_.element_type
    if isinstance(element, ir.ComplexType):
        width = 2 * getattr(element.element_type, "width", 8)
    else:
        width = getattr(element, "width", 8)
    return math.prod(type_.shape) * max(1, width // 8)


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
            home = owner if isinstance(owner, ir.Block) else owner.operation.block
            if home not in inside:
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
            raise PassError(f"{op.name} stands outside of @main", where=str(op.location))
        current = parent.operation
    return current


@dataclass(frozen=True)
class Dataflow:
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
    def of(cls, main: ir.Operation) -> Dataflow:
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
    def kept_or_read(cls, module: ir.Module, ctx: PassContext) -> Dataflow:
        """The data flow that the pass before kept, else read from ``@main``."""
        kept = ctx.kept(cls)
        return cls.of(main_function(module)) if kept is None else kept.again()

    def again(self) -> Dataflow:
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
        return next((index for index in calls if custom_call_target(self.ops[index]) == BOUNDARY), -1)

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
