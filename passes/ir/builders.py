"""Small ops that several passes write. All go to the current insertion point and take the current location."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxlib.mlir import ir

Attributes = Mapping[str, ir.Attribute]


def splat(type_: ir.Type, value: int, attributes: Attributes | None = None) -> ir.Value:
    """A constant with ``value`` in every element; ``type_`` is of floats, integers, booleans or complex numbers."""
    tensor = ir.RankedTensorType(type_)
    element = tensor.element_type
    if isinstance(element, ir.ComplexType):  # whose constants the bindings can't make
        part = ir.RankedTensorType.get(tensor.shape, element.element_type)
        real, imaginary = splat(part, value, attributes), splat(part, 0, attributes)
        return _one("stablehlo.complex", tensor, [real, imaginary], attributes)
    is_float = isinstance(element, ir.FloatType)
    number = ir.FloatAttr.get(element, float(value)) if is_float else ir.IntegerAttr.get(element, value)
    elements: ir.Attribute = ir.DenseElementsAttr.get_splat(tensor, number)
    return _one("stablehlo.constant", tensor, [], {"value": elements, **(attributes or {})})


def identity_of(fold: str, type_: ir.Type) -> ir.Value:
    """A constant that changes nothing when ``fold``, an op of two operands, takes it."""
    element = ir.RankedTensorType(type_).element_type
    if fold == "stablehlo.add" and isinstance(element, ir.FloatType):  # -0.0 + 0.0 is 0.0, so 0.0 changes something
        zero: ir.Attribute = ir.DenseElementsAttr.get_splat(ir.RankedTensorType(type_), ir.FloatAttr.get(element, -0.0))
        return _one("stablehlo.constant", type_, [], {"value": zero})
    if fold in ("stablehlo.add", "stablehlo.or", "stablehlo.xor"):
        return splat(type_, 0)
    if fold == "stablehlo.multiply":
        return splat(type_, 1)
    if isinstance(element, ir.FloatType):
        limit: ir.Attribute = ir.FloatAttr.get(element, -math.inf if fold == "stablehlo.maximum" else math.inf)
    else:
        bits, is_signed = (
            ir.IntegerType(element).width,
            not ir.IntegerType(element).is_unsigned and str(element) != "i1",
        )
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
        limit = ir.IntegerAttr.get(element, {"stablehlo.maximum": low, "stablehlo.minimum": high}.get(fold, -1))
    elements: ir.Attribute = ir.DenseElementsAttr.get_splat(ir.RankedTensorType(type_), limit)
    return _one("stablehlo.constant", type_, [], {"value": elements})


def scalar_i32() -> ir.Type:
    """``tensor<i32>``."""
    return ir.RankedTensorType.get([], ir.IntegerType.get_signless(32))


def binary(name: str, left: ir.Value, right: ir.Value, attributes: Attributes | None = None) -> ir.Value:
    """An op of two operands whose result has the type of the first."""
    return _one(name, left.type, [left, right], attributes)


def less(left: ir.Value, right: ir.Value) -> ir.Value:
    """``left < right`` for scalars."""
    direction = ir.Attribute.parse("#stablehlo<comparison_direction LT>")
    flag = ir.RankedTensorType.get([], ir.IntegerType.get_signless(1))
    return _one("stablehlo.compare", flag, [left, right], {"comparison_direction": direction})


def rows_from(whole: ir.Value, start: ir.Value, piece: ir.Type) -> ir.Value:
    """The part of ``whole`` that begins at row ``start`` (``tensor<i32>``) and has type ``piece``."""
    shape = ir.RankedTensorType(piece).shape
    zero = [splat(start.type, 0)] * (len(shape) - 1) if len(shape) > 1 else []
    sizes: dict[str, ir.Attribute] = {"slice_sizes": ir.DenseI64ArrayAttr.get(shape)}
    return _one("stablehlo.dynamic_slice", piece, [whole, start, *zero], sizes)


def _one(name: str, type_: ir.Type, operands: list[ir.Value], attributes: Attributes | None) -> ir.Value:
    return ir.Operation.create(name, results=[type_], operands=operands, attributes=dict(attributes or {})).results[0]
