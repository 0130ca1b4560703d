"""A step cut into stages: what can be printed, saved, compared and compiled."""

from __future__ import annotations

from pathlib import Path

from bactrian.driver.capture.captured_step import Captured
from bactrian.driver.planning.explain_value import explain
from bactrian.driver.planning.plan_broadcast import outline, with_shardings_of_rank_0
from bactrian.driver.planning.plan_remarks import log_once
from bactrian.driver.planning.predicted_trace import write_predicted_trace
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.ranks import World
from bactrian.driver.report.explanation_table import render_value
from bactrian.driver.report.html_report import write_report
from bactrian.driver.report.plan_table import render_plan
from bactrian.driver.report.run_report import report_if_asked
from bactrian.driver.report.terminal import RichView
from bactrian.driver.report.timing_table import render_timing
from bactrian.driver.run.compiled_step import Compiled
from bactrian.driver.run.session import groups_of_stages, open_session
from bactrian.driver.xla.compare_bytes import Comparison, compare
from bactrian.passes.frame.phase_times import Timing, merged
from bactrian.passes.frame.reproducer import versions
from bactrian.passes.frame.views import view
from bactrian.passes.peak.estimate import module_memory
from bactrian.passes.plan.schema import Plan
from bactrian.passes.sharding.explain import Explanation
from bactrian.runtime import lockstep

view.register(Explanation, lambda found: RichView(render_value(found)))  # `Planned.explain` gives them to users
view.register(Timing, lambda timing: RichView(render_timing(timing)))


class Planned:
    """A step cut into stages: the plan and the staged module."""

    def __init__(
        self, captured: Captured, staged: StagedPlan, *, is_shared: bool = False, check_inputs: bool = True
    ) -> None:
        """``is_shared``: every rank has it from rank 0. ``check_inputs``: as in `parallelize`."""
        self.captured, self.staged, self._is_shared, self._check_inputs = captured, staged, is_shared, check_inputs

    @property
    def plan(self) -> Plan:
        """The decisions and their predictions."""
        return self.staged.plan

    @property
    def timing(self) -> Timing:
        """Where the time went so far: trace, lower, each pass. `Compiled.timing` goes on with compiling."""
        return Timing(merged((*self.captured.phases, *self.staged.phases)))

    @property
    def staged_text(self) -> str:
        """The staged module as text."""
        return self.staged.text

    def __str__(self) -> str:
        return str(self.plan)

    def _repr_html_(self) -> str:
        return RichView(render_plan(self.plan)).html()

    def show(self) -> None:
        """Print the table of stages."""
        self.plan.show()

    def save(self, directory: str | Path) -> None:
        """Write ``plan.json`` and ``staged.mlir`` into a folder; on a mesh ``solve.mlir`` too, for ``bactrian explain``."""
        self.staged.save(directory)

    def write_report(self, path: str | Path, *, measured: str | Path | None = None, name: str = "") -> None:
        """Write the plan, with the timeline of a step, as one HTML file that needs nothing else.

        Args:
            path: the file.
            measured: the trace of a run of this plan, written by ``compiled.write_trace``: its last step is shown too.
            name: of the step, for people; its own by default.

        Raises:
            ConfigError: the file can't be written; the trace can't be read, or is of another plan.
        """
        write_report(path, self.plan, self.staged.program, name=name or self.captured.name, measured=measured)

    def write_trace(self, path: str | Path) -> None:
        """Write the predicted step as a Chrome trace, as ``compiled.write_trace`` writes the measured ones.

        Raises:
            ConfigError: no times were predicted; the file can't be written.
        """
        write_predicted_trace(path, self.plan, self.staged.program, module_memory(self.staged.module))

    def explain(self, value: str, *, stage: int | None = None, time_limit: float = 60.0) -> Explanation:
        """Which shardings a value could have, what a step would take with each, and what bound the choice.

        Args:
            value: the pytree path of an argument (``state['w']``) or the name stack of an op, or a part that only one has.
            stage: whose value it is, where several stages hold it.
            time_limit: seconds for all of it.

        Raises:
            ConfigError: stages have one device each; no value, or several, are called so.
        """
        return explain(self.staged, value, stage, time_limit)

    def compare_xla(self) -> Comparison:
        """Compile for this process's devices, and compare what the functions send with what is predicted."""
        return compare(self.staged)

    def compile(self) -> Compiled:
        """Compile this process's stages (collective: all ranks call it). Shardings are those that rank 0 found.

        Rank 0 logs the plan's remarks, each once.

        Raises:
            ConfigError: the ranks do not fit the plan, or run different programs.
        """
        lockstep.note(self.captured.collective_call("compile"))
        return self.compile_as_noted()

    def compile_as_noted(self) -> Compiled:
        """`compile`, once the call is noted for the other ranks to compare."""
        world = World.current()
        groups = groups_of_stages([stage.mesh for stage in self.plan.stages], world)
        own = {
            "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions().items())),
            "the program": self.captured.fingerprint,
            "the plan": outline(self.plan).to_json(),
            "the ranks of stages' meshes": ", ".join(map(str, groups.sizes)),
        }
        world.check_equal(own)
        if world.rank == 0:
            for remark in self.plan.remarks:
                log_once(remark)
            report_if_asked(self.plan, self.staged.program, self.captured.name)
        staged = self.staged if self._is_shared else with_shardings_of_rank_0(self.staged, world)
        return Compiled(self.captured, open_session(staged, world), check_inputs=self._check_inputs)
