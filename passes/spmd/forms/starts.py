"""Start indices: rows of a whole dim that become rows of a device's shard."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, clamped, converted, splat, spread
from bactrian.passes.spmd.local_op import LocalOp

_LARGEST = (1 << 63) - 1


def widened(indices: ir.Value) -> ir.Value:
    """The same numbers as signed integers of 32 or 64 bits, in which rows can be subtracted. What is beyond 64 bits is beyond
    every dim."""
    element = ir.IntegerType(ir.RankedTensorType(indices.type).element_type)
    if element.is_unsigned and element.width == 64:
        scalar = ir.RankedTensorType.get([], element)
        indices = clamped(splat(scalar, 0), indices, splat(scalar, _LARGEST))
    bits = 32 if element.width < 32 or (element.width == 32 and not element.is_unsigned) else 64
    return converted(indices, ir.IntegerType.get_signless(bits))


def within(indices: ir.Value, first: int, last: int) -> ir.Value:
    """Indices, those below ``first`` or above ``last`` moved there."""
    scalar = ir.RankedTensorType.get([], ir.RankedTensorType(indices.type).element_type)
    return clamped(splat(scalar, first), indices, splat(scalar, last))


def row_of_shard(local: LocalOp, indices: ir.Value, axes: Sequence[str], rows: int) -> ir.Value:
    """Rows of a whole dim, counted from the first row of the device's shard.

    Args:
        local: the op.
        indices: small enough for the subtraction.
        axes: that shard the dim.
        rows: of a shard.
    """
    tensor = ir.RankedTensorType(indices.type)
    first = converted(local.first_row(axes, rows), tensor.element_type)
    return binary("stablehlo.subtract", indices, first if not tensor.shape else spread(first, tensor))
