"""Halo exchange: devices send the rows at the ends of their shards to their neighbours, whose windows read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, scalar_i32, splat
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.local_op import LocalOp


def halos_of_operand(local: LocalOp, operand: int) -> list[tuple[Halo, tuple[str, ...]]]:
    """The halos of the sharded dims of an operand, each with the axes that shard its dim."""
    found = list[tuple[Halo, tuple[str, ...]]]()
    for halo in local.rule.halos:
        axes = local.axes_of.get(local.rule.factor_of(halo), ())
        if halo.operand == operand and local.devices.group_size(axes) > 1:
            found.append((halo, axes))
    return found


def read_rows(local: LocalOp, operand: int, fill: ir.Value | None = None) -> ir.Value:
    """What a device's windows read of an operand: `Halo.span` rows of each sharded dim with windows.

    Args:
        local: the op.
        operand: the number of what is read.
        fill: a scalar, what is beyond the ends of the dims; zeros by default.
    """
    value = local.operands[operand]
    for halo, axes in halos_of_operand(local, operand):
        if halo.fill is None:
            value = _read_along(local, value, halo, axes, fill)
        else:
            key = "rows", value, axes, *halo.read_key(local.devices.group_size(axes))
            value = local.collectives.once(key, partial(_read_along, local, value, halo, axes, fill))
    return value


def _read_along(local: LocalOp, value: ir.Value, halo: Halo, axes: tuple[str, ...], fill: ir.Value | None) -> ir.Value:
    """Three steps: the shard with the halos beside it; what is beyond the dim, at its ends; the rows that are read."""
    parts = local.devices.group_size(axes)
    before, after = halo.before(parts), halo.after(parts)
    rows = halo.rows(parts)
    pieces = [
        _from_neighbour(local, value, halo.dim, axes, rows[0], -1, fill if before[0] > 0 else None),
        value,
        _from_neighbour(local, value, halo.dim, axes, rows[1], 1, fill if after[-1] > 0 else None),
    ]
    value = _concatenated([piece for piece in pieces if piece is not None], halo.dim)
    if fill is None:
        fill = splat(ir.RankedTensorType.get([], ir.RankedTensorType(value.type).element_type), 0)
    value = _padded(value, halo.dim, max(before) - rows[0], max(after) - rows[1], fill)
    # Device i skips max(before) - before[i] rows, which grows or shrinks evenly from shard to shard.
    skipped = max(before) - before[0]
    step = before[0] - before[1]
    if step == 0:
        return value
    start = binary("stablehlo.multiply", local.devices.index(axes), splat(scalar_i32(), step))
    start = binary("stablehlo.add", start, splat(scalar_i32(), skipped))
    return _rows_from(value, halo.dim, start, halo.span(parts))


def _from_neighbour(
    local: LocalOp, value: ir.Value, dim: int, axes: tuple[str, ...], rows: int, side: int, fill: ir.Value | None
) -> ir.Value | None:
    """The last rows of the shard before a device's own, or the first ones of that behind it; None for no rows.

    Args:
        local, value, dim, axes: the shards.
        rows: how many.
        side: -1 for the shard before, 1 for that behind.
        fill: what a device without a neighbour there gets; zeros by default.
    """
    if rows == 0:
        return None
    key = "halo", value, dim, axes, rows, side
    piece = local.collectives.once(key, partial(_sent, local, value, dim, axes, rows, side))
    if fill is None:
        return piece
    end = splat(scalar_i32(), 0 if side < 0 else local.devices.group_size(axes) - 1)
    is_end = ir.Operation.create(
        "stablehlo.compare",
        results=[ir.RankedTensorType.get([], ir.IntegerType.get_signless(1))],
        operands=[local.devices.index(axes), end],
        attributes={"comparison_direction": ir.Attribute.parse("#stablehlo<comparison_direction EQ>")},
    ).results[0]
    return _one("stablehlo.select", piece.type, [is_end, _spread(fill, piece.type), piece])


def _sent(local: LocalOp, value: ir.Value, dim: int, axes: Sequence[str], rows: int, side: int) -> ir.Value:
    """The rows, sent along; zeros for a device without a neighbour."""
    first = ir.RankedTensorType(value.type).shape[dim] - rows if side < 0 else 0
    groups = local.devices.groups(axes).tolist()
    count = len(groups[0])
    sources = {
        group[place]: group[place + side] for group in groups for place in range(count) if 0 <= place + side < count
    }
    return local.collectives.permute(_sliced(value, dim, first, first + rows), sources)


def _spread(scalar: ir.Value, type_: ir.Type) -> ir.Value:
    none = ir.DenseI64ArrayAttr.get([])
    return _one("stablehlo.broadcast_in_dim", type_, [scalar], {"broadcast_dimensions": none})


def _sliced(value: ir.Value, dim: int, first: int, last: int) -> ir.Value:
    shape = list(ir.RankedTensorType(value.type).shape)
    starts, limits = [0] * len(shape), list(shape)
    starts[dim], limits[dim] = first, last
    attributes = {
        "start_indices": ir.DenseI64ArrayAttr.get(starts),
        "limit_indices": ir.DenseI64ArrayAttr.get(limits),
        "strides": ir.DenseI64ArrayAttr.get([1] * len(shape)),
    }
    return _one("stablehlo.slice", _with_rows(value, dim, last - first), [value], attributes)


def _concatenated(pieces: Sequence[ir.Value], dim: int) -> ir.Value:
    if len(pieces) == 1:
        return pieces[0]
    rows = sum(ir.RankedTensorType(piece.type).shape[dim] for piece in pieces)
    number = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), dim)
    return _one("stablehlo.concatenate", _with_rows(pieces[0], dim, rows), list(pieces), {"dimension": number})


def _padded(value: ir.Value, dim: int, low: int, high: int, fill: ir.Value) -> ir.Value:
    """More rows at the ends, or fewer."""
    if low == high == 0:
        return value
    rank = ir.RankedTensorType(value.type).rank
    rows = low + ir.RankedTensorType(value.type).shape[dim] + high

    def along(number: int) -> ir.Attribute:
        return ir.DenseI64ArrayAttr.get([number if at == dim else 0 for at in range(rank)])

    attributes = {"edge_padding_low": along(low), "edge_padding_high": along(high), "interior_padding": along(0)}
    return _one("stablehlo.pad", _with_rows(value, dim, rows), [value, fill], attributes)


def _rows_from(value: ir.Value, dim: int, start: ir.Value, rows: int) -> ir.Value:
    piece = _with_rows(value, dim, rows)
    starts = [start if at == dim else splat(scalar_i32(), 0) for at in range(piece.rank)]
    sizes = {"slice_sizes": ir.DenseI64ArrayAttr.get(piece.shape)}
    return _one("stablehlo.dynamic_slice", piece, [value, *starts], sizes)


def _with_rows(value: ir.Value, dim: int, rows: int) -> ir.RankedTensorType:
    tensor = ir.RankedTensorType(value.type)
    return ir.RankedTensorType.get([*tensor.shape[:dim], rows, *tensor.shape[dim + 1 :]], tensor.element_type)


def _one(
    name: str, type_: ir.Type, operands: Sequence[ir.Value], attributes: Mapping[str, ir.Attribute] | None = None
) -> ir.Value:
    return ir.Operation.create(name, results=[type_], operands=operands, attributes=dict(attributes or {})).results[0]
