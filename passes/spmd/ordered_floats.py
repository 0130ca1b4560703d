"""Floats as integers of the same order: XLA's all-reduces of maxima and minima lose NaN, and tell no zeros apart.

The bits of a float, taken for a signed integer, are in the floats' order where the sign is not set, and in the opposite
one where it is: there all other bits are flipped. NaN is put above all for a maximum, below all for a minimum.
"""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary, splat


def to_ordered(value: ir.Value, fold: str) -> ir.Value:
    """Integers whose maximum or minimum is that of floats.

    Args:
        value: of floats.
        fold: ``stablehlo.maximum`` or ``stablehlo.minimum``.
    """
    tensor = ir.RankedTensorType(value.type)
    width = ir.FloatType(tensor.element_type).width
    integers = ir.RankedTensorType.get(tensor.shape, ir.IntegerType.get_signless(width))
    bits = _flipped(_bits(value, integers), width)
    end = (1 << width - 1) - 1 if fold == "stablehlo.maximum" else -(1 << width - 1)
    return ir.Operation.create(
        "stablehlo.select", results=[integers], operands=[_is_nan(value), splat(integers, end), bits]
    ).results[0]


def from_ordered(value: ir.Value, type_: ir.Type) -> ir.Value:
    """The inverse of `to_ordered`.

    Args:
        value: of integers.
        type_: of the floats.
    """
    return _bits(_flipped(value, ir.FloatType(ir.RankedTensorType(type_).element_type).width), type_)


def _flipped(bits: ir.Value, width: int) -> ir.Value:
    """Where the sign is set, all bits but the sign the other way round: its own inverse."""
    negative = binary("stablehlo.shift_right_arithmetic", bits, splat(bits.type, width - 1))
    others = binary("stablehlo.and", negative, splat(bits.type, (1 << width - 1) - 1))
    return binary("stablehlo.xor", bits, others)


def _bits(value: ir.Value, type_: ir.Type) -> ir.Value:
    return ir.Operation.create("stablehlo.bitcast_convert", results=[type_], operands=[value]).results[0]


def _is_nan(value: ir.Value) -> ir.Value:
    flags = ir.RankedTensorType.get(ir.RankedTensorType(value.type).shape, ir.IntegerType.get_signless(1))
    differs = ir.Attribute.parse("#stablehlo<comparison_direction NE>")
    return ir.Operation.create(
        "stablehlo.compare", results=[flags], operands=[value, value], attributes={"comparison_direction": differs}
    ).results[0]
