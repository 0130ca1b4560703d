"""Reading constants."""

from __future__ import annotations

from jaxlib.mlir import ir


def splat_of(value: ir.Value) -> ir.Attribute | None:
    """The one number that all elements of a constant are, if it is one; spread over more dims or not."""
    attribute = _elements(value)
    if attribute is None or isinstance(ir.RankedTensorType(value.type).element_type, ir.ComplexType):
        return None  # the bindings can't read complex elements
    elements = ir.DenseElementsAttr(attribute)
    return elements.get_splat_value() if elements.is_splat else None


def splat_text(value: ir.Value) -> str | None:
    """The same as MLIR prints it: ``1.000000e+00``, ``true``, ``(0.0, 1.0)`` of a complex number, or ``0xFF800000``."""
    attribute = _elements(value)
    return None if attribute is None else element_text(attribute)


def element_text(elements: ir.Attribute) -> str | None:
    """The text of the one number that all elements of a constant are, if it is one."""
    number = str(elements).removeprefix("dense<").partition("> : ")[0]
    return None if number.startswith(("[", '"')) or not number else number


def _elements(value: ir.Value) -> ir.Attribute | None:
    owner = value.owner
    while not isinstance(owner, ir.Block) and owner.operation.name == "stablehlo.broadcast_in_dim":
        owner = owner.operation.operands[0].owner
    if isinstance(owner, ir.Block) or owner.operation.name != "stablehlo.constant":
        return None
    return owner.operation.attributes["value"]
