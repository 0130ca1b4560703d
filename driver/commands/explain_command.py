"""``bactrian explain``: a saved plan with the figures behind it, or why a value is sharded as it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bactrian.driver.commands.argument_types import seconds, whole_number
from bactrian.driver.report.plan_table import render_explanation
from bactrian.driver.report.terminal import RichView
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.plan.schema import Plan

SUMMARY = "print a saved plan and the figures behind each stage, or why a value is sharded as it is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("plan", metavar="DIR", help="a folder written by `bactrian plan --save`, or a plan.json")
    parser.add_argument(
        "--value",
        metavar="PATH",
        help="of a step on a mesh: what each sharding of this value would cost; the pytree path of an argument or the name "
        "stack of an op, or a part that only one has",
    )
    parser.add_argument("--stage", type=whole_number, metavar="S", help="the stage, where several hold the value")
    parser.add_argument(
        "--time-limit", type=seconds, default=60.0, metavar="S", help="seconds for --value (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print what --value finds as JSON instead of a table")
    parser.add_argument("--report", metavar="FILE", help="write the plan, with its timeline, as one HTML file")
    parser.add_argument(
        "--measured",
        metavar="FILE",
        help="of a run of the plan (`compiled.write_trace`): its last step is in the report too",
    )


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
    if options.measured is not None and options.report is None:
        raise ConfigError("explain --measured is shown in a report", fix="name the file to write with --report")
    if options.value is None:
        if options.json or options.stage is not None:
            name = "--json" if options.json else "--stage"
            raise ConfigError(f"explain {name} needs a value", fix="name it with --value, as in --value \"state['w']\"")
        plan = Plan.load(options.plan)
        if options.report is not None:
            _write_report(plan, options)
        RichView(render_explanation(plan)).show()
        return 0
    if options.report is not None:
        raise ConfigError("a report is of the whole plan, and --value of one value", fix="leave one of them out")
    from bactrian.driver.planning.explain_value import explain_saved
    from bactrian.driver.report.explanation_table import render_value

    found = explain_saved(options.plan, options.value, options.stage, options.time_limit)
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
        return 0
    RichView(render_value(found)).show()
    return 0


def _write_report(plan: Plan, options: argparse.Namespace) -> None:
    from bactrian.driver.planning.saved_plan import load_program
    from bactrian.driver.report.html_report import write_report

    folder = Path(options.plan).resolve()
    name = (folder if folder.is_dir() else folder.parent).name
    write_report(options.report, plan, load_program(options.plan, plan), name=f"plan {name}", measured=options.measured)
