"""The contract of scheduled modules: every stage runs each of its functions once per microbatch, forward first."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    NUM_MICROBATCHES,
    NUM_STAGES,
    ORDER,
    PHASE,
    STAGE,
    integer_attribute,
    required_integer,
    string_attribute,
)
from bactrian.passes.ir.regions import body
from bactrian.passes.schedules.schedule import parse_token

_TOKENS = {"forward": "F", "backward": "B", "forward_backward": "FB"}


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 9."""
    root = view.root
    stages = required_integer(root, NUM_STAGES, "assign-stages")
    count = required_integer(root, NUM_MICROBATCHES, "capture")
    order = root.attributes.get(ORDER)
    if not isinstance(order, ir.ArrayAttr) or len(order) != stages:
        raise error_at(PassError, root, f"bactrian.order has not one list for each of {stages} stages")
    wanted: list[set[tuple[str, int]]] = [set() for _ in range(stages)]
    for each in body(view.main).operations:
        stage = integer_attribute(each.operation, STAGE)
        kind = _TOKENS.get(string_attribute(each.operation, PHASE) or "")
        if stage is not None and kind is not None:
            wanted[stage] |= {(kind, microbatch) for microbatch in range(count)}
    for stage, entry in enumerate(order):
        tokens = [parse_token(ir.StringAttr(token).value) for token in ir.ArrayAttr(entry)]
        if len(tokens) != len(wanted[stage]) or set(tokens) != wanted[stage]:
            raise error_at(
                PassError, root, f"stage {stage} does not run each of its functions once for each microbatch: {entry}"
            )
        place = {token: number for number, token in enumerate(tokens)}
        for microbatch in range(count):
            if place.get(("B", microbatch), count * 2) < place.get(("F", microbatch), -1):
                raise error_at(
                    PassError, root, f"stage {stage} runs the backward of microbatch {microbatch} before its forward"
                )
