"""The contract of grouped layers."""

from __future__ import annotations

from collections.abc import Sequence

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    LAYER,
    NUM_LAYERS,
    NUM_STAGES,
    STAGE_BOUNDARY,
    argument_pinned_stages,
    integer_attribute,
)
from bactrian.passes.ir.regions import custom_call_target

_SMALL_BYTES = 256  # as group-layers has it by default


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 4."""
    count = integer_attribute(view.root, NUM_LAYERS)
    if count is None or count < 1:
        raise error_at(PassError, view.root, f"bactrian.num_layers is {count}, must be 1 or more")
    flow = view.flow
    layers = [integer_attribute(op, LAYER) for op in flow.ops]
    for index, (op, phase, layer) in enumerate(zip(flow.ops, flow.phases, layers, strict=True)):
        if custom_call_target(op) == STAGE_BOUNDARY:
            raise error_at(PassError, op, "a stage boundary is left")
        if phase is None:
            continue
        if layer is None or not 0 <= layer < count:
            raise error_at(PassError, op, f"bactrian.layer is {layer}, must be from 0 to {count - 1}")
        for value in flow.operands[index]:
            producer = flow.producer[value]
            before = layers[producer] if producer >= 0 and flow.phases[producer] == phase else None
            if before is None:
                continue
            if (phase == FORWARD and before > layer) or (phase == BACKWARD and before < layer):
                raise error_at(PassError, op, f"a {phase} value goes from layer {before} to layer {layer}")
    if count == integer_attribute(view.root, NUM_STAGES) and not any(stage is not None for stage in flow.stages):
        _verify_pinned(view, layers)


def _verify_pinned(view: ModuleView, layers: Sequence[int | None]) -> None:
    """Forward ops are where the pinned arguments are that they read. Later, ``bactrian.num_stages`` is the new plan's."""
    flow, pinned = view.flow, argument_pinned_stages(view.main)
    for op, phase, layer, reads in zip(flow.ops, flow.phases, layers, flow.operands, strict=True):
        for argument in reads if phase == FORWARD else ():
            if argument in pinned and flow.sizes[argument] > _SMALL_BYTES and layer not in pinned[argument]:
                stages = " and ".join(map(str, pinned[argument]))
                raise error_at(PassError, op, f"layer {layer} reads an argument that is pinned to stages {stages}")
