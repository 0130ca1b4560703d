"""The contracts of placement: ops of ``@main`` have a phase, a layer, a stage. What holds between these is said elsewhere."""

from __future__ import annotations

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    LAYER,
    NUM_LAYERS,
    PHASE,
    PHASES,
    read_num_microbatches,
    read_num_stages,
    required_integer,
    required_phase,
)
from bactrian.passes.ir.cloning import required_stages
from bactrian.passes.ir.gradient_boundary_op import find_boundary


def verify_phases(view: ModuleView) -> None:
    """``docs/ir.md``, section 3: every op but the boundary and the return has a phase."""
    flow = view.flow
    for index, op in enumerate(flow.ops[:-1]):
        if index != flow.boundary and required_phase(op) not in PHASES:
            raise error_at(PassError, op, f"{PHASE} is {op.attributes[PHASE]}, must be one of {', '.join(PHASES)}")


def verify_layers(view: ModuleView) -> None:
    """``docs/ir.md``, section 4: there are layers, and ops say theirs."""
    required_integer(view.root, NUM_LAYERS, "run group-layers first")
    for index, op in enumerate(view.flow.ops):
        if LAYER in op.attributes:
            continue
        if view.flow.phases[index] is not None:
            raise error_at(PassError, op, f"{LAYER} is missing on {op.name}", fix="run group-layers first")


def verify_stages(view: ModuleView) -> None:
    """``docs/ir.md``, section 5: every op but the boundary and the return has a stage."""
    required_stages(view.flow)


def verify_num_stages(view: ModuleView) -> None:
    """``docs/ir.md``, section 5: the module says how many stages there are."""
    read_num_stages(view.module)


def verify_num_microbatches(view: ModuleView) -> None:
    """``docs/ir.md``, section 0: the module says how many microbatches there are."""
    read_num_microbatches(view.module)


def verify_boundary(view: ModuleView) -> None:
    """``docs/ir.md``, section 2: there is a gradient boundary."""
    find_boundary(view.main)
