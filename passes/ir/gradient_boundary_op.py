"""The gradient boundary: the custom call between what runs once per microbatch and what runs once per step."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import GRADIENT_BOUNDARY
from bactrian.passes.ir.regions import body, custom_call_target

KINDS = ("loss", "aux", "gradient", "output")
REDUCTIONS = ("mean", "sum", "last", "concat")
ACCUMULATED = "accumulated"
"""The reduction of what `accumulate-gradients` has given an accumulator."""


def find_boundary(main: ir.Operation) -> ir.Operation:
    """The gradient boundary of ``@main`` (``verify-program`` has checked that there is exactly one)."""
    for op in body(main).operations:
        if isinstance(op, stablehlo.CustomCallOp) and custom_call_target(op.operation) == GRADIENT_BOUNDARY:
            return op.operation
    raise error_at(PassError, main, "@main has no gradient boundary", fix="run verify-program first")


def boundary_words(boundary: ir.Operation, key: str) -> list[str]:
    """``kinds`` or ``reductions`` of the boundary, one word per operand."""
    config = ir.DictAttr(boundary.attributes["mhlo.backend_config"])
    text = ir.StringAttr(config[key]).value
    return text.split(",") if text else []


def set_boundary_words(boundary: ir.Operation, kinds: list[str], reductions: list[str]) -> None:
    """Write ``kinds`` and ``reductions`` of the boundary."""
    boundary.attributes["mhlo.backend_config"] = ir.DictAttr.get(
        {"kinds": ir.StringAttr.get(",".join(kinds)), "reductions": ir.StringAttr.get(",".join(reductions))}
    )


def make_boundary(
    values: list[ir.Value], result_types: list[ir.Type], kinds: list[str], reductions: list[str]
) -> ir.Operation:
    """A gradient boundary at the current insertion point."""
    boundary = ir.Operation.create(
        "stablehlo.custom_call",
        results=result_types,
        operands=values,
        attributes={
            "call_target_name": ir.StringAttr.get(GRADIENT_BOUNDARY),
            "api_version": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4),
        },
    )
    set_boundary_words(boundary, kinds, reductions)
    return boundary
