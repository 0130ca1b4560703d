"""The ``bactrian`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bactrian import __version__
from bactrian.driver.launch import user_script as scripts
from bactrian.passes.frame.errors import BactrianError, ConfigError
from bactrian.passes.machine.mesh import parse_axes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bactrian.driver.xla.compare_bytes import Comparison
    from bactrian.passes.plan.schema import Plan

_MOST_RANKS = 65536


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 fine, 1 our bug, 2 usage, 3 program or configuration, 4 infeasible,
    5 pass failure, 6 peer lost."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except SystemExit as error:
        code, text = scripts.exit_status(error)
        sys.stderr.write(text)
        return code
    except KeyboardInterrupt:
        sys.stderr.write("\nbactrian: stopped by SIGINT\n")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BactrianError as error:
        if options.traceback or not scripts.is_user_error(error):
            traceback.print_exc()
        else:
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="print the Python traceback of every error")
    parser = argparse.ArgumentParser(prog="bactrian", description="Run a JAX train step as a pipeline over a cluster.")
    parser.add_argument("--version", action="version", version=f"bactrian {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], text: str, **kwargs: Any
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common], **kwargs
        )
        added.set_defaults(command=command)
        return added

    run = add(
        "run",
        _run,
        "run a training script, on several ranks or in this process",
        usage="%(prog)s [-n N] [options] script.py [args ...]",
    )
    run.add_argument(
        "-n", type=_count, metavar="N", help="start N ranks with mpirun; without it, all stages run in this process"
    )
    run.add_argument(
        "--devices",
        type=_count,
        metavar="D",
        help="virtual CPU devices of each process (default: 8, and 1 for each of several ranks)",
    )
    run.add_argument(
        "--distributed",
        action="store_true",
        help="join the devices of all ranks (jax.distributed), so that a stage's mesh can have those of several",
    )
    run.add_argument("script", help="the Python script, run as __main__")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="args", help="the script's own arguments")

    plan = add("plan", _plan, "plan a train step and print the plan; needs no device")
    plan.add_argument("step", metavar="script.py:step", help="the parallelized function")
    plan.add_argument(
        "--args",
        metavar="script.py:example_args",
        help="its example arguments, a tuple or a function that makes one (default: example_args of the same script)",
    )
    plan.add_argument("--num-stages", type=_count, metavar="S", help="pipeline stages")
    plan.add_argument("--num-microbatches", type=_count, metavar="M", help="microbatches per step")
    plan.add_argument("--schedule", help="order of the microbatches, e.g. 1f1b or gpipe")
    plan.add_argument("--mesh", metavar="A=N,B=M", help="devices of each stage by axes, as in data=2,model=4")
    plan.add_argument("--cluster", metavar="FILE", help="TOML file of the machines (default: the cores of this host)")
    plan.add_argument("--strategy", metavar="NAME", help="auto, data, zero1, zero2, zero3 or megatron, on a mesh")
    plan.add_argument(
        "--compare-xla",
        action="store_true",
        help="compile for virtual devices, and compare what XLA sends with the plan",
    )
    plan.add_argument(
        "--save", metavar="DIR", help="write plan.json, staged.mlir and, on a mesh, solve.mlir into this folder"
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")

    explain = add(
        "explain", _explain, "print a saved plan and the figures behind each stage, or why a value is laid out so"
    )
    explain.add_argument("plan", metavar="DIR", help="a folder written by `bactrian plan --save`, or a plan.json")
    explain.add_argument(
        "--value",
        metavar="PATH",
        help="of a step on a mesh: what each layout of this value would cost; the pytree path of an argument or the name "
        "stack of an op, or a part that only one has",
    )
    explain.add_argument("--stage", type=_whole, metavar="S", help="the stage, where several hold the value")
    explain.add_argument(
        "--time-limit", type=_seconds, default=60.0, metavar="S", help="seconds for --value (default: 60)"
    )
    explain.add_argument("--json", action="store_true", help="print what --value finds as JSON instead of a table")

    diff = add("diff", _diff, "print what differs between two saved plans")
    diff.add_argument("before", metavar="DIR1", help="the first plan")
    diff.add_argument("after", metavar="DIR2", help="the second plan")

    solve = add("solve", _solve, "solve a cost network: the problem under sharding, in the form of the 2025 contest")
    solve.add_argument("problem", metavar="problem.json.gz", help="JSON in the form of google/iopddl, gzip or plain")
    solve.add_argument("--time-limit", type=_seconds, default=60.0, metavar="S", help="seconds (default: 60)")
    solve.add_argument("--json", action="store_true", help='print {"cost", "bound", "optimal", "choice"} and no table')

    profile = add("profile-cluster", _profile_cluster, "measure the devices of this host and write a cluster file")
    profile.add_argument(
        "--devices", type=_count, metavar="N", help="devices (default: the host's GPUs, else 8 virtual CPU devices)"
    )
    profile.add_argument("--output", metavar="FILE", default="cluster.toml", help="the file (default: cluster.toml)")
    profile.add_argument("--force", action="store_true", help="write the file even if it is there already")
    profile.add_argument(
        "--name", type=_cluster_name, help="how reports call the cluster (default: the name of its file)"
    )
    profile.add_argument(
        "--seconds", type=_seconds, default=20.0, metavar="S", help="to measure for, besides compiling (default: 20)"
    )

    add("doctor", _doctor, "print what is installed and what this machine has")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_RANKS:
        raise argparse.ArgumentTypeError(f"should be a whole number from 1 to {_MOST_RANKS}, got {text!r}")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be a whole number, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"should be a number of seconds above 0, got {text!r}")
    return value


def _cluster_name(text: str) -> str:
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"should be a line of text, got {text!r}")
    return text


def _run(options: argparse.Namespace) -> int:
    scripts.check_script(
        options.script, "name a Python file; options of `bactrian run` stand before it, its own after it"
    )
    if options.distributed and options.n is None:
        raise ConfigError(
            "--distributed joins the devices of several ranks, but there is one process",
            fix="say -n N too, or give this process as many devices as a mesh needs (--devices)",
        )
    scripts.use_virtual_devices(options.devices or (8 if options.n is None else 1))
    if options.n is not None:
        from bactrian.driver.launch.launcher import launch
        from bactrian.driver.progress import TERMINAL_VARIABLE

        if sys.stderr.isatty():
            os.environ[TERMINAL_VARIABLE] = str(shutil.get_terminal_size().columns)
        return launch(
            options.n, options.script, options.arguments, full=options.traceback, distributed=options.distributed
        )
    from bactrian.runtime.rank_lifecycle import exit_code_of

    try:
        scripts.run_script(options.script, options.arguments)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        sys.stdout.flush()
        sys.stderr.write(scripts.describe_failure(error, options.script, full=options.traceback))
        return exit_code_of(error)
    return 0


def _plan(options: argparse.Namespace) -> int:
    axes = None if options.mesh is None else parse_axes(options.mesh)
    if options.compare_xla:
        scripts.use_virtual_devices(8 if axes is None else math.prod(size for _, size in axes))
    step = _load(options.step, "bactrian plan train.py:step")
    if not callable(getattr(step, "with_options", None)):
        raise ConfigError(
            f"cannot plan {options.step}: it is {_kind(step)}, not a parallelized function",
            fix="decorate the train step with `@bactrian.parallelize(...)` and name that",
        )
    names = ("num_stages", "num_microbatches", "schedule", "strategy")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if axes is not None:
        changes["mesh"] = axes
    traced = step.with_options(**changes).trace(*_example_arguments(options))
    planned = traced.plan(options.cluster, compare=True)
    if options.save:
        planned.save(options.save)
    comparison = planned.compare_xla() if options.compare_xla else None
    if options.json:
        sys.stdout.write(planned.plan.to_json() if comparison is None else _with_comparison(planned.plan, comparison))
        return 0
    planned.plan.show()
    if comparison is not None:
        from bactrian.driver.report.comparison_table import render_comparison

        return _print(render_comparison(comparison))
    return 0


def _with_comparison(plan: Plan, comparison: Comparison) -> str:
    from bactrian.driver.report.comparison_table import comparison_json

    return json.dumps(json.loads(plan.to_json()) | {"xla": comparison_json(comparison)}, indent=2) + "\n"


def _example_arguments(options: argparse.Namespace) -> tuple[Any, ...]:
    target = options.args or options.step.rpartition(":")[0] + ":example_args"
    value = _load(target, "--args train.py:example_args")
    value = value() if callable(value) else value
    if not isinstance(value, (tuple, list)):
        raise ConfigError(
            f"cannot use {target} as arguments: it is {_kind(value)}, not a tuple",
            fix="give one entry per argument of the step, or a function that returns them; ShapeDtypeStruct will do",
        )
    return tuple(value)


def _load(target: str, example: str) -> Any:
    """What ``script.py:name`` or ``package.module:name`` stands for. The script is imported, not run as __main__."""
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"cannot read {target!r}: no script and name in it", fix=f"write it as in `{example}`")
    value: Any = _import(module_name)
    for name in attribute.split("."):
        if not hasattr(value, name):
            names = [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []
            close = difflib.get_close_matches(name, names, 3)
            fix = (
                f"did you mean {' or '.join(close)}?"
                if close
                else "name something that stands at the top level of the script"
            )
            raise ConfigError(f"cannot find {name!r} in {module_name}", fix=fix)
        value = getattr(value, name)
    return value


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path[0:1] = [os.getcwd()]
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            raise ConfigError(f"cannot find the module {name}", fix="name a script as in `train.py:step`") from None
    scripts.check_script(name, "name a Python file, as in `train.py:step`")
    path = Path(name).resolve()
    if (loaded := sys.modules.get(path.stem)) is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    module_name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_script_{path.stem}"
    if (loaded := sys.modules.get(module_name)) is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path[0:1] = [str(path.parent)]
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _explain(options: argparse.Namespace) -> int:
    from bactrian.driver.report.plan_report import render_explanation
    from bactrian.passes.plan.schema import Plan

    if options.value is None:
        if options.json or options.stage is not None:
            name = "--json" if options.json else "--stage"
            raise ConfigError(f"explain {name} needs a value", fix="name it with --value, as in --value \"state['w']\"")
        return _print(render_explanation(Plan.load(options.plan)))
    from bactrian.driver.planning.explain_value import explain_value
    from bactrian.passes.sharding.explanation_table import render_value

    found = explain_value(options.plan, options.value, options.stage, options.time_limit)
    if options.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n")
        return 0
    return _print(render_value(found))


def _diff(options: argparse.Namespace) -> int:
    from bactrian.driver.report.plan_report import render_diff
    from bactrian.passes.plan.schema import Plan

    return _print(render_diff(Plan.load(options.before), Plan.load(options.after)))


def _solve(options: argparse.Namespace) -> int:
    from bactrian.passes.network.problem import read_problem
    from bactrian.passes.network.solver import solve

    problem = read_problem(options.problem)
    solution = solve(problem, options.time_limit)
    if options.json:
        fields = {"cost": solution.cost, "bound": solution.lower_bound, "optimal": solution.optimal}
        sys.stdout.write(json.dumps(fields | {"choice": list(solution.choice)}) + "\n")
        return 0
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    gap = (solution.cost - solution.lower_bound) / abs(solution.cost) if solution.cost else 0.0
    table.add_row("cost", f"{solution.cost:,}")
    table.add_row("bound", "proved optimal" if solution.optimal else f"{solution.lower_bound:,.0f} (gap {gap:.3%})")
    limit = "" if problem.limit is None else f" of {problem.limit:,}"
    table.add_row("peak memory", f"{solution.memory:,}{limit}")
    table.add_row("seconds", f"{solution.seconds:.1f}")
    for name, figure in solution.figures.items():
        table.add_row(name, f"{figure:,}")
    return _print(table)


def _profile_cluster(options: argparse.Namespace) -> int:
    from bactrian.driver.profile.cluster_profile import check_target, cluster_text, render_profile, write_cluster

    target = Path(options.output)
    check_target(target, force=options.force)
    scripts.use_virtual_devices(options.devices or 8)
    from bactrian.driver.profile.measure_host import profile_host

    profile = profile_host(options.devices, options.seconds)
    write_cluster(target, cluster_text(profile, options.name))
    _print(render_profile(profile))
    sys.stdout.write(f"written to {target}\n")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    del options
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in findings():
        table.add_row(name, Text(value))  # not read as markup
    return _print(table)


def findings() -> list[tuple[str, str]]:
    """What ``bactrian doctor`` prints: a name and a finding each. Starts no jax and no MPI."""
    from bactrian.driver.launch.launcher import find_mpirun

    found = [
        ("bactrian", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for name in ("jax", "jaxlib", "numpy", "ortools"):
        found.append((name, _version(name) or f"missing: `pip install {name}`"))
    try:
        mpirun = find_mpirun()
        found.append(("mpirun", f"{mpirun.version}, {mpirun.path}"))
    except ConfigError as error:
        found.append(("mpirun", f"{error.message.partition(': ')[2]}: {error.fix}"))
    found.append(("mpi4py", _version("mpi4py") or "missing: `pip install bactrian[openmpi]`; only for several ranks"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.append(("cores", f"{usable} usable of {os.cpu_count()}"))
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" in flag]
    found.append(
        (
            "virtual devices",
            flags[-1].partition("=")[2] + " (XLA_FLAGS)"
            if flags
            else "8 under `bactrian run`, 1 per rank with -n (option --devices)",
        )
    )
    found.append(("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS") or "not set: jax chooses"))
    for label, packages in (
        ("jax on GPU", ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin")),
        ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy")),
        ("NCCL", ("nvidia-nccl-cu13", "nvidia-nccl-cu12")),
    ):
        installed = [f"{name} {version}" for name in packages if (version := _version(name))]
        found.append((label, ", ".join(installed) or "not installed; only for GPUs"))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(renderable: RenderableType) -> int:
    from bactrian.passes.plan.plan_table import show

    show(renderable)
    return 0


if __name__ == "__main__":
    sys.exit(main())
