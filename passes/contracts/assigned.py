"""The contract of assigned stages: every op has one, and every stage a mesh."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import LAYER, NUM_STAGES, integer_attribute
from bactrian.passes.ir.meshes import mesh_axes


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 5."""
    count = integer_attribute(view.root, NUM_STAGES)
    if count is None or count < 1:
        raise error_at(PassError, view.root, f"bactrian.num_stages is {count}, must be 1 or more")
    meshes = mesh_axes(view.module)
    for stage in range(count):
        if f"stage{stage}" not in meshes:
            raise error_at(PassError, view.root, f"stage {stage} has no mesh: there is no sdy.mesh @stage{stage}")
    stage_of_layer: dict[int, tuple[int, ir.Operation]] = {}
    flow = view.flow
    for op, phase, stage in zip(flow.ops, flow.phases, flow.stages, strict=True):
        if phase is None:
            continue
        if stage is None or not 0 <= stage < count:
            raise error_at(PassError, op, f"bactrian.stage is {stage}, must be from 0 to {count - 1}")
        layer = integer_attribute(op, LAYER)
        if layer is not None and stage_of_layer.setdefault(layer, (stage, op))[0] != stage:
            raise error_at(PassError, op, f"layer {layer} is on stages {stage_of_layer[layer][0]} and {stage}")
    before = 0
    for layer, (stage, op) in sorted(stage_of_layer.items(), key=lambda item: item[0]):
        if stage < before:
            raise error_at(PassError, op, f"layer {layer} is on stage {stage}, the layer before on stage {before}")
        before = stage
