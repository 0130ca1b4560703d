"""The contract of known phases: what runs forward, backward and once per step."""

from __future__ import annotations

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    INITIALIZE,
    PHASES,
    PREPARE,
    UPDATE,
    argument_roles,
)
from bactrian.passes.ir.main_dataflow import MainDataflow


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 3; with the phases ``prepare`` of section 6a and ``initialize`` of section 7."""
    flow = view.flow
    last = len(flow.ops) - 1
    for index, (op, phase) in enumerate(zip(flow.ops, flow.phases, strict=True)):
        if index in (flow.boundary, last):
            if phase is not None:
                raise error_at(PassError, op, f"the boundary or the return has the phase {phase}")
            continue
        is_above = index < flow.boundary
        allowed = (FORWARD, BACKWARD, PREPARE, INITIALIZE) if is_above else (UPDATE,)
        if phase not in (allowed if flow.boundary >= 0 else PHASES):
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
    _verify_prepared(view)


def _verify_prepared(view: ModuleView) -> None:
    """What is prepared for all microbatches depends on none of them, and on no other stage."""
    flow = view.flow
    prepared = [index for index, phase in enumerate(flow.phases) if phase == PREPARE]
    roles = argument_roles(view.main) if prepared else []
    for index in prepared:
        op = flow.ops[index]
        for value in flow.operands[index]:
            producer = flow.producer[value]
            if producer >= 0 and flow.phases[producer] != PREPARE:
                raise error_at(PassError, op, f"the prepare phase reads a {flow.phases[producer]} value")
            if producer >= 0 and flow.stages[producer] != flow.stages[index]:
                stages = f"stage {flow.stages[index]} reads a value of stage {flow.stages[producer]}"
                raise error_at(PassError, op, f"in the prepare phase {stages}")
            if producer < 0 and roles[value] == "batch":
                raise error_at(PassError, op, "the prepare phase reads an argument of the batch")


def _is_moved_argument(flow: MainDataflow, index: int) -> bool:
    """Whether an op is a reshard, or the last of several, of an argument, which all phases of a stage read (section 7a)."""
    while flow.ops[index].name == "sdy.reshard":
        source = flow.operands[index][0]
        if source < flow.num_arguments:
            return True
        index = flow.producer[source]
    return False
