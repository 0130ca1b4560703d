"""The contract of verified programs: nothing in them that a pipeline of microbatches cannot run."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    MICROBATCH_INDEX,
    NUM_MICROBATCHES,
    argument_roles,
    integer_attribute,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import custom_call_target

_HOST_OPS = frozenset({"stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv"})


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 2."""
    main = view.main
    flow = view.flow
    ops = view.ops
    boundaries = [op for op in ops if custom_call_target(op) == GRADIENT_BOUNDARY]
    if len(boundaries) != 1 or flow.boundary < 0:
        raise error_at(
            PassError,
            main,
            f"there are {len(boundaries)} gradient boundaries, must be 1, outside of loops and branches",
        )
    for op in ops:
        if op.name in _HOST_OPS or "callback" in (custom_call_target(op) or ""):
            raise error_at(PassError, op, "an op talks to the host")
        for result in op.results:
            if isinstance(result.type, ir.RankedTensorType) and not result.type.has_static_shape:
                raise error_at(PassError, op, f"the shape of {result.type} is dynamic")
    if integer_attribute(view.root, NUM_MICROBATCHES) != 1:
        _verify_update(main, flow)


def _verify_update(main: ir.Operation, flow: MainDataflow) -> None:
    """What the results need besides the boundary reads nothing that a microbatch has of its own."""
    tainted = [role == "batch" for role in argument_roles(main)] + [False] * (len(flow.values) - flow.num_arguments)
    below = _below(flow)
    for index, op in enumerate(flow.ops):
        if index == flow.boundary:
            continue
        found = custom_call_target(op) == MICROBATCH_INDEX or any(tainted[value] for value in flow.operands[index])
        if found and below[index]:
            raise error_at(PassError, op, "what runs once per step reads a value of a microbatch around the boundary")
        for result in flow.results[index]:
            tainted[result] = found


def _below(flow: MainDataflow) -> list[bool]:
    """Which ops the results depend on, not looking through the boundary; the return is one of them."""
    seen = [False] * len(flow.ops)
    stack = [len(flow.ops) - 1]
    while stack:
        index = stack.pop()
        if index < 0 or index == flow.boundary or seen[index]:
            continue
        seen[index] = True
        stack.extend(flow.producer[value] for value in flow.operands[index])
    return seen
