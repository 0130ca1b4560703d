"""Pipelines: from text to passes, and a runner on MLIR's own pass manager.

A name that is registered with us is our pass or pipeline; everything else is handed to MLIR as it stands.
"""

from __future__ import annotations

import functools
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxlib.mlir import ir, passmanager

from bactrian.passes.frame import registry, reproducer
from bactrian.passes.frame.base import Pass, PassContext, parse_options
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.diagnostics import Diagnostic, from_mlir
from bactrian.passes.frame.errors import BactrianError, ConfigError, PassError, ProgramError
from bactrian.passes.frame.location import user_place
from bactrian.passes.frame.phase_times import PhaseTime
from bactrian.passes.frame.pipeline_text import ANCHOR, Element, parse_pipeline, print_pipeline

PassOrText = Pass | str
Pipeline = str | Sequence[PassOrText]


def resolve(pipeline: Pipeline) -> list[PassOrText]:
    """Turn a pipeline into steps: our passes as objects, everything else as text that MLIR has accepted. Pipelines of ours
    that it names are replaced by their steps.

    Raises:
        ConfigError: for an unknown name (the three nearest are listed) or a wrong option.
    """
    if isinstance(pipeline, str):
        return [step for element in parse_pipeline(pipeline) for step in _resolve_element(element)]
    steps: list[PassOrText] = []
    for step in pipeline:
        if isinstance(step, str):
            steps += resolve(step)
        else:
            step.check_options()
            steps.append(step)
    return steps


def _resolve_element(element: Element) -> list[PassOrText]:
    options = {key: text or "" for key, text in element.options}
    if element.children is None and registry.is_registered(element.name):
        return [registry.load(element.name).from_options(options)]
    if element.children is None and element.name in registry.PIPELINES:
        made = registry.load_pipeline(element.name)
        kinds = typing.get_type_hints(made)
        del kinds["return"]
        return resolve(made(**parse_options(f"pipeline {element.name}", options, kinds)))
    _check_mlir(element)
    return [str(element)]


@functools.cache
def _checking_context() -> ir.Context:
    """A context to parse in; making one registers MLIR's passes, which jaxlib does no earlier."""
    return make_context()


def _check_mlir(element: Element) -> None:
    """Refuse what MLIR doesn't know: its own parser decides."""
    for child in element.children or ():
        if registry.is_registered(child.name):
            raise ConfigError(f"pass {child.name} runs on {ANCHOR}, not on {element.name}")
        _check_mlir(child)
    if element.children is not None:
        return
    with _checking_context():
        try:
            passmanager.PassManager.parse(f"any({element})")
        except ValueError as error:
            if "does not refer to a registered pass" in str(error):
                raise registry.unknown_name(element.name) from None
            raise ConfigError(f"bad options of pass {element.name!r}: {error}") from None


def to_element(step: PassOrText) -> Element:
    """The pipeline element of a step; printed, it makes the same step again."""
    if isinstance(step, Pass):
        return Element(step.name, tuple(step.option_texts().items()))
    (element,) = parse_pipeline(step)
    return element


def pipeline_text(steps: Sequence[PassOrText]) -> str:
    """The whole pipeline as text, anchor included."""
    return f"{ANCHOR}({print_pipeline([to_element(step) for step in steps])})"


@dataclass(frozen=True)
class PassRun:
    """What one of our passes did in a run."""

    step: Pass
    counts: dict[str, int]


@dataclass
class PipelineReport:
    """What a pipeline did: one `PassRun` per pass of ours, in order, and all diagnostics.

    ``phases`` are the times of all passes in order; passes of MLIR that follow each other are one phase, and ``verify``
    is what lies between passes. ``kept`` are the analyses that hold for the IR it left; a run that goes on from there is
    given them.
    """

    runs: list[PassRun] = field(default_factory=list[PassRun])
    phases: list[PhaseTime] = field(default_factory=list[PhaseTime])
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    kept: dict[type, Any] = field(default_factory=dict[type, Any], repr=False)

    def statistics_text(self) -> str:
        """The statistics in the layout of MLIR's ``--mlir-pass-statistics``."""
        bar = f"===-{'-' * 73}-==="
        lines = [bar, "... Pass statistics report ...".center(len(bar)).rstrip(), bar]
        for run in self.runs:
            lines.append(run.step.name)
            lines += [f"  (S) {run.counts[s.name]:5} {s.name} - {s.help}" for s in run.step.statistics]
        return "\n".join(lines)


_contracts_by_default = False


def verify_contracts_by_default(on: bool = True) -> None:
    """Verify contracts in every run of this process that does not say otherwise: for tests."""
    global _contracts_by_default
    _contracts_by_default = on


def run_pipeline(
    module: ir.Module,
    pipeline: Pipeline,
    *,
    print_before_all: bool = False,
    print_after_all: bool = False,
    print_debuginfo: bool = False,
    elide_if_larger: int | None = None,
    timing: bool = False,
    reproducer_dir: str | None = None,
    report: PipelineReport | None = None,
    kept: Mapping[type, Any] | None = None,
    verify_contracts: bool | None = None,
    from_outside: bool = False,
) -> PipelineReport:
    """Run passes on a module, in place, verified before the first and after each.

    Args:
        module: what to rewrite; its context must have every dialect (`make_context`).
        pipeline: a pipeline string, or passes and strings.
        print_before_all, print_after_all: dump the IR to standard error around every pass.
        print_debuginfo: with locations in these dumps.
        elide_if_larger: leave out constants with more elements than this in these dumps.
        timing: print MLIR's timing report to standard error.
        reproducer_dir: where a failing pass of ours leaves its reproducer; None for a temporary folder.
        report: filled while running, so that it can be read after an exception; made when not given.
        kept: analyses that hold for the module, as the report of an earlier run has them.
        verify_contracts: after each pass, also what it ensures; None for what `verify_contracts_by_default` said.
        from_outside: the module is no output of ours: before each pass, also what it requires.

    Raises:
        ProgramError, ConfigError, InfeasiblePlanError: what a pass says about the user's input, and what a module from
            outside lacks for a pass.
        PassError: a pass failed or left invalid IR, or a contract does not hold after it; its text names the reproducer.
    """
    contracts = _contracts_by_default if verify_contracts is None else verify_contracts
    runner = _Runner(module, resolve(pipeline), report or PipelineReport(), contracts, from_outside)
    runner.report.kept = dict(kept or {})
    with module.context:
        manager = passmanager.PassManager(ANCHOR)
        manager.enable_verifier(True)
        if print_before_all or print_after_all:
            module.context.enable_multithreading(False)
            manager.enable_ir_printing(
                print_before_all=print_before_all,
                print_after_all=print_after_all,
                large_elements_limit=elide_if_larger,
                enable_debug_info=print_debuginfo,
            )
        if timing:
            manager.enable_timing()
        runner.fill(manager)
        runner.run(manager, reproducer_dir)
    return runner.report


class _Runner:
    """One run of a pipeline: keeps the exception that MLIR's pass manager would lose, and the IR to reproduce it.

    The IR before a failing pass is made again from the IR before the first one: passes are deterministic, and a copy
    before each of them would cost every run what only a failing one needs.
    """

    def __init__(
        self,
        module: ir.Module,
        steps: list[PassOrText],
        report: PipelineReport,
        verify_contracts: bool = False,
        from_outside: bool = False,
    ) -> None:
        self.report = report
        self._verify_contracts, self._from_outside = verify_contracts, from_outside
        self._module, self._steps = module, steps
        self._exception: BaseException | None = None
        self._last_started = 0
        self._num_done = 0  # steps whose time is known
        self._measured = time.perf_counter()
        self._snapshot: ir.Operation | None = None

    def fill(self, manager: passmanager.PassManager) -> None:
        for index, step in enumerate(self._steps):
            if isinstance(step, str):
                manager.add(step)
            else:
                manager.add(self._callable(index, step), name=type(step).__name__, argument=step.name)

    def run(self, manager: passmanager.PassManager, reproducer_dir: str | None) -> None:
        try:
            self._module.operation.verify()
        except ir.MLIRError as error:
            raise PassError("module is invalid before the first pass", why=self._keep(error)) from None
        self._measure("verify")
        if self._steps:
            self._snapshot = self._module.operation.clone(ip=False)
            self._measure("copy to reproduce failures")
        try:
            manager.run(self._module.operation)
            self._measure_before(len(self._steps))
            if self._steps and isinstance(self._steps[-1], str):
                self.report.kept = {}
        except ir.MLIRError as error:
            caught = self._exception or error
            if isinstance(caught, BactrianError) and not isinstance(caught, PassError):
                raise caught from caught.__cause__
            if not isinstance(caught, Exception):  # KeyboardInterrupt and the like
                raise caught from None
            raise self._failure(caught, reproducer_dir) from caught
        finally:
            self._snapshot = None

    def _callable(self, index: int, step: Pass) -> Any:
        def apply(operation: ir.Operation, handle: passmanager.ExternalPass) -> None:
            self._last_started = index
            self._measure_before(index)
            own = index == 0 or isinstance(self._steps[index - 1], Pass)  # one of MLIR's keeps nothing of ours
            context = PassContext(step, kept=self.report.kept if own else None)
            try:
                with ir.Location.unknown():
                    self._apply(step, context)
                context.fail_if_errors()
                if self._verify_contracts:
                    registry.load_contracts(step.ensures)(self._module)
            except BaseException as error:  # an exception must not unwind MLIR's frames
                self._exception = error
                if isinstance(error, BactrianError) and not any(d.severity == "error" for d in context.diagnostics):
                    context.report(error, self._module.operation)
                handle.signal_pass_failure()
            self.report.kept = context.keeps
            self.report.runs.append(PassRun(step, context.counts))
            self.report.diagnostics += context.diagnostics
            self._num_done = index + 1
            self._measure(step.name, context.clock.phases)

        return apply

    def _apply(self, step: Pass, context: PassContext) -> None:
        """Run a pass. What it says is wrong with a module from outside is no fault of its own."""
        try:
            if self._from_outside:
                registry.load_contracts(step.requires)(self._module)
            step.apply(self._module, context)
        except PassError as error:
            if not self._from_outside:
                raise
            broken, why = error, error.why
            if isinstance(error.__cause__, PassError):  # a contract, whose name stands in front of what is wrong
                broken = error.__cause__
                why = f"{step.name} relies on what docs/ir.md says: {error.message.partition(' is broken')[0]}"
            place = broken.place or user_place(self._module.operation.location)
            raise ProgramError(
                f"cannot run {step.name}: {broken.message}", where=broken.where, why=why, fix=broken.fix, place=place
            ) from error

    def _measure_before(self, index: int) -> None:
        """Measure what ran since the last pass of ours and before the step ``index``: passes of MLIR, or its verifier."""
        names = [str(step) for step in self._steps[self._num_done : index]]
        self._measure(",".join(names) or "verify")

    def _measure(self, name: str, parts: tuple[PhaseTime, ...] = ()) -> None:
        """Measure what ran since the last measurement."""
        before, self._measured = self._measured, time.perf_counter()
        self.report.phases.append(PhaseTime(name, self._measured - before, parts=parts))

    def _keep(self, error: ir.MLIRError) -> str:
        """Keep MLIR's diagnostics in the report; return their text."""
        found = from_mlir(error)
        self.report.diagnostics += found
        return "; ".join(f"{d.where}: {d.message}" if d.where else d.message for d in found) or str(error)

    def _failure(self, error: Exception, reproducer_dir: str | None) -> PassError:
        done, rest = self._steps[: self._last_started], self._steps[self._last_started :]
        name = to_element(rest[0]).name
        message = f"pass {name} failed" if self._exception else f"pipeline failed in or after pass {name}"
        where, why, fix, place = "", f"{type(error).__name__}: {error}", "", user_place(self._module.operation.location)
        if isinstance(error, PassError):
            message, where, why, fix = f"{message}: {error.message}", error.where, error.why, error.fix
            place = error.place or place
        elif isinstance(error, ir.MLIRError):
            why = self._keep(error)
            place = next((each.place for each in self.report.diagnostics if each.severity == "error"), place)
        command = ""
        if self._snapshot is not None:
            before = _replay(self._snapshot, done)
            if before is None:
                before, rest = self._snapshot, self._steps
            try:
                path = reproducer.write(
                    before, pipeline_text(rest), f"{message}: {why}" if why else message, reproducer_dir
                )
                contracts = " --verify-contracts" if self._verify_contracts else ""
                command = f"bactrian-opt --run-reproducer{contracts} {path}"
            except OSError as unwritten:
                command = f"none, since {unwritten.filename or reproducer_dir} can't be written: {unwritten.strerror}"
        return PassError(message, where=where, why=why, fix=fix, place=place, reproducer=command)


def _replay(snapshot: ir.Operation, steps: list[PassOrText]) -> ir.Operation | None:
    """What ``steps`` make of the IR that they had made before; None if they don't get as far again."""
    if not steps:
        return snapshot
    module = ir.Module.parse(str(snapshot.get_asm(enable_debug_info=True)), snapshot.context)
    runner = _Runner(module, steps, PipelineReport())
    manager = passmanager.PassManager(ANCHOR)
    runner.fill(manager)
    try:
        manager.run(module.operation)
    except ir.MLIRError:
        return None
    return module.operation
