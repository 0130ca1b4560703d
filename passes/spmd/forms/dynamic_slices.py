"""Slices and updates whose place is known only at run time: it is clamped to the whole dim, then found in the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, chosen, compared, splat, spread
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.bit_sums import sum_of_bits
from bactrian.passes.spmd.forms.starts import row_of_shard, widened, within
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Rule


def narrow_dynamic_slice(op: ir.Operation, rule: Rule) -> Rule:
    """A sharded dim of which a part is read is a sum over devices: each adds the rows that it has."""
    sizes, replicated, reduction = list(rule.sizes), set(rule.replicated), set(rule.reduction)
    (result,) = rule.results
    made = list(result)
    for dim, (whole, part) in enumerate(zip(value_shape(op.operands[0]), value_shape(op.results[0]), strict=True)):
        if part == whole:
            continue
        reduction |= set(rule.operands[0][dim])
        replicated -= set(rule.operands[0][dim])
        replicated.add(len(sizes))
        made[dim] = (len(sizes),)
        sizes.append(part)
    return replace(
        rule,
        sizes=tuple(sizes),
        results=(tuple(made),),
        reduction=frozenset(reduction),
        replicated=frozenset(replicated),
    )


def narrow_dynamic_update_slice(op: ir.Operation, rule: Rule) -> Rule:
    """Every device reads all rows that are written of a dim, where they are a part of it; the operand can be sharded along
    all dims."""
    operand, update = rule.operands[:2]
    shapes = zip(value_shape(op.operands[0]), value_shape(op.operands[1]), strict=True)
    parts = {factor for dim, (whole, part) in enumerate(shapes) if part != whole for factor in update[dim]}
    free = {factor for factors in operand for factor in factors} - parts
    return replace(rule, replicated=(rule.replicated | parts) - free, permuted=rule.permuted - parts - free)


@dataclass(frozen=True)
class _Window:
    """What a device's shard has to do with a window of a sharded dim, of which a part is read or written.

    Attributes:
        dim: of the operand.
        size: of the window.
        rows: that a shard can have of it at most.
        first: of these rows, where they begin in the shard: ``tensor<i32>`` or ``tensor<i64>``.
        ahead: how many rows behind ``first`` the window begins; negative where it begins in front of it.
    """

    dim: int
    size: int
    rows: int
    first: ir.Value
    ahead: ir.Value


def dynamic_slice(local: LocalOp) -> Sequence[ir.Value]:
    """Each device reads as many rows of its shard as may be wanted and moves them to their places in the result; the rows of
    others are zeros."""
    (type_,) = local.result_types()
    shape, starts = list(ir.RankedTensorType(type_).shape), _starts(local, local.operands[1:])
    windows = _windows(local, starts, value_shape(local.op.results[0]))
    if not windows:
        sizes: dict[str, ir.Attribute] = {"slice_sizes": ir.DenseI64ArrayAttr.get(shape)}
        return local.clone([local.operands[0], *starts], sizes)
    held = list(shape)
    for window in windows:
        held[window.dim], starts[window.dim] = window.rows, window.first
    value = _sliced(local.operands[0], starts, held)
    moves = {w.dim: binary("stablehlo.add", w.ahead, splat(w.ahead.type, w.size)) for w in windows}
    margins = {w.dim: w.size for w in windows}
    return [sum_of_bits(value, lambda bits: _moved(bits, margins, moves, shape), local.add_up)]


def dynamic_update_slice(local: LocalOp) -> Sequence[ir.Value]:
    """Each device writes the rows that fall into its shard over what it has there."""
    operand, update = local.operands[:2]
    starts = _starts(local, local.operands[2:])
    windows = _windows(local, starts, value_shape(local.op.operands[1]))
    if not windows:
        return local.clone([operand, update, *starts])
    shape = list(ir.RankedTensorType(update.type).shape)
    for window in windows:
        shape[window.dim], starts[window.dim] = window.rows, window.first
    there = _sliced(operand, starts, shape)
    moves = {w.dim: binary("stablehlo.subtract", splat(w.ahead.type, w.rows), w.ahead) for w in windows}
    update = _moved(update, {w.dim: w.rows for w in windows}, moves, shape)
    written = chosen(_are_written(windows, shape), update, there)
    return local.clone([operand, written, *starts])


def _starts(local: LocalOp, starts: Sequence[ir.Value]) -> list[ir.Value]:
    """Where the window begins, as signed integers, clamped to the whole dim: XLA makes one of a slice of a slice, and does
    not clamp the inner one then (jaxlib 0.10.2), as a shard may be one."""
    sizes = value_shape(local.op.results[0] if local.op.name == "stablehlo.dynamic_slice" else local.op.operands[1])
    whole = value_shape(local.op.operands[0])
    return [
        splat(start.type, 0) if size == dim else within(start, 0, dim - size)
        for size, dim, start in zip(sizes, whole, map(widened, starts), strict=True)
    ]


def _windows(local: LocalOp, starts: Sequence[ir.Value], sizes: Sequence[int]) -> list[_Window]:
    """Those of sharded dims that are not read or written as a whole.

    Args:
        local: the op.
        starts: for each dim of the operand, clamped.
        sizes: of the window.
    """
    found, whole = list[_Window](), value_shape(local.op.operands[0])
    for dim, (axes, size, start) in enumerate(zip(local.reads[0].dims, sizes, starts, strict=True)):
        if local.devices.group_size(axes) == 1 or size == whole[dim]:
            continue
        shard = value_shape(local.operands[0])[dim]
        rows = min(size, shard)
        begins = row_of_shard(local, start, axes, shard)
        first = within(begins, 0, shard - rows)
        found.append(_Window(dim, size, rows, first, binary("stablehlo.subtract", begins, first)))
    return found


def _moved(
    value: ir.Value, margins: Mapping[int, int], starts: Mapping[int, ir.Value], shape: Sequence[int]
) -> ir.Value:
    """A part of a value with zeros as margins around it; one that would reach beyond them lies in them.

    Args:
        value: from which.
        margins: on both sides, for some dims.
        starts: of the part, for the same dims.
        shape: of the part.
    """
    tensor = ir.RankedTensorType(value.type)
    scalar = ir.RankedTensorType.get([], tensor.element_type)
    around = [margins.get(dim, 0) for dim in range(tensor.rank)]
    wide = [size + 2 * margin for size, margin in zip(tensor.shape, around, strict=True)]
    padded = ir.Operation.create(
        "stablehlo.pad",
        results=[ir.RankedTensorType.get(wide, tensor.element_type)],
        operands=[value, splat(scalar, 0)],
        attributes={
            "edge_padding_low": ir.DenseI64ArrayAttr.get(around),
            "edge_padding_high": ir.DenseI64ArrayAttr.get(around),
            "interior_padding": ir.DenseI64ArrayAttr.get([0] * tensor.rank),
        },
    ).results[0]
    zero = splat(next(iter(starts.values())).type, 0)
    places = [within(starts[dim], 0, wide[dim] - shape[dim]) if dim in starts else zero for dim in range(tensor.rank)]
    return _sliced(padded, places, shape)


def _are_written(windows: Sequence[_Window], shape: Sequence[int]) -> ir.Value:
    """Which of the held rows are in the window."""
    flags = list[ir.Value]()
    for window in windows:
        element = ir.RankedTensorType(window.ahead.type).element_type
        numbers = ir.RankedTensorType.get(shape, element)
        attributes: dict[str, ir.Attribute] = {
            "iota_dimension": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), window.dim)
        }
        rows = ir.Operation.create("stablehlo.iota", results=[numbers], attributes=attributes).results[0]
        rows = binary("stablehlo.subtract", rows, spread(window.ahead, numbers))
        flags += [compared(rows, "GE", splat(numbers, 0)), compared(rows, "LT", splat(numbers, window.size))]
    return reduce(lambda one, other: binary("stablehlo.and", one, other), flags)


def _sliced(value: ir.Value, starts: Sequence[ir.Value], shape: Sequence[int]) -> ir.Value:
    element = ir.RankedTensorType(value.type).element_type
    return ir.Operation.create(
        "stablehlo.dynamic_slice",
        results=[ir.RankedTensorType.get(shape, element)],
        operands=[value, *starts],
        attributes={"slice_sizes": ir.DenseI64ArrayAttr.get(shape)},
    ).results[0]
