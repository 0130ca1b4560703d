"""Solve instances of the ASPLOS 2025 / EuroSys 2025 contest and compare with what others got.

    python benchmarks/contest.py /path/to/iopddl --instances ABDGP --json out.json

The folder holds ``A.json.gz`` and so on, from the repository ``google/iopddl``. Each instance runs in a process of its own
under the contest's time limit (reading the file is not counted, as it is not there).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Known:
    """What is known of an instance.

    Attributes:
        limit: seconds that the contest gave, on 8 cores.
        best: the best result of the contest.
        bound: the best lower bound known; equal to the optimum where that is proved.
        xla: what XLA's own solver got, None where it found nothing.
    """

    limit: int
    best: int
    bound: int
    xla: int | None


# The contest's published results; bounds by toulbar2 and Gurobi (supplement of "Soft Constraints, Strong Solutions", 2025).
KNOWN = {
    "A": Known(60, 6_548_641_531, 6_548_553_650, 13_214_846_074),
    "B": Known(60, 532_843, 532_843, 990_205),
    "D": Known(60, 313_613_524_736, 309_195_190_496, None),
    "G": Known(120, 217_039, 217_039, 1_264_777),
    "K": Known(180, 2_274_276_676, 2_065_623_588, None),
    "M": Known(180, 49_928_460_991, 49_407_421_919, None),
    "P": Known(240, 662_197_407_330, 651_833_115_436, 651_833_115_436),
    "S": Known(240, 1_534_613_444, 1_511_240_136, None),
}

_CHILD = """
import json, sys
from bactrian.passes.frame.errors import BactrianError
from bactrian.passes.network.problem import read_problem
from bactrian.passes.network.solver import solve
problem = read_problem(sys.argv[1])
try:
    found = solve(problem, float(sys.argv[2]))
    assert problem.is_feasible(found.choice) and problem.cost(found.choice) == found.cost
    result = {"cost": found.cost, "bound": found.lower_bound, "optimal": found.optimal, "seconds": found.seconds}
except BactrianError as error:
    result = {"error": error.message}
print(json.dumps(result))
"""


def measure(path: Path, limit: float) -> dict[str, Any]:
    """One instance in a fresh process."""
    command = [sys.executable, "-c", _CHILD, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{path.name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(value: float, other: float | None) -> str:
    """``value`` over ``other``, or a dash."""
    return "–" if other is None else f"{value / other:.6f}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the instances are")
    parser.add_argument("--instances", default="ABDGP", help="letters (default: ABDGP)")
    parser.add_argument("--time-limit", type=float, help="seconds for each, in the place of the contest's")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    table = Table("", "cost", "bound", "proved", "seconds", "limit", "/ best bound known", "/ best of contest", "/ XLA")
    rows = dict[str, Any]()
    for name in args.instances:
        known = KNOWN[name]
        limit = args.time_limit or known.limit
        got = rows[name] = measure(args.folder / f"{name}.json.gz", limit)
        if "error" in got:
            table.add_row(name, got["error"], "", "", "", f"{limit:g}", "", "", "")
            continue
        table.add_row(
            name,
            f"{got['cost']:,}",
            f"{got['bound']:,.0f}",
            "yes" if got["optimal"] else "no",
            f"{got['seconds']:.1f}",
            f"{limit:g}",
            ratio(got["cost"], known.bound),
            ratio(got["cost"], known.best),
            ratio(got["cost"], known.xla),
        )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
