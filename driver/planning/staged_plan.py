"""A program in stages: the plan, the scheduled module, and the same as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxlib.mlir import ir

from bactrian.driver.planning.extract import extract
from bactrian.passes.frame.phase_times import PhaseTime
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.staged_program import StagedProgram


@dataclass
class StagedPlan:
    """A planned program: the plan, the scheduled module, and the same as plain data.

    ``unsolved`` is the module as it was before shardings were chosen; None where there was nothing to choose. ``phases``
    are the times of planning; there are none where rank 0 has planned for this one.
    """

    plan: Plan
    module: ir.Module
    donate: bool
    unsolved: ir.Operation | None = None
    phases: tuple[PhaseTime, ...] = ()

    def __post_init__(self) -> None:
        """The passes are over: the threads that a context starts for them, one per core, would stay as long as it does."""
        self.module.context.enable_multithreading(False)

    @cached_property
    def program(self) -> StagedProgram:
        """The staged program as the runtime reads it."""
        return extract(self.module)

    @cached_property
    def text(self) -> str:
        """The staged module as text, without locations."""
        return str(self.module)

    def save(self, directory: str | Path) -> None:
        """Write ``plan.json`` and ``staged.mlir`` into a folder; on a mesh, ``solve.mlir`` too, to be explained."""
        unsolved = None if self.unsolved is None else str(self.unsolved.get_asm(enable_debug_info=True))
        self.plan.save(directory, self.text, unsolved)
