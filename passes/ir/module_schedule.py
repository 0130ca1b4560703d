"""The schedule that a module names, and what follows from it for its functions."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    NUM_MICROBATCHES,
    NUM_STAGES,
    UPDATE,
    integer_attribute,
    read_schedule,
)
from bactrian.passes.ir.gradient_boundary_op import boundary_words, find_boundary
from bactrian.passes.schedules.by_name import schedule_named
from bactrian.passes.schedules.schedule import Schedule


def schedule_of(module: ir.Module) -> Schedule | None:
    """The schedule of ``bactrian.schedule``; None where the module names none.

    Raises:
        ConfigError: there is no schedule of that name.
    """
    name = read_schedule(module)
    return None if name is None else schedule_named(name)


def fused_phases(module: ir.Module, main: ir.Operation, stage: int) -> frozenset[str]:
    """The phases of a stage that are one function: forward and backward where the schedule fuses them, and the update
    too if the step is one stage and one microbatch."""
    schedule = schedule_of(module)
    num_stages = integer_attribute(module.operation, NUM_STAGES) or 1
    if schedule is None or not schedule.fuses(stage, num_stages):
        return frozenset()
    if set(boundary_words(find_boundary(main), "kinds")) == {"output"}:  # there is no backward phase
        return frozenset()
    single = num_stages == 1 and integer_attribute(module.operation, NUM_MICROBATCHES) == 1
    return frozenset({FORWARD, BACKWARD, UPDATE} if single else {FORWARD, BACKWARD})
