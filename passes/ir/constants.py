"""Reading constants."""

from __future__ import annotations

from jaxlib.mlir import ir


def splat_of(value: ir.Value) -> ir.Attribute | None:
    """The one number that all elements of a constant are, if it is one; spread over more dims or not."""
    owner = value.owner
    while not isinstance(owner, ir.Block) and owner.operation.name == "stablehlo.broadcast_in_dim":
        owner = owner.operation.operands[0].owner
    if isinstance(owner, ir.Block) or owner.operation.name != "stablehlo.constant":
        return None
    elements = ir.DenseElementsAttr(owner.operation.attributes["value"])
    return elements.get_splat_value() if elements.is_splat else None
