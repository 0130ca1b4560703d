"""Shardings whose functions fit into a device: stages that do not are solved again, with less memory to fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.driver.planning.extract import extract
from bactrian.driver.planning.plan_shardings import read_device_bytes, read_least_bytes, read_shardings
from bactrian.driver.planning.stage_memory import StagePeak, fewer_microbatches, stage_peak
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.frame.phase_times import PhaseClock
from bactrian.passes.frame.pipeline import PipelineReport
from bactrian.passes.frame.units import human_bytes
from bactrian.passes.ir.attributes import SOLVE
from bactrian.passes.peak.estimate import module_memory
from bactrian.passes.plan.stage_sharding import ShardingPlan
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.unrolled_step import UnrolledStep

_TRIES = 6

StageCutter = Callable[[ir.Module, Sequence[int]], PipelineReport]
"""Cuts a module into stages, in place, with so many bytes of each stage's devices for the solver to fill, or all of them."""
ModuleFactory = Callable[[], ir.Module]
"""Makes a module from before shardings were chosen, each time a new one."""


class MemoryRefinement:
    """Tries to fit a program into the devices' memory.

    The solver's memory is that of values; what XLA needs beside them is known when the stage functions are there. Where it
    is too much, the solver gets as much less for that stage as was missing, but not less than the smallest shards need.

    Attributes:
        shardings: of the last try, with their peaks.
        limits: bytes that the solver may fill on a device of each stage in the next try; nothing if the last one fits.
    """

    def __init__(self, module: ir.Module, program: StagedProgram, shardings: tuple[ShardingPlan, ...]) -> None:
        self._devices = read_device_bytes(module)
        self._bounds = [each.bound_seconds for each in shardings]
        self._least = read_least_bytes(module)
        self._known = [each.limit_bytes or 0 for each in shardings]  # what the solver may have filled
        self._tries = 0
        self.limits: tuple[int, ...] = ()
        self.add(module, program, shardings)

    def add(self, module: ir.Module, program: StagedProgram, shardings: tuple[ShardingPlan, ...]) -> None:
        """Look at another try.

        Raises:
            InfeasiblePlanError: it was the last one, and does not fit.
        """
        self._peaks = _stage_peaks(module, program)
        self.shardings = tuple(
            replace(each, peak_bytes=peak.nbytes, temporary_bytes=peak.temporaries, bound_seconds=bound)
            for each, peak, bound in zip(shardings, self._peaks, self._bounds, strict=True)
        )
        self._tries += 1
        over = [n for n, (peak, has) in enumerate(zip(self._peaks, self._devices, strict=True)) if peak.nbytes > has]
        if over and (self._tries == _TRIES or any(self._known[stage] <= self._least[stage] for stage in over)):
            raise self.error()
        for stage in over:
            held = sum(nbytes for _, nbytes in self.shardings[stage].memory_bytes)
            wanted = held - (self._peaks[stage].nbytes - self._devices[stage])
            self._known[stage] = max(self._least[stage], min(wanted, self._known[stage] - 1))
        self.limits = tuple(self._known) if over else ()

    def error(self) -> InfeasiblePlanError:
        """What did not fit in the last try."""
        tries = f"{self._tries} {'try' if self._tries == 1 else 'tries'}"
        return _shortage(self._peaks, self._devices, f"; no shardings that need less were found in {tries}")


def check_memory(module: ir.Module, program: StagedProgram, devices: Sequence[int]) -> None:
    """Refuse stages of one device that do not fit into it: there is nothing to solve again.

    Args:
        module, program: in stages.
        devices: the memory of a device of each stage.

    Raises:
        InfeasiblePlanError: says how much is missing on the stage that fits least.
    """
    peaks = _stage_peaks(module, program)
    if any(peak.nbytes > has for peak, has in zip(peaks, devices, strict=True)):
        raise _shortage(peaks, devices)


def _stage_peaks(module: ir.Module, program: StagedProgram) -> list[StagePeak]:
    functions, step = module_memory(module), UnrolledStep(fewer_microbatches(program))
    return [stage_peak(step, stage, functions) for stage in range(program.num_stages)]


def _shortage(peaks: Sequence[StagePeak], devices: Sequence[int], why: str = "") -> InfeasiblePlanError:
    """The error for the stage that most is missing on."""
    missing = [peak.nbytes - device for peak, device in zip(peaks, devices, strict=True)]
    stage = max(range(len(missing)), key=missing.__getitem__)
    peak = peaks[stage]
    return InfeasiblePlanError(
        f"cannot fit stage {stage} into a device: it needs {human_bytes(peak.nbytes)}, "
        f"a device has {human_bytes(devices[stage])}, {human_bytes(missing[stage])} are missing",
        where=f"{peak.function}, at its peak",
        why=f"{human_bytes(peak.temporaries)} of it are copies and temporaries, as predicted of XLA for CPUs{why}",
        fix="use more microbatches, stages or devices, or a cluster whose devices have more memory",
        stage=stage,
        needed_bytes=peak.nbytes,
    )


@dataclass(frozen=True)
class MemoryRefinementResult:
    """A program in stages whose functions fit into their devices.

    Attributes:
        module: the staged module.
        program: as the runtime reads it.
        shardings: of every stage, with their peaks; nothing where stages have one device.
        report: of the passes.
    """

    module: ir.Module
    program: StagedProgram
    shardings: tuple[ShardingPlan, ...]
    report: PipelineReport


def refine_memory(
    module: ir.Module,
    make_unsolved: ModuleFactory | None,
    cut: StageCutter,
    clock: PhaseClock,
    paths: Sequence[str] = (),
    first: Sequence[int] = (),
) -> MemoryRefinementResult:
    """Cut a program into stages, again with less memory to fill until it fits.

    Args:
        module: which is consumed.
        make_unsolved: makes the module that the next try consumes; None where nothing has shardings.
        cut: does it, in place.
        clock: of what is done between the passes.
        paths: of the arguments, for people.
        first: bytes of a device of each stage that the solver may fill at first, if that is enough; all of them if not given.

    Raises:
        InfeasiblePlanError: nothing fits, or was found to.
    """
    try:
        report = cut(module, first)
    except InfeasiblePlanError:
        if make_unsolved is None or not first:
            raise
        with module.context:
            module = make_unsolved()
        report = cut(module, ())
    with clock.phase("extract"):
        program = extract(module)
        shardings = read_shardings(module, program, paths)
    if make_unsolved is None or not shardings:
        return MemoryRefinementResult(module, program, shardings, report)
    with clock.phase("estimate memory"):
        refinement = MemoryRefinement(module, program, shardings)
    while refinement.limits:
        with module.context:
            module = make_unsolved()
        report = cut(module, refinement.limits)
        with clock.phase("extract"):
            program = extract(module)
            shardings = read_shardings(module, program, paths)
        with clock.phase("estimate memory"):
            refinement.add(module, program, shardings)
    return MemoryRefinementResult(module, program, refinement.shardings, report)


def is_fitting(make_unsolved: ModuleFactory, cut: StageCutter) -> bool:
    """Whether the program that ``make_unsolved`` makes can be cut into stages that fit. The context must be entered."""
    try:
        refine_memory(make_unsolved(), make_unsolved, cut, PhaseClock())
    except InfeasiblePlanError:
        return False
    return True


def clone_unsolved(unsolved: ir.Operation) -> ir.Module:
    """The module as it was before shardings were chosen, to be worked on. Its context must be entered."""
    with unsolved.location:
        module = ir.Module.create()
    for name in unsolved.attributes:
        if name != SOLVE:
            module.operation.attributes[name] = unsolved.attributes[name]
    for view in unsolved.regions[0].blocks[0].operations:
        module.body.append(view.operation.clone(ip=False))
    return module
