"""Unbalanced models in two stages of one core each: the cut that is found against equal layers and equal flops.

    bactrian profile-cluster --devices 2
    python benchmarks/unequal.py cluster.toml --json unequal.json

The models: words (a large head), tables (large embeddings), mixture (experts in the last blocks), unet (images get
smaller, then larger).
For each cut: the predicted step, and the measured one, a median over the steps of all rounds. Only the cut differs.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import Row, machine
from planned_runs import make_plan, measure
from rich.console import Console
from rich.table import Table

MODELS = ("words", "tables", "mixture", "unet")
ALIKE: dict[str, Any] = {"num_microbatches": 8, "schedule": "1f1b", "remat": "none"}


def halves(weights: Sequence[float]) -> int:
    """The first layer of the second stage so that the heavier stage has the least weight.

    >>> halves([5.0, 1.0, 1.0, 1.0, 1.0])
    1
    """
    before = [*accumulate(weights)]
    return min(range(1, len(weights)), key=lambda layer: max(before[layer - 1], before[-1] - before[layer - 1]))


def layer_flops(model: str, cluster: Path, num_layers: int, folder: Path) -> list[float]:
    """Of a microbatch, forward and backward: those of a plan with a stage for each layer."""
    wide = folder / "wide.toml"
    wide.write_text(re.sub(r"(?m)^devices_per_host = .*$", f"devices_per_host = {num_layers}", cluster.read_text()))
    plan = make_plan(model, wide, folder / "wide", boundaries=range(num_layers), **ALIKE)
    return [float(stage.flops or 0) for stage in plan.stages]


def cuts(model: str, cluster: Path, folder: Path) -> dict[str, Row]:
    """The found cut, and the two others, as saved plans."""
    found = make_plan(model, cluster, folder / "found", num_stages=2, **ALIKE)
    flops = layer_flops(model, cluster, found.num_layers, folder)
    plans = {"found": found}
    for name, weights in (("equal layers", [1.0] * found.num_layers), ("equal flops", flops)):
        boundaries = (0, halves(weights))
        plans[name] = make_plan(model, cluster, folder / name, boundaries=boundaries, **ALIKE)
    return {
        name: {
            "model": model,
            "cut": name,
            "layers": [stage.num_layers for stage in plan.stages],
            "flops": [stage.flops for stage in plan.stages],
            "predicted_seconds": plan.predicted_step_seconds,
            "seconds": [],
        }
        for name, plan in plans.items()
    }


def show(rows: Sequence[Row]) -> None:
    """The table; times of other cuts as multiples of the found one's."""
    table = Table("model", "cut", "layers", "predicted", "× found", "measured", "× found")
    for row in rows:
        found = next(other for other in rows if other["model"] == row["model"] and other["cut"] == "found")
        predicted, measured = row["predicted_seconds"], median(row["seconds"])
        table.add_row(
            row["model"],
            row["cut"],
            " + ".join(map(str, row["layers"])),
            f"{1e3 * predicted:.1f} ms",
            f"{predicted / found['predicted_seconds']:.2f}",
            f"{1e3 * measured:.1f} ms",
            f"{measured / median(found['seconds']):.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", type=Path, help="as `bactrian profile-cluster --devices 2` writes it")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each cut, in turn")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    before, rows, cluster = machine(), list[Row](), args.cluster.resolve()
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            mine = cuts(model, cluster, Path(folder))
            for _ in range(args.rounds):
                for name, row in mine.items():
                    row["seconds"] += measure(model, cluster, Path(folder, name), args.steps)["seconds"]
        rows += mine.values()
        print(f"{model}: measured", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": before, "rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
