"""The contract of marks: the roles of arguments, and Bactrian's custom calls, as all passes read them."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    MICROBATCH_INDEX,
    ROLE,
    ROLES,
    STAGE_BOUNDARY,
    argument_attributes,
)
from bactrian.passes.ir.gradient_boundary_op import ACCUMULATED, KINDS, REDUCTIONS
from bactrian.passes.ir.regions import body, custom_call_target


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 0: what is read of it long after."""
    main = view.main
    for value, entry in zip(body(main).arguments, argument_attributes(main), strict=True):
        role = ir.StringAttr(entry[ROLE]).value if ROLE in entry else None
        if role not in ROLES:
            raise error_at(PassError, value, f"bactrian.role is {role!r}, must be one of {', '.join(ROLES)}")
    boundaries = 0
    for op in view.ops:
        target = custom_call_target(op) or ""
        if target == GRADIENT_BOUNDARY:
            boundaries += 1
            _verify_boundary(op, main, boundaries)
        elif target == MICROBATCH_INDEX and (len(op.operands) or [str(v.type) for v in op.results] != ["tensor<i32>"]):
            raise error_at(PassError, op, "the microbatch's number takes no operand and is a tensor<i32>")
        elif target == STAGE_BOUNDARY and [v.type for v in op.operands] != [v.type for v in op.results]:
            raise error_at(
                PassError, op, "a stage boundary is no identity: its operands and results have different types"
            )
        elif target.startswith("bactrian.") and target not in (MICROBATCH_INDEX, STAGE_BOUNDARY):
            raise error_at(PassError, op, f"there is no custom call @{target}")


def _verify_boundary(boundary: ir.Operation, main: ir.Operation, count: int) -> None:
    if boundary.parent != main or count > 1:
        raise error_at(PassError, boundary, "there must be one gradient boundary, outside of loops and branches")
    config = boundary.attributes.get("mhlo.backend_config")
    entries = {item.name: item.attr for item in config} if isinstance(config, ir.DictAttr) else {}
    for key, allowed in (("kinds", KINDS), ("reductions", (*REDUCTIONS, ACCUMULATED))):
        text = entries.get(key)
        words = text.value.split(",") if isinstance(text, ir.StringAttr) and text.value else []
        if len(words) != len(boundary.operands) or len(words) != len(boundary.results):
            raise error_at(
                PassError,
                boundary,
                f"the gradient boundary has {len(boundary.operands)} operands, {len(boundary.results)} results "
                f"and {len(words)} {key}, must have one of each",
            )
        for word in words:
            if word not in allowed:
                raise error_at(
                    PassError, boundary, f"{key} of the gradient boundary has {word!r}, must be of {', '.join(allowed)}"
                )
