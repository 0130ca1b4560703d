"""Compare predicted with measured step times of ten plans of three small models, each on one rank or two.

    bactrian profile-cluster --devices 2
    python benchmarks/predicted.py cluster.toml --json predicted.json

For each plan: the predicted step; the measured one, a median over steps; and the one that the simulation gives where
calls take what was measured of them, which leaves only what lies between calls.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import CORES, machine, worker
from rich.console import Console
from rich.table import Table

PLANS = (  # model, stages, microbatches, schedule
    ("mlp", 1, 8, "1f1b"),
    ("mlp", 2, 8, "1f1b"),
    ("mlp", 2, 8, "gpipe"),
    ("mlp", 2, 32, "eager-1f1b"),
    ("gpt", 1, 4, "1f1b"),
    ("gpt", 2, 8, "1f1b"),
    ("gpt", 2, 2, "gpipe"),
    ("words", 1, 4, "1f1b"),
    ("words", 2, 4, "1f1b"),
    ("words", 2, 16, "eager-1f1b"),
)

Row = dict[str, Any]


def measure(plan: tuple[str, int, int, str], cluster: Path, steps: int) -> Row:
    """One plan, each rank on a core of its own."""
    model, stages, microbatches, schedule = plan
    options = ["--model", model, "--stages", str(stages), "--microbatches", str(microbatches), "--schedule", schedule]
    options += ["--cluster", str(cluster.resolve()), "--steps", str(steps)]
    one = stages == 1
    got = worker("pipeline", *options, *(["--core", str(CORES[0])] if one else []), ranks=None if one else stages)
    name = f"{model}, {stages} stage{'s' * (stages > 1)}, {microbatches} microbatches, {schedule}"
    return got | {"name": name, "measured_seconds": median(got["seconds"])}


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, without ties.

    >>> rank_correlation([1.0, 2.0, 3.0], [2.0, 3.0, 9.0])
    1.0
    """
    places = [[sorted(values).index(value) for value in values] for values in (one, other)]
    count = len(one)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*places, strict=True)) / (count * (count**2 - 1))


def show(rows: list[Row]) -> None:
    """The table, and how well all are predicted."""
    table = Table("plan", "measured", "predicted", "off by", "of measured calls", "off by")
    off: dict[str, list[float]] = {"predicted_seconds": [], "simulated_seconds": []}
    for row in rows:
        cells = [row["name"], f"{1e3 * row['measured_seconds']:.1f} ms"]
        for key, errors in off.items():
            errors.append(row[key] / row["measured_seconds"] - 1)
            cells += [f"{1e3 * row[key]:.1f} ms", f"{100 * errors[-1]:+.1f} %"]
        table.add_row(*cells)
    console = Console(width=120)
    console.print(table)
    measured = [row["measured_seconds"] for row in rows]
    for key, errors in off.items():
        correlation = rank_correlation([row[key] for row in rows], measured)
        middle = median(map(abs, errors))
        console.print(f"{key}: median error {100 * middle:.1f} %, rank correlation {correlation:.3f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path, help="as `bactrian profile-cluster --devices 2` writes it")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a plan")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    before, rows = machine(), list[Row]()
    for plan in PLANS:
        rows.append(measure(plan, args.cluster, args.steps))
        print(f"{rows[-1]['name']}: {1e3 * rows[-1]['measured_seconds']:.1f} ms", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": before, "rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
