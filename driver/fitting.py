"""Layouts whose functions fit into a device: solved again, with less memory to fill, until what XLA needs fits."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.driver.memory import StagePeak, stage_peak
from bactrian.passes.errors import InfeasiblePlanError
from bactrian.passes.peak.estimate import module_memory
from bactrian.passes.plan_table import human_bytes
from bactrian.passes.sharding.unsolved import ATTRIBUTE
from bactrian.passes.sharding_plan import ShardingPlan
from bactrian.runtime.program import StagedProgram

_TRIES = 6


class Fitting:
    """Tries to fit a program into the devices' memory.

    The solver's memory is that of values; what XLA needs beside them is known when the stage functions are there. If it is
    too much, the solver gets as much less as was missing.

    Attributes:
        shardings: of the last try, with their peaks.
        limit: bytes that the solver may fill in the next try; None if the last one fits.
    """

    def __init__(self, module: ir.Module, program: StagedProgram, shardings: tuple[ShardingPlan, ...]) -> None:
        self._device = min(each.limit_bytes or 0 for each in shardings)
        self._bounds = [each.bound_seconds for each in shardings]
        self._tries = 0
        self.limit: int | None = None
        self.add(module, program, shardings)

    def add(self, module: ir.Module, program: StagedProgram, shardings: tuple[ShardingPlan, ...]) -> None:
        """Look at another try.

        Raises:
            InfeasiblePlanError: it was the last one, and does not fit.
        """
        functions = module_memory(module)
        self._peaks = [stage_peak(program, stage, functions) for stage in range(program.num_stages)]
        self.shardings = tuple(
            replace(each, peak_bytes=peak.nbytes, temporary_bytes=peak.temporaries, bound_seconds=bound)
            for each, peak, bound in zip(shardings, self._peaks, self._bounds, strict=True)
        )
        limits = [
            sum(nbytes for _, nbytes in each.memory_bytes) - (peak.nbytes - self._device)
            for each, peak in zip(self.shardings, self._peaks, strict=True)
            if peak.nbytes > self._device
        ]
        known = self._device if self.limit is None else self.limit
        self._tries += 1
        self.limit = min(*limits, known - 1) if limits else None
        if self.limit is not None and (self.limit <= 0 or self._tries == _TRIES):
            raise self._error()

    @contextmanager
    def explained(self) -> Generator[None]:
        """Say, where the solver finds nothing, what it was asked for."""
        try:
            yield
        except InfeasiblePlanError as error:
            raise self._error() from error

    def _error(self) -> InfeasiblePlanError:
        stage = max(range(len(self._peaks)), key=lambda each: self._peaks[each].nbytes)
        peak: StagePeak = self._peaks[stage]
        return InfeasiblePlanError(
            f"cannot fit stage {stage} into a device: it needs {human_bytes(peak.nbytes)}, "
            f"a device has {human_bytes(self._device)}",
            where=f"{peak.function}, when a device holds most",
            why=f"{human_bytes(peak.temporaries)} of it are copies and temporaries, as predicted of XLA for CPUs; no layouts "
            f"that need less were found in {self._tries} {'try' if self._tries == 1 else 'tries'}",
            fix="use more microbatches, stages or devices, or a cluster whose devices have more memory",
        )


def solved_again(unsolved: ir.Operation) -> ir.Module:
    """The module as it was before layouts were chosen, to be worked on. Its context must be entered."""
    with unsolved.location:
        module = ir.Module.create()
    for name in unsolved.attributes:
        if name != ATTRIBUTE:
            module.operation.attributes[name] = unsolved.attributes[name]
    for view in unsolved.regions[0].blocks[0].operations:
        module.body.append(view.operation.clone(ip=False))
    return module
