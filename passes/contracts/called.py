"""The contract of staged data flow: ``@main`` is calls of stage functions, each on the mesh of its stage, and transfers."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import NUM_MICROBATCHES, NUM_STAGES, required_integer, required_phase, required_stage
from bactrian.passes.ir.meshes import is_mesh_tensor, mesh_tensor_parts
from bactrian.passes.ir.regions import body, terminator


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 8: what is read of ``@main``."""
    main = view.main
    required_integer(view.root, NUM_STAGES, "run assign-stages first")
    required_integer(view.root, NUM_MICROBATCHES, "start from `step.trace(*args).text`")
    for value in body(main).arguments:
        _verify_type(value, value)
    for each in body(main).operations:
        op = each.operation
        if op == terminator(main):
            continue
        if op.name not in ("mpmd.fragment_call", "mpmd.transfer"):
            raise error_at(PassError, op, "@main has an op that is no call, no transfer and no return")
        for value in op.results:
            _verify_type(value, op)
        if op.name == "mpmd.transfer":
            continue
        required_phase(op)
        stage = required_stage(op)
        for value in (*op.operands, *op.results):
            if (home := mesh_tensor_parts(value.type)[0]) != stage:
                raise error_at(PassError, op, f"a call of stage {stage} reads or makes a value of stage {home}")


def _verify_type(value: ir.Value, where: ir.Operation | ir.Value) -> None:
    if not is_mesh_tensor(value.type):
        raise error_at(
            PassError, where, f'a value of @main is {value.type}, must be a tensor on the mesh "stage<number>"'
        )
