"""The contract of explicit accumulators."""

from __future__ import annotations

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import ACCUMULATE, INITIALIZE, NUM_MICROBATCHES, integer_attribute
from bactrian.passes.ir.gradient_boundary_op import ACCUMULATED, boundary_words, find_boundary

_ACCUMULATING = ("stablehlo.add", "stablehlo.dynamic_update_slice")


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 7."""
    main = view.main
    boundary = find_boundary(main)
    if pending := [word for word in boundary_words(boundary, "reductions") if word != ACCUMULATED]:
        raise error_at(PassError, boundary, f"the reduction {pending[0]} has no accumulator")
    for operand, result in zip(boundary.operands, boundary.results, strict=True):
        if operand.type != result.type:
            raise error_at(
                PassError, boundary, f"an operand of the boundary is {operand.type}, its result is {result.type}"
            )
    flow = view.flow
    loops = (integer_attribute(view.root, NUM_MICROBATCHES) or 1) > 1
    for index, op in enumerate(flow.ops):
        if flow.phases[index] == INITIALIZE:
            for value in flow.operands[index]:
                if flow.producer[value] < 0 or flow.phases[flow.producer[value]] != INITIALIZE:
                    raise error_at(PassError, op, "the initialize phase reads a value of another phase")
        if ACCUMULATE not in op.attributes:
            continue
        if not loops:
            raise error_at(PassError, op, "an op accumulates, and a step has one microbatch")
        if op.name not in _ACCUMULATING:
            raise error_at(PassError, op, f"an op accumulates that is none of {', '.join(_ACCUMULATING)}")
        carried = flow.producer[flow.operands[index][0]]
        if carried < 0 or flow.phases[carried] != INITIALIZE:
            raise error_at(PassError, op, "an accumulator does not begin with a value of the initialize phase")
