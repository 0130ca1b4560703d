"""Reductions, folded over devices where a reduced dim is sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, identity_of, splat
from bactrian.passes.ir.constants import splat_text
from bactrian.passes.ir.op_traits import ASSOCIATIVE
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.ordered_floats import from_ordered, to_ordered
from bactrian.passes.spmd.sharding_rules import Combining, Rule

_EXTREMES = frozenset({"stablehlo.maximum", "stablehlo.minimum"})
IDEMPOTENT = _EXTREMES | {"stablehlo.and", "stablehlo.or"}


def narrow_reduction(op: ir.Operation, rule: Rule) -> Rule:
    """How devices combine their results. Reduced dims are whole where the fold is neither one op nor picks one of what it
    is given: then it may matter how often the initial value is folded in."""
    region = op.regions[0]
    if fold_of(region) is None and not _picks(region):
        return replace(rule, replicated=rule.replicated | rule.reduction)
    return replace(rule, combining=combining_of(op))


def combining_of(op: ir.Operation) -> Combining:
    """How devices combine the results of an op with a region that folds two values."""
    fold, element = fold_of(op.regions[0]), ir.RankedTensorType(op.results[0].type).element_type
    if fold is None or len(op.results) > 1 or not _has_all_reduce(fold, element):
        return Combining.GATHER
    return Combining.SUM if fold == "stablehlo.add" else Combining.FOLD


def reduction(local: LocalOp) -> Sequence[ir.Value]:
    """Each device reduces its shard. Then sums are added up, maxima and the like are folded, and of what picks one of
    several tuples devices gather the others' results, and reduce them again."""
    if not local.reduced:
        return local.clone()
    fold = fold_of(local.op.regions[0])
    if fold is None:
        return _reduced_again(local, local.clone())
    initial = local.operands[1]
    if _counts_once(local, fold):
        (value,) = local.clone()
        return [over_devices(local, value, fold)]
    (value,) = local.clone([local.operands[0], identity_of(fold, initial.type)])
    return [_folded_in(local, over_devices(local, value, fold), initial, fold)]


def _picks(region: ir.Region) -> bool:
    """Whether each value that a region returns is one of the two at its position, as those of an argmax are."""
    block = region.blocks[0]
    arguments = list(block.arguments)
    half = len(arguments) // 2
    for number, value in enumerate(block.operations[len(block.operations) - 1].operands):
        owner = value.owner
        if isinstance(owner, ir.Block) or owner.operation.name != "stablehlo.select":
            return False
        picked = list(owner.operation.operands)[1:]
        pair = [arguments[number], arguments[number + half]]
        if picked not in (pair, pair[::-1]):
            return False
    return True


def _counts_once(local: LocalOp, fold: str) -> bool:
    """Whether it changes nothing that each device folds in the initial value. XLA leaves it out where a device reduces
    one element."""
    dims = ir.DenseI64ArrayAttr(local.op.attributes["dimensions"])
    shape = ir.RankedTensorType(local.operands[0].type).shape
    if math.prod(shape[dim] for dim in dims) == 1:
        return False
    return fold in IDEMPOTENT or is_identity(local.op.operands[1], fold)


def over_devices(local: LocalOp, value: ir.Value, fold: str) -> ir.Value:
    """What the devices of the reduced axes hold, folded in the way that the rule says."""
    return local.add_up(value) if local.rule.combining is Combining.SUM else folded(local, value, fold)


def _folded_in(local: LocalOp, value: ir.Value, initial: ir.Value, fold: str) -> ir.Value:
    """The initial value folded in: once, also where the result stays unreduced."""
    if local.makes[0].unreduced:
        flag = ir.RankedTensorType.get([], ir.IntegerType.get_signless(1))
        index = local.devices.index(local.reduced)
        is_first = ir.Operation.create(
            "stablehlo.compare",
            results=[flag],
            operands=[index, splat(index.type, 0)],
            attributes={"comparison_direction": ir.Attribute.parse("#stablehlo<comparison_direction EQ>")},
        ).results[0]
        initial = ir.Operation.create(
            "stablehlo.select", results=[initial.type], operands=[is_first, initial, identity_of(fold, initial.type)]
        ).results[0]
    spread = ir.Operation.create(
        "stablehlo.broadcast_in_dim",
        results=[value.type],
        operands=[initial],
        attributes={"broadcast_dimensions": ir.DenseI64ArrayAttr.get([])},
    ).results[0]
    return binary(fold, value, spread)


def folded(local: LocalOp, value: ir.Value, fold: str) -> ir.Value:
    """What the devices of the reduced axes hold, folded: by an all-reduce, where XLA has one for the type."""
    element = ir.RankedTensorType(value.type).element_type
    if fold in _EXTREMES and isinstance(element, ir.FloatType):
        return from_ordered(local.collectives.all_reduce(to_ordered(value, fold), local.reduced, fold), value.type)
    if _has_all_reduce(fold, element):
        return local.collectives.all_reduce(value, local.reduced, fold)
    gathered = _rows(local, value)
    scalar = ir.RankedTensorType.get([], element)
    op = ir.Operation.create(
        "stablehlo.reduce",
        results=[value.type],
        operands=[gathered, identity_of(fold, scalar)],
        attributes={"dimensions": ir.DenseI64ArrayAttr.get([0])},
        regions=1,
    )
    block = op.regions[0].blocks.append(scalar, scalar, arg_locs=[op.location] * 2)
    with ir.InsertionPoint(block):
        ir.Operation.create("stablehlo.return", operands=[binary(fold, *block.arguments)])
    return op.results[0]


def fold_of(region: ir.Region) -> str | None:
    """The op that a region folds two values with, if it is one op that may be done in any order."""
    block = region.blocks[0]
    inside = [view.operation for view in block.operations]
    if len(inside) != 2 or inside[0].name not in ASSOCIATIVE or len(block.arguments) != 2:
        return None
    reads, returned = list(inside[0].operands), list(inside[1].operands)
    both = reads in (list(block.arguments), list(block.arguments)[::-1])
    return inside[0].name if both and returned == [inside[0].results[0]] else None


def is_identity(value: ir.Value, fold: str) -> bool:
    """Whether a value is a constant that changes nothing when it is folded in."""
    wanted = {"stablehlo.add": 0, "stablehlo.multiply": 1, "stablehlo.xor": 0}.get(fold)
    number = splat_text(value)
    if wanted is None or number is None:
        return False
    if number.startswith("("):  # complex
        real, imaginary = (float(part) for part in number.strip("()").split(","))
        return (real, imaginary) == (wanted, 0)
    return number == ("true" if wanted else "false") or (_is_number(number) and float(number) == wanted)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:  # bits, as in 0x7FC00000
        return False
    return True


def _has_all_reduce(fold: str, element: ir.Type) -> bool:
    """XLA has no all-reduce for bits of integers, and none for products of complex numbers."""
    if fold in ("stablehlo.and", "stablehlo.or"):
        return str(element) == "i1"
    if fold == "stablehlo.xor":
        return False
    return isinstance(element, ir.FloatType) or (isinstance(element, ir.IntegerType) and str(element) != "i1")


def _reduced_again(local: LocalOp, made: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The reduction once more, over the devices' results."""
    rows = [_rows(local, value) for value in made]
    initial = local.operands[len(local.operands) // 2 :]
    return local.clone([*rows, *initial], {"dimensions": ir.DenseI64ArrayAttr.get([0])})


def _rows(local: LocalOp, value: ir.Value) -> ir.Value:
    """The values of all devices of the reduced axes, one behind the other along a new dim in front."""
    tensor = ir.RankedTensorType(value.type)
    row = ir.RankedTensorType.get([1, *tensor.shape], tensor.element_type)
    value = ir.Operation.create("stablehlo.reshape", results=[row], operands=[value]).results[0]
    return local.collectives.all_gather(value, 0, local.reduced)
