"""Loops as XLA takes them on a mesh: a ``while`` that reads nothing from outside."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.ir.meshes import SHARDING, mesh_name, sharding_attribute, value_shardings
from bactrian.passes.ir.regions import nested_operands, nested_operations
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.loop_dataflow import WHILE, is_unchanged


def carry_captured(main: ir.Operation) -> None:
    """Make loops with a sharding carry what their regions read from outside, unchanged, each in its own sharding.

    XLA makes operands of captured values when it imports a ``while``, and then finds fewer shardings than results; and it
    makes captured values of operands that a body returns as they came, and finds more. So these pass a constraint to
    their own sharding on their way. Constants are copied into the regions.
    """
    loops = [op for op in nested_operations(main) if op.name == WHILE and SHARDING in op.attributes]
    for loop in reversed(loops):  # what an inner loop carries, an outer one has to read
        _copy_constants(loop)
        captured = list(dict.fromkeys(value for _, _, value in nested_operands(loop)))
        _forward(_carry(main, loop, captured) if captured else loop)


def _copy_constants(loop: ir.Operation) -> None:
    copies = dict[tuple[int, ir.Value], ir.Value]()
    for nested, number, value in list(nested_operands(loop)):
        if isinstance(value.owner, ir.Block) or value.owner.operation.name != "stablehlo.constant":
            continue
        region = next(n for n, region in enumerate(loop.regions) if _is_within(nested, region.blocks[0]))
        if (region, value) not in copies:
            place = ir.InsertionPoint.at_block_begin(loop.regions[region].blocks[0])
            copies[region, value] = value.owner.operation.clone(ip=place).operation.results[0]
        nested.operands[number] = copies[region, value]


def _is_within(op: ir.Operation, block: ir.Block) -> bool:
    current: ir.Operation | None = op
    while current is not None:
        if current.block == block:
            return True
        parent = current.parent
        current = None if parent is None or parent.operation.name == "func.func" else parent.operation
    return False


def _carry(main: ir.Operation, loop: ir.Operation, captured: list[ir.Value]) -> ir.Operation:
    """A loop with more operands in the place of another."""
    captured = _unless_carried(loop, captured)
    shardings = list(sdy.TensorShardingPerValueAttr(loop.attributes[SHARDING]).shardings)
    mesh = mesh_name(shardings[0])
    for value, sharding in zip(captured, value_shardings(main, captured), strict=True):
        rank = value.type.rank if isinstance(value.type, ir.RankedTensorType) else 0
        shardings.append(sharding_attribute(Spec.replicated(rank), mesh) if sharding is None else sharding)
    attributes = {name: loop.attributes[name] for name in loop.attributes.keys()}  # noqa: SIM118 -- iterating gives no names in every jaxlib
    attributes[SHARDING] = sdy.TensorShardingPerValueAttr.get(shardings)
    with ir.InsertionPoint(loop):
        wider = ir.Operation.create(
            loop.name,
            results=[value.type for value in (*loop.operands, *captured)],
            operands=[*loop.operands, *captured],
            attributes=attributes,
            regions=2,
            loc=loop.location,
        )
    reads = list(nested_operands(loop))
    for region, target in zip(loop.regions, wider.regions, strict=True):
        block = region.blocks[0]
        ops = {nested for nested, _, _ in reads if _is_within(nested, block)}
        block.append_to(target)
        for value in captured:
            argument = block.add_argument(value.type, loop.location)
            for nested in ops:
                nested.replace_uses_of_with(value, argument)
    end = wider.regions[1].blocks[0].operations
    old = end[len(end) - 1].operation
    added = list(wider.regions[1].blocks[0].arguments)[len(loop.operands) :]
    with ir.InsertionPoint(old):
        ir.Operation.create("stablehlo.return", operands=[*old.operands, *added], loc=old.location)
    old.erase()
    for one, other in zip(loop.results, wider.results, strict=False):
        one.replace_all_uses_with(other)
    loop.erase()
    return wider


def _unless_carried(loop: ir.Operation, captured: list[ir.Value]) -> list[ir.Value]:
    """The captured values that a loop does not carry unchanged already; the others are read where they are carried."""
    blocks = [region.blocks[0] for region in loop.regions]
    unchanged = {value: n for n, value in enumerate(loop.operands) if is_unchanged(loop, n)}
    for nested, _, value in list(nested_operands(loop)):
        if value in unchanged:
            block = next(block for block in blocks if _is_within(nested, block))
            nested.replace_uses_of_with(value, block.arguments[unchanged[value]])
    return [value for value in captured if value not in unchanged]


def _forward(loop: ir.Operation) -> None:
    """Constrain what the body of a loop returns as it came."""
    block = loop.regions[1].blocks[0]
    end = block.operations[len(block.operations) - 1].operation
    for number, sharding in enumerate(sdy.TensorShardingPerValueAttr(loop.attributes[SHARDING]).shardings):
        argument = block.arguments[number]
        if end.operands[number] == argument:
            with ir.InsertionPoint(end):
                end.operands[number] = ir.Operation.create(
                    "sdy.sharding_constraint", [argument.type], [argument], {"sharding": sharding}, loc=loop.location
                ).results[0]
