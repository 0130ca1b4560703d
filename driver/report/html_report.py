"""A plan as one HTML file that needs nothing else: no network, no fonts, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bactrian import __version__
from bactrian.driver.planning.held_memory import HeldMemory, held_memory
from bactrian.driver.planning.simulated_step import simulated
from bactrian.driver.report.html_sections import (
    baselines_section,
    memory_section,
    sharding_section,
    stages_section,
    tiles,
    time_section,
)
from bactrian.driver.report.html_timeline import timeline_section
from bactrian.driver.report.plan_table import option_text, plan_lines
from bactrian.driver.report.step_timeline import StepTimeline, measured_timeline, predicted_timeline
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.files import write_whole
from bactrian.passes.frame.visible import visible
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.staged_program import StagedProgram

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
_SECTIONS = (
    ("stages", "Stages"),
    ("timeline", "Timeline"),
    ("time", "Where the time goes"),
    ("memory", "Memory"),
    ("shardings", "Shardings"),
    ("baselines", "Baselines"),
    ("remarks", "Remarks"),
)


def write_report(
    path: str | Path, plan: Plan, program: StagedProgram | None, *, name: str = "", measured: str | Path | None = None
) -> None:
    """Write the report of a plan.

    Args:
        path: the file.
        plan: what it is of.
        program: in stages, for the timeline; None where it was not saved.
        name: of the step, for people; that of its program by default.
        measured: the trace of a run of the plan, written by ``compiled.write_trace``; its last step is shown beside the
            predicted one.

    Raises:
        ConfigError: the file can't be written; the trace can't be read, or is of another plan.
    """
    run = None if measured is None else measured_timeline(measured, plan)
    _, times = (plan, None) if program is None else simulated(plan, program)
    if program is None or times is None:
        text = render_report(plan, None, run, name=name)
    else:
        predicted = predicted_timeline(program, times)
        text = render_report(plan, predicted, run, held_memory(program, times), name=name)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the report {path}: {error.strerror}",
            fix="name a file in a folder that is there and has the space",
        ) from None


def render_report(
    plan: Plan,
    predicted: StepTimeline | None = None,
    measured: StepTimeline | None = None,
    held: Sequence[HeldMemory] = (),
    *,
    name: str = "",
) -> str:
    """The report as text.

    Args:
        plan: what it is of.
        predicted: the timeline of a step.
        measured: the same of a run.
        held: what a device of each stage holds in the predicted step.
        name: of the step, for people.
    """
    context: dict[str, Any] = {
        "version": __version__,
        "name": name or (f"program {plan.fingerprint[:12]}" if plan.fingerprint else "a step"),
        "decided": plan_lines(plan)[0],
        "tiles": tiles(plan, predicted, measured),
        "warnings": [remark for remark in plan.remarks if remark.severity == "warning"],
        "remarks": [remark for remark in plan.remarks if remark.severity != "warning"],
        "provenance": _provenance(plan),
        **stages_section(plan),
        **timeline_section(plan, predicted, measured),
        **time_section(plan, measured),
        **memory_section(plan, held, 0.0 if predicted is None else predicted.seconds),
        **sharding_section(plan),
        **baselines_section(plan),
    }
    filled = {"stages": True, "time": True, "timeline": context["timelines"], "memory": context["memories"]}
    context["sections"] = [(id, title) for id, title in _SECTIONS if filled.get(id, context.get(id))]
    return _environment().get_template("plan.html").render(context)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    module: Any = environment.get_template("meter.html").module
    environment.globals["meter"] = module.meter
    return environment


def _finalize(value: object) -> object:
    """What is written of a value: of names, no control characters; what is markup already stays."""
    return visible(value) if type(value) is str else value


def _provenance(plan: Plan) -> Sequence[tuple[str, str]]:
    found = [("Program", plan.fingerprint or "any")]
    found += [(f"option {name}", option_text(value)) for name, value in plan.options]
    return [*found, ("Plan version", str(plan.version)), ("Bactrian", __version__)]
