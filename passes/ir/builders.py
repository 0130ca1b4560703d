"""Small ops that several passes write. All go to the current insertion point and take the current location."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxlib.mlir import ir

Attributes = Mapping[str, ir.Attribute]


def splat(type_: ir.Type, value: float, attributes: Attributes | None = None) -> ir.Value:
    """A constant with ``value`` in every element; ``type_`` is of floats, integers, booleans or complex numbers."""
    tensor = ir.RankedTensorType(type_)
    element = tensor.element_type
    if isinstance(element, ir.ComplexType):  # whose constants the bindings can't make
        part = ir.RankedTensorType.get(tensor.shape, element.element_type)
        real, imaginary = splat(part, value, attributes), splat(part, 0, attributes)
        return _one("stablehlo.complex", tensor, [real, imaginary], attributes)
    is_float = isinstance(element, ir.FloatType)
    number = ir.FloatAttr.get(element, float(value)) if is_float else ir.IntegerAttr.get(element, int(value))
    elements: ir.Attribute = ir.DenseElementsAttr.get_splat(tensor, number)
    return _one("stablehlo.constant", tensor, [], {"value": elements, **(attributes or {})})


def identity_of(fold: str, type_: ir.Type) -> ir.Value:
    """A constant that changes nothing when ``fold``, an op of two operands, takes it."""
    element = ir.RankedTensorType(type_).element_type
    if fold == "stablehlo.add":
        return splat(type_, -0.0)  # of floats 0.0 isn't one: it makes 0.0 of -0.0
    if fold in ("stablehlo.or", "stablehlo.xor"):
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


def empty_sum(type_: ir.Type) -> ir.Value:
    """A constant that changes nothing when it is added: of floats ``-0.0``, since ``0.0 + -0.0`` is ``0.0``."""
    tensor = ir.RankedTensorType(type_)
    element = tensor.element_type
    if isinstance(element, ir.ComplexType):
        part = empty_sum(ir.RankedTensorType.get(tensor.shape, element.element_type))
        return _one("stablehlo.complex", tensor, [part, part], None)
    if not isinstance(element, ir.FloatType):
        return splat(tensor, 0)
    elements: ir.Attribute = ir.DenseElementsAttr.get_splat(tensor, ir.FloatAttr.get(element, -0.0))
    return _one("stablehlo.constant", tensor, [], {"value": elements})


def scalar_i32() -> ir.Type:
    """``tensor<i32>``."""
    return ir.RankedTensorType.get([], ir.IntegerType.get_signless(32))


def binary(name: str, left: ir.Value, right: ir.Value, attributes: Attributes | None = None) -> ir.Value:
    """An op of two operands whose result has the type of the first."""
    return _one(name, left.type, [left, right], attributes)


def converted(value: ir.Value, element: ir.Type) -> ir.Value:
    """The value with elements of another type."""
    tensor = ir.RankedTensorType(value.type)
    if tensor.element_type == element:
        return value
    return _one("stablehlo.convert", ir.RankedTensorType.get(tensor.shape, element), [value], None)


def spread(value: ir.Value, type_: ir.Type, dims: Sequence[int] = ()) -> ir.Value:
    """The value repeated along all dims of a type but ``dims``, which are its own."""
    return _one(
        "stablehlo.broadcast_in_dim", type_, [value], {"broadcast_dimensions": ir.DenseI64ArrayAttr.get(list(dims))}
    )


def compared(left: ir.Value, direction: str, right: ir.Value) -> ir.Value:
    """Where ``left`` is ``EQ``, ``NE``, ``GE``, ``GT``, ``LE``, ``LT`` than ``right``."""
    flags = ir.RankedTensorType.get(ir.RankedTensorType(left.type).shape, ir.IntegerType.get_signless(1))
    attribute = ir.Attribute.parse(f"#stablehlo<comparison_direction {direction}>")
    return _one("stablehlo.compare", flags, [left, right], {"comparison_direction": attribute})


def chosen(where: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    """``yes`` where the flags say so, ``no`` elsewhere."""
    return _one("stablehlo.select", yes.type, [where, yes, no], None)


def clamped(low: ir.Value, value: ir.Value, high: ir.Value) -> ir.Value:
    """The value, or the nearest between two scalars."""
    return _one("stablehlo.clamp", value.type, [low, value, high], None)


def less(left: ir.Value, right: ir.Value) -> ir.Value:
    """``left < right`` for scalars."""
    return compared(left, "LT", right)


def rows_from(whole: ir.Value, start: ir.Value, piece: ir.Type) -> ir.Value:
    """The part of ``whole`` that begins at row ``start`` (``tensor<i32>``) and has type ``piece``."""
    shape = ir.RankedTensorType(piece).shape
    zero = [splat(start.type, 0)] * (len(shape) - 1) if len(shape) > 1 else []
    sizes: dict[str, ir.Attribute] = {"slice_sizes": ir.DenseI64ArrayAttr.get(shape)}
    return _one("stablehlo.dynamic_slice", piece, [whole, start, *zero], sizes)


def reshaped(value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """A value with another shape of as many elements."""
    tensor = ir.RankedTensorType(value.type)
    if list(tensor.shape) == list(shape):
        return value
    return _one("stablehlo.reshape", ir.RankedTensorType.get(shape, tensor.element_type), [value], None)


def transposed(value: ir.Value, order: Sequence[int]) -> ir.Value:
    """A value whose dim ``i`` is its dim ``order[i]``."""
    tensor = ir.RankedTensorType(value.type)
    type_ = ir.RankedTensorType.get([tensor.shape[dim] for dim in order], tensor.element_type)
    return _one("stablehlo.transpose", type_, [value], {"permutation": ir.DenseI64ArrayAttr.get(order)})


def _one(name: str, type_: ir.Type, operands: list[ir.Value], attributes: Attributes | None) -> ir.Value:
    return ir.Operation.create(name, results=[type_], operands=operands, attributes=dict(attributes or {})).results[0]
