"""The contract of known phases: what runs forward, backward and once per step."""

from __future__ import annotations

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import BACKWARD, FORWARD, INITIALIZE, UPDATE
from bactrian.passes.ir.main_dataflow import MainDataflow

_PHASES = (FORWARD, BACKWARD, UPDATE, INITIALIZE)


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 3; with the phase ``initialize`` of section 7."""
    flow = view.flow
    last = len(flow.ops) - 1
    for index, (op, phase) in enumerate(zip(flow.ops, flow.phases, strict=True)):
        if index in (flow.boundary, last):
            if phase is not None:
                raise error_at(PassError, op, f"the boundary or the return has the phase {phase}")
            continue
        is_above = index < flow.boundary
        allowed = (FORWARD, BACKWARD, INITIALIZE) if is_above else (UPDATE,)
        if phase not in (allowed if flow.boundary >= 0 else _PHASES):
            side = "before" if is_above else "behind"
            raise error_at(
                PassError, op, f"bactrian.phase is {phase} {side} the boundary, must be {' or '.join(allowed)}"
            )
        if phase == UPDATE:
            for value in flow.operands[index]:
                producer = flow.producer[value]
                if producer in (-1, flow.boundary) or _is_moved_argument(flow, producer):
                    continue
                if flow.phases[producer] != UPDATE:
                    raise error_at(
                        PassError, op, f"the update reads a {flow.phases[producer]} value around the boundary"
                    )


def _is_moved_argument(flow: MainDataflow, index: int) -> bool:
    """Whether an op is a reshard, or the last of several, of an argument, which all phases of a stage read (section 7a)."""
    while flow.ops[index].name == "sdy.reshard":
        source = flow.operands[index][0]
        if source < flow.num_arguments:
            return True
        index = flow.producer[source]
    return False
