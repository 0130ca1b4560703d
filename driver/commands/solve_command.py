"""``bactrian solve``: a cost network from a file."""

from __future__ import annotations

import argparse
import json
import sys

from bactrian.driver.commands.argument_types import seconds
from bactrian.driver.report.terminal import RichView

SUMMARY = "solve a cost network: the problem under sharding, in the form of the 2025 contest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("problem", metavar="problem.json.gz", help="JSON in the form of google/iopddl, gzip or plain")
    parser.add_argument("--time-limit", type=seconds, default=60.0, metavar="S", help="seconds (default: 60)")
    parser.add_argument("--json", action="store_true", help='print {"cost", "bound", "optimal", "choice"} and no table')


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
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
    RichView(table).show()
    return 0
