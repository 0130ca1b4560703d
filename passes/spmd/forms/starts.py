"""Start indices: rows of a whole dim that become rows of a device's shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def from_its_device(local: LocalOp, value: ir.Value, own: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """What one device of each group has, for all of them: the sum of bits, taken for integers, that are zeros on the others.

    Sums of floats would not do: XLA's for CPUs give 0.0 where all devices add -0.0 (seen in jaxlib 0.10.2).

    Args:
        local: the op, whose only result it is.
        value: what this device has of it.
        own: of integers in the value's shape those that are this device's to give, and zeros elsewhere; perhaps in another
            shape.
    """
    element = ir.RankedTensorType(value.type).element_type
    if isinstance(element, ir.ComplexType):
        halves = [_with_element(f"stablehlo.{name}", value, element.element_type) for name in ("real", "imag")]
        parts = [from_its_device(local, half, own) for half in halves]
        type_ = ir.RankedTensorType.get(ir.RankedTensorType(parts[0].type).shape, element)
        return ir.Operation.create("stablehlo.complex", results=[type_], operands=parts).results[0]
    if str(element) == "i1":
        return converted(local.add_up(own(converted(value, ir.IntegerType.get_unsigned(8)))), element)
    if isinstance(element, ir.FloatType):
        bits = _with_element("stablehlo.bitcast_convert", value, ir.IntegerType.get_signless(element.width))
        return _with_element("stablehlo.bitcast_convert", local.add_up(own(bits)), element)
    return local.add_up(own(value))


def _with_element(name: str, value: ir.Value, element: ir.Type) -> ir.Value:
    type_ = ir.RankedTensorType.get(ir.RankedTensorType(value.type).shape, element)
    return ir.Operation.create(name, results=[type_], operands=[value]).results[0]
