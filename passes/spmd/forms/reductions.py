"""Reductions, folded over devices where a reduced dim is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, identity_of
from bactrian.passes.ir.constants import splat_text
from bactrian.passes.ir.op_traits import ASSOCIATIVE
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Combining, Rule

IDEMPOTENT = frozenset({"stablehlo.maximum", "stablehlo.minimum", "stablehlo.and", "stablehlo.or"})


def narrow_reduction(op: ir.Operation, rule: Rule) -> Rule:
    """What devices do with their results: see `reduction`."""
    return replace(rule, combining=combining_of(op))


def combining_of(op: ir.Operation) -> Combining:
    """How devices combine the results of an op with a region that folds two values."""
    fold, element = fold_of(op.regions[0]), ir.RankedTensorType(op.results[0].type).element_type
    if fold is None or len(op.results) > 1 or not _has_all_reduce(fold, element):
        return Combining.GATHER
    return Combining.SUM if fold == "stablehlo.add" else Combining.FOLD


def reduction(local: LocalOp) -> Sequence[ir.Value]:
    """Each device reduces its shard. Then sums are added up; maxima and the like are folded; of everything else devices
    gather the others' results, and reduce them again."""
    made = local.clone()
    if not local.reduced:
        return made
    fold = fold_of(local.op.regions[0])
    if fold is None or len(made) > 1:
        return _reduced_again(local, made)
    (value,) = made
    initial = local.operands[1]
    counts_once = fold in IDEMPOTENT or is_identity(local.op.operands[1], fold)
    if not counts_once:
        identity = identity_of(fold, initial.type)
        (value,) = local.clone([local.operands[0], identity])
    value = local.add_up(value) if fold == "stablehlo.add" else folded(local, value, fold)
    if not counts_once:
        shape = ir.RankedTensorType(value.type)
        spread = ir.Operation.create(
            "stablehlo.broadcast_in_dim",
            results=[shape],
            operands=[initial],
            attributes={"broadcast_dimensions": ir.DenseI64ArrayAttr.get([])},
        ).results[0]
        value = binary(fold, value, spread)
    return [value]


def folded(local: LocalOp, value: ir.Value, fold: str) -> ir.Value:
    """What the devices of the reduced axes hold, folded: by an all-reduce, where XLA has one for the type."""
    element = ir.RankedTensorType(value.type).element_type
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
