"""Shapes and bytes of values."""

from __future__ import annotations

import math

from jaxlib.mlir import ir


def value_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a tensor; of anything else that of a scalar."""
    return tuple(value.type.shape) if isinstance(value.type, ir.RankedTensorType) else ()


def value_bytes(value: ir.Value) -> int:
    """Bytes of a statically shaped tensor value; sub-byte integers count one byte an element."""
    return type_bytes(value.type)


def type_bytes(type_: ir.Type) -> int:
    """Bytes of a statically shaped tensor type (0 for tokens and other non-tensors)."""
    if not isinstance(type_, ir.RankedTensorType):
        return 0
    element = type_.element_type
    if isinstance(element, ir.ComplexType):
        width = 2 * getattr(element.element_type, "width", 8)
    else:
        width = getattr(element, "width", 8)
    return math.prod(type_.shape) * max(1, width // 8)
