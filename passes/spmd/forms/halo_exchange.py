"""Halo exchange: devices send the rows at the ends of their shards to their neighbours, whose windows read them."""

from __future__ import annotations

from functools import partial

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, chosen, compared, scalar_i32, splat, spread
from bactrian.passes.ir.row_builders import concatenated, num_rows, padded, rows_at, rows_between
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.local_op import LocalOp

Axes = tuple[str, ...]


def halos_of_operand(local: LocalOp, operand: int) -> list[tuple[Halo, Axes]]:
    """The halos of the sharded dims of an operand, each with the axes that shard its dim."""
    found = list[tuple[Halo, Axes]]()
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


def is_at(local: LocalOp, axes: Axes, index: int) -> ir.Value:
    """Whether a device has the shard with this number along some axes: ``tensor<i1>``."""
    return compared(local.devices.index(axes), "EQ", splat(scalar_i32(), index))


def _read_along(local: LocalOp, value: ir.Value, halo: Halo, axes: Axes, fill: ir.Value | None) -> ir.Value:
    """Three steps: the shard with the halos beside it; what is beyond the dim, at its ends; the rows that are read."""
    parts = local.devices.group_size(axes)
    before, after = halo.before(parts), halo.after(parts)
    rows = halo.rows(parts)
    pieces = [value]
    if rows[0]:
        pieces.insert(0, _from_neighbour(local, value, halo.dim, axes, rows[0], -1, fill if before[0] > 0 else None))
    if rows[1]:
        pieces.append(_from_neighbour(local, value, halo.dim, axes, rows[1], 1, fill if after[-1] > 0 else None))
    value = concatenated(pieces, halo.dim)
    if fill is None:
        fill = splat(ir.RankedTensorType.get([], ir.RankedTensorType(value.type).element_type), 0)
    value = padded(value, halo.dim, max(before) - rows[0], max(after) - rows[1], fill)
    # Device i skips max(before) - before[i] rows, which grows or shrinks evenly from shard to shard.
    step = before[0] - before[1]
    if step == 0:
        return value
    start = binary("stablehlo.multiply", local.devices.index(axes), splat(scalar_i32(), step))
    start = binary("stablehlo.add", start, splat(scalar_i32(), max(before) - before[0]))
    return rows_at(value, halo.dim, start, halo.span(parts))


def _from_neighbour(
    local: LocalOp, value: ir.Value, dim: int, axes: Axes, rows: int, side: int, fill: ir.Value | None
) -> ir.Value:
    """The last rows of the shard before a device's own, or the first ones of that behind it.

    Args:
        local, value, dim, axes: the shards.
        rows: how many.
        side: -1 for the shard before, 1 for that behind.
        fill: what a device without a neighbour there gets; zeros by default.
    """
    key = "halo", value, dim, axes, rows, side
    piece = local.collectives.once(key, partial(_sent, local, value, dim, axes, rows, side))
    if fill is None:
        return piece
    end = is_at(local, axes, 0 if side < 0 else local.devices.group_size(axes) - 1)
    return chosen(end, spread(fill, piece.type), piece)


def _sent(local: LocalOp, value: ir.Value, dim: int, axes: Axes, rows: int, side: int) -> ir.Value:
    """The rows, sent along; zeros for a device without a neighbour."""
    first = num_rows(value, dim) - rows if side < 0 else 0
    groups = local.devices.groups(axes).tolist()
    count = len(groups[0])
    sources = {
        group[place]: group[place + side] for group in groups for place in range(count) if 0 <= place + side < count
    }
    return local.collectives.permute(rows_between(value, dim, first, first + rows), sources)
