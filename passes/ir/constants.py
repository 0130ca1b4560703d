"""Reading constants."""

from __future__ import annotations

from jaxlib.mlir import ir


def splat_of(value: ir.Value) -> ir.Attribute | None:
    """The one number that all elements of a constant are, if it is one; spread over more dims or not."""
    constant = _constant(value)
    if constant is None or _is_complex(value):  # the bindings can't read complex elements
        return None
    elements = ir.DenseElementsAttr(constant.attributes["value"])
    return elements.get_splat_value() if elements.is_splat else None


def splat_text(value: ir.Value) -> str | None:
    """The same as MLIR prints it: ``1.000000e+00``, ``true``, ``(0.0, 1.0)`` of a complex number, or ``0xFF800000``."""
    constant = _constant(value)
    if constant is None:
        return None
    text = str(constant.get_asm(large_elements_limit=1) if _is_complex(value) else constant.attributes["value"])
    number = text.partition("dense<")[2].partition("> : ")[0]
    return None if number.startswith(("[", '"')) or not number else number


def elements_text(constant: ir.Operation) -> str:
    """All elements of a constant and their type: equal constants have equal ones."""
    (result,) = constant.results
    if not _is_complex(result):  # else the bindings can't read them
        return str(constant.attributes["value"])
    return str(constant.get_asm()).partition("dense<")[2]


def _is_complex(value: ir.Value) -> bool:
    return isinstance(ir.RankedTensorType(value.type).element_type, ir.ComplexType)


def _constant(value: ir.Value) -> ir.Operation | None:
    """The constant that a value is, if it is one."""
    owner = value.owner
    while not isinstance(owner, ir.Block) and owner.operation.name == "stablehlo.broadcast_in_dim":
        owner = owner.operation.operands[0].owner
    if isinstance(owner, ir.Block) or owner.operation.name != "stablehlo.constant":
        return None
    return owner.operation
