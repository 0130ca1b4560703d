"""``bactrian plan``: the plan of a train step, made without a device."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from bactrian.driver.commands.argument_types import count, count_or_auto
from bactrian.driver.commands.python_target import kind, load
from bactrian.driver.launch.user_script import use_virtual_devices
from bactrian.driver.report.plan_table import render_plan
from bactrian.driver.report.terminal import RichView
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.spec import num_devices, parse_meshes
from bactrian.passes.plan.pipeline_record import FOUND

if TYPE_CHECKING:
    from bactrian.driver.xla.compare_bytes import Comparison
    from bactrian.passes.frame.phase_times import Timing
    from bactrian.passes.plan.schema import Plan

SUMMARY = "plan a train step and print the plan; needs no device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("step", metavar="script.py:step", nargs="?", help="the parallelized function")
    parser.add_argument("--model", metavar="NAME", help="in its place: a model of Alpa's evaluation, as in gpt-39B")
    parser.add_argument("--batch", type=count, metavar="N", help="sequences or images in a step of the model")
    parser.add_argument(
        "--args",
        metavar="script.py:example_args",
        help="its example arguments, a tuple or a function that makes one (default: example_args of the same script)",
    )
    parser.add_argument(
        "--num-stages", type=count_or_auto, metavar="S", help="pipeline stages; here and below, auto is found"
    )
    parser.add_argument("--num-microbatches", type=count_or_auto, metavar="M", help="microbatches per step")
    parser.add_argument("--schedule", help="order of the microbatches: 1f1b, eager-1f1b or gpipe")
    parser.add_argument("--boundaries", metavar="L,M,...", help="the first layer of each stage; the rest is found")
    parser.add_argument(
        "--mesh", metavar="A=N,B=M", help="devices of each stage by axes, as in data=2,model=4, or data=2;data=4"
    )
    parser.add_argument(
        "--cluster",
        metavar="FILE[:NAME]",
        help="TOML file of the machines, or a table of it (default: the cores of this host)",
    )
    parser.add_argument("--strategy", metavar="NAME", help="auto, data, zero1, zero2, zero3 or megatron, on a mesh")
    parser.add_argument(
        "--remat",
        metavar="WORD[,...]",
        help="none, products or all: what layers compute again; one word, or one for each",
    )
    parser.add_argument(
        "--compare-xla",
        action="store_true",
        help="compile for virtual devices, and compare what XLA sends with the plan",
    )
    parser.add_argument(
        "--timing",
        action="store_true",
        help="compile too, for virtual devices, and show the time of each phase: trace, lower, passes, compile",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="compile and time stages on this host's devices, and plan with what they took",
    )
    parser.add_argument(
        "--profile-dir",
        metavar="DIR",
        help="where --profile keeps what it measured (default: ~/.cache/bactrian/profiles)",
    )
    parser.add_argument(
        "--save", metavar="DIR", help="write plan.json, staged.mlir and, on a mesh, solve.mlir into this folder"
    )
    parser.add_argument("--report", metavar="FILE", help="write the plan, with its timeline, as one HTML file")
    parser.add_argument(
        "--trace", metavar="FILE", help="write the predicted step as a Chrome trace, as runs write theirs"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
    meshes = () if options.mesh in (None, FOUND) else parse_meshes(options.mesh)
    if options.compare_xla or options.timing:
        use_virtual_devices(max(map(num_devices, meshes), default=8))
    step, arguments = _model(options) if options.model is not None else _script(options)
    names = ("num_stages", "num_microbatches", "schedule", "mesh", "boundaries", "strategy", "remat")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.profile or options.profile_dir:
        changes["profile"] = options.profile_dir or True
    traced = step.with_options(**changes).trace(*arguments)
    planned = traced.plan(options.cluster, compare=True)
    if options.save:
        planned.save(options.save)
    if options.report:
        planned.write_report(options.report, name=options.model or options.step)
    if options.trace:
        planned.write_trace(options.trace)
    comparison = planned.compare_xla() if options.compare_xla else None
    timing = planned.compile().timing if options.timing else None
    if options.json:
        sys.stdout.write(_json(planned.plan, comparison, timing))
        return 0
    RichView(render_plan(planned.plan)).show()
    if comparison is not None:
        from bactrian.driver.report.comparison_table import render_comparison

        RichView(render_comparison(comparison)).show()
    if timing is not None:
        timing.show()
    return 0


def _json(plan: Plan, comparison: Comparison | None, timing: Timing | None) -> str:
    """The plan as JSON, with a comparison as ``xla`` and the times of phases as ``timing`` where there are such."""
    if comparison is None and timing is None:
        return plan.to_json()
    data = json.loads(plan.to_json())
    if comparison is not None:
        from bactrian.driver.report.comparison_table import comparison_json

        data["xla"] = comparison_json(comparison)
    if timing is not None:
        from bactrian.driver.report.timing_table import timing_json

        data["timing"] = timing_json(timing.phases)
    return json.dumps(data, indent=2) + "\n"


def _script(options: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """The step of a script, and its example arguments."""
    if options.step is None:
        raise ConfigError(
            "there is no step to plan", fix="name one, as in train.py:step, or a model, as in --model gpt-39B"
        )
    if options.batch is not None:
        raise ConfigError("--batch is for --model", fix="give example arguments of another batch, with --args")
    step = load(options.step, "bactrian plan train.py:step")
    if not callable(getattr(step, "with_options", None)):
        raise ConfigError(
            f"cannot plan {options.step}: it is {kind(step)}, not a parallelized function",
            fix="decorate the train step with `@bactrian.parallelize(...)` and name that",
        )
    return step, _example_arguments(options)


def _model(options: argparse.Namespace) -> tuple[Any, tuple[Any, ...]]:
    """The step of a reference model, and its abstract arguments."""
    from bactrian.driver.api import parallelize
    from bactrian.driver.models.alpa_suite import model_named

    for name, value in (("a step", options.step), ("--args", options.args)):
        if value is not None:
            raise ConfigError(
                f"--model {options.model} and {name}, {value}: only one can be planned", fix="leave one out"
            )
    program = model_named(options.model).training()
    if options.batch is not None:
        program = program.with_batch(options.batch)
    return parallelize(program.step), program.shapes()


def _example_arguments(options: argparse.Namespace) -> tuple[Any, ...]:
    target = options.args or options.step.rpartition(":")[0] + ":example_args"
    value = load(target, "--args train.py:example_args")
    value = value() if callable(value) else value
    if not isinstance(value, (tuple, list)):
        raise ConfigError(
            f"cannot use {target} as arguments: it is {kind(value)}, not a tuple",
            fix="give one entry per argument of the step, or a function that returns them; ShapeDtypeStruct will do",
        )
    return tuple(value)
