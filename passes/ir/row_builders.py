"""Ops on rows of one dim, all others whole. All go to the current insertion point and take the current location."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import scalar_i32, splat


def num_rows(value: ir.Value, dim: int) -> int:
    """The size of a dim."""
    return ir.RankedTensorType(value.type).shape[dim]


def rows_between(value: ir.Value, dim: int, first: int, last: int) -> ir.Value:
    """The rows from ``first`` up to ``last``."""
    shape = list(ir.RankedTensorType(value.type).shape)
    starts, limits = [0] * len(shape), list(shape)
    starts[dim], limits[dim] = first, last
    attributes = {
        "start_indices": ir.DenseI64ArrayAttr.get(starts),
        "limit_indices": ir.DenseI64ArrayAttr.get(limits),
        "strides": ir.DenseI64ArrayAttr.get([1] * len(shape)),
    }
    return _one("stablehlo.slice", value, dim, last - first, [value], attributes)


def rows_at(value: ir.Value, dim: int, start: ir.Value, count: int) -> ir.Value:
    """``count`` rows from ``start`` (``tensor<i32>``)."""
    rank = ir.RankedTensorType(value.type).rank
    starts = [start if at == dim else splat(scalar_i32(), 0) for at in range(rank)]
    shape = list(ir.RankedTensorType(value.type).shape)
    shape[dim] = count
    attributes = {"slice_sizes": ir.DenseI64ArrayAttr.get(shape)}
    return _one("stablehlo.dynamic_slice", value, dim, count, [value, *starts], attributes)


def concatenated(pieces: Sequence[ir.Value], dim: int) -> ir.Value:
    """One behind the other."""
    if len(pieces) == 1:
        return pieces[0]
    along = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), dim)
    count = sum(num_rows(piece, dim) for piece in pieces)
    return _one("stablehlo.concatenate", pieces[0], dim, count, pieces, {"dimension": along})


def padded(value: ir.Value, dim: int, low: int, high: int, fill: ir.Value) -> ir.Value:
    """More rows of ``fill``, a scalar, in front and behind; fewer rows where the numbers are negative."""
    if low == high == 0:
        return value
    rank = ir.RankedTensorType(value.type).rank

    def along(number: int) -> ir.Attribute:
        return ir.DenseI64ArrayAttr.get([number if at == dim else 0 for at in range(rank)])

    attributes = {"edge_padding_low": along(low), "edge_padding_high": along(high), "interior_padding": along(0)}
    return _one("stablehlo.pad", value, dim, low + num_rows(value, dim) + high, [value, fill], attributes)


def row_repeated(row: ir.Value, dim: int, count: int) -> ir.Value:
    """One row, ``count`` times."""
    dims = ir.DenseI64ArrayAttr.get(list(range(ir.RankedTensorType(row.type).rank)))
    return _one("stablehlo.broadcast_in_dim", row, dim, count, [row], {"broadcast_dimensions": dims})


def _one(
    name: str,
    like: ir.Value,
    dim: int,
    count: int,
    operands: Sequence[ir.Value],
    attributes: Mapping[str, ir.Attribute],
) -> ir.Value:
    """An op whose result is like another value, but for the rows of a dim."""
    tensor = ir.RankedTensorType(like.type)
    type_ = ir.RankedTensorType.get([*tensor.shape[:dim], count, *tensor.shape[dim + 1 :]], tensor.element_type)
    return ir.Operation.create(name, results=[type_], operands=operands, attributes=dict(attributes)).results[0]
