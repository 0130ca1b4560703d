"""Compare predicted with measured steps of plans of three small models over CPU ranks, the found plan of each among them.

    bactrian profile-cluster --devices 2
    python benchmarks/predicted.py cluster.toml --json predicted.json
    python benchmarks/predicted.py cluster.toml --plans schedules --steps 4

For each plan: the predicted step; the measured one, a median over steps; and the one that the simulation gives where
calls take what was measured of them, which leaves only what lies between calls. For each model: by how much the plan
that was found, and the one that is predicted to be the fastest, are slower than the fastest measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import Row, machine
from planned_runs import make_plan, measure, name_of
from rich.console import Console
from rich.table import Table

Decided = tuple[str, dict[str, Any]]  # a model, and what is decided; the rest is found

TEN: tuple[Decided, ...] = (
    ("mlp", {}),
    ("mlp", {"num_stages": 1, "mesh": "data=1", "num_microbatches": 8, "schedule": "1f1b"}),
    ("mlp", {"num_stages": 2, "mesh": "data=1", "num_microbatches": 8, "schedule": "1f1b"}),
    ("mlp", {"num_stages": 2, "mesh": "data=1", "num_microbatches": 32, "schedule": "gpipe"}),
    ("gpt", {"num_microbatches": "auto", "schedule": "auto"}),
    ("gpt", {"num_stages": 1, "mesh": "data=1", "num_microbatches": 4, "schedule": "1f1b"}),
    ("gpt", {"num_stages": 2, "mesh": "data=1", "num_microbatches": 2, "schedule": "gpipe"}),
    ("words", {}),
    ("words", {"num_stages": 1, "mesh": "data=1", "num_microbatches": 4, "schedule": "1f1b"}),
    ("words", {"num_stages": 2, "mesh": "data=1", "num_microbatches": 16, "schedule": "eager-1f1b"}),
)

SCHEDULES: tuple[Decided, ...] = tuple(
    (model, {"num_microbatches": 8, **decisions})
    for model in ("mlp", "transformer")
    for decisions in (
        {},
        *({"num_stages": 2, "mesh": "data=1", "schedule": name} for name in ("1f1b", "eager-1f1b", "gpipe")),
        {"num_stages": 1, "mesh": "data=2", "schedule": "1f1b"},
    )
)
PLANS = {"ten": TEN, "schedules": SCHEDULES}


def is_found(decisions: dict[str, Any]) -> bool:
    """Whether the schedule is not decided."""
    return decisions.get("schedule", "auto") == "auto"


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, without ties.

    >>> rank_correlation([1.0, 2.0, 3.0], [2.0, 3.0, 9.0])
    1.0
    """
    places = [[sorted(values).index(value) for value in values] for values in (one, other)]
    count = len(one)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*places, strict=True)) / (count * (count**2 - 1))


def above_fastest(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By model: by what shares the found plan and the one predicted to be the fastest take longer than the fastest."""
    shares = dict[str, tuple[float, float]]()
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        fastest = min(row["measured_seconds"] for row in mine)
        picked = next(row for row in mine if row["found"]), min(mine, key=lambda row: row["predicted_seconds"])
        found, predicted = (row["measured_seconds"] / fastest - 1 for row in picked)
        shares[model] = found, predicted
    return shares


def show(rows: Sequence[Row]) -> None:
    """The table, and how well all are predicted."""
    table = Table("model", "plan", "measured", "predicted", "off by", "of measured calls", "off by")
    off: dict[str, list[float]] = {"predicted_seconds": [], "simulated_seconds": []}
    for row in rows:
        name = f"{row['name']} (found)" if row["found"] else row["name"]
        cells = [row["model"], name, f"{1e3 * row['measured_seconds']:.1f} ms"]
        for key, errors in off.items():
            errors.append(row[key] / row["measured_seconds"] - 1)
            cells += [f"{1e3 * row[key]:.1f} ms", f"{100 * errors[-1]:+.1f} %"]
        table.add_row(*cells)
    console = Console(width=150)
    console.print(table)
    measured = [row["measured_seconds"] for row in rows]
    for key, errors in off.items():
        correlation = rank_correlation([row[key] for row in rows], measured)
        middle = median(map(abs, errors))
        console.print(f"{key}: median error {100 * middle:.1f} %, rank correlation {correlation:.3f}")
    for model, (found, predicted) in above_fastest(rows).items():
        console.print(
            f"{model}: slower than its fastest plan: the found one by {100 * found:.1f} %, "
            f"the one predicted to be the fastest by {100 * predicted:.1f} %"
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path, help="as `bactrian profile-cluster --devices 2` writes it")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a plan")
    parser.add_argument("--plans", choices=PLANS, default="ten", help="ten plans of three models, or schedules of two")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    before, rows = machine(), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for number, (model, decisions) in enumerate(PLANS[args.plans]):
            if args.models and model not in args.models:
                continue
            saved = Path(folder, str(number))
            plan = make_plan(model, args.cluster.resolve(), saved, **decisions)
            got = measure(model, args.cluster.resolve(), saved, args.steps)
            rows.append(got | {"model": model, "name": name_of(plan), "found": is_found(decisions)})
            print(f"{model}, {rows[-1]['name']}: {1e3 * rows[-1]['measured_seconds']:.1f} ms", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": before, "rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
