"""Measure the pipeline on this machine's cores, print a table, and write the figures as JSON.

    python benchmarks/pipeline.py --json out.json
    python benchmarks/pipeline.py --parts b --torch-peer peer.py --torch-python /path/to/python

(a) one stage on one device against ``jax.jit`` of the same step;
(b) two ranks with a core each: speed-up over one core, and efficiency against a 1F1B without overheads;
(c) planning a deep GPT, from ``trace`` to the staged module; (d) the executor's time per instruction.
Every measurement runs in processes of its own; what is compared runs in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))

Row = dict[str, Any]


def interval(
    samples: Sequence[Sequence[float]],
    statistic: Callable[..., Any] = lambda x: np.median(x, axis=-1),
    draws: int = 2000,
) -> tuple[float, float, float]:
    """A statistic of paired samples and its 95 % bootstrap interval: ``(value, low, high)``.

    Args:
        samples: sequences of equal length; position i of each belongs to the same round, and is drawn together.
        statistic: takes one array per sequence and reduces its last axis.
        draws: resampled sets.
    """
    arrays = [np.asarray(x, float) for x in samples]
    picks = np.random.default_rng(0).integers(0, len(arrays[0]), (draws, len(arrays[0])))
    low, high = np.percentile(statistic(*(x[picks] for x in arrays)), [2.5, 97.5])
    return float(statistic(*arrays)), float(low), float(high)


def ratio(over: Any, under: Any) -> Any:
    """The median of paired quotients."""
    return np.median(np.asarray(over) / np.asarray(under), axis=-1)


def worker(*arguments: str, ranks: int | None = None, devices: int = 1) -> Row:
    """One measurement; with ``ranks``, under mpirun with a core for each, or with so many for its devices."""
    start = [sys.executable]
    if ranks is not None:
        start += ["-m", "bactrian.driver.cli", "run", "-n", str(ranks)]
        start += ["--devices", str(devices)] if devices > 1 else []
    return last_json([*start, str(HERE / "worker.py"), *arguments])


def last_json(command: Sequence[str], *, peer: bool = False) -> Row:
    """Run a command and read the last JSON line that it prints.

    Args:
        command: words.
        peer: the line counts also when the program fails after it (torch's gloo now and then aborts while it shuts
            down, long after the last step).

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if (done.returncode and not peer) or not lines:
        raise RuntimeError(f"exit code {done.returncode} of {' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def row(
    part: str, name: str, value: tuple[float, float, float] | float, unit: str, target: str = "", **more: Any
) -> Row:
    """One line of the table."""
    value, low, high = value if isinstance(value, tuple) else (value, value, value)
    return {"part": part, "name": name, "value": value, "low": low, "high": high, "unit": unit, "target": target} | more


def one_stage(args: argparse.Namespace) -> list[Row]:
    """(a) One stage on one device against ``jax.jit``."""
    rows = list[Row]()
    for model, microbatches in (("mlp", 1), ("mlp", 8), ("gpt", 1), ("gpt", 8)):
        options = ["--model", model, "--microbatches", str(microbatches), "--steps", str(args.steps)]
        got = worker("one-stage", *options, "--core", str(CORES[0]))
        name = f"{model}, {microbatches} microbatch{'es' * (microbatches > 1)}: one stage / jax.jit"
        rows.append(row("a", name, interval([got["ours"], got["jit"]], ratio), "×", "≤ 1.02", samples=got))
    return rows


def two_ranks(args: argparse.Namespace) -> list[Row]:
    """(b) Two ranks with a core each, and the torch peer in turn."""
    rows = list[Row]()
    for model in ("mlp", "gpt"):
        rounds = list[Row]()
        for number in range(args.rounds):
            common = ["--model", model, "--microbatches", "8", "--steps", str(args.steps)]
            got: Row = {
                "solo": worker("solo", *common, "--core", str(CORES[number % len(CORES)])),
                "pipeline": worker("pipeline", *common, "--stages", "2", ranks=2),
            }
            if args.torch_peer and model == "mlp":
                peer = [str(args.torch_peer), "--model", "mlp", "--microbatches", "8", "--steps", str(args.steps)]
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
                got["torch solo"] = last_json([args.torch_python, *peer], peer=True)
                command = [args.torch_python, *launcher, *peer, "--schedule", "1F1B"]
                got["torch pipeline"] = last_json(command, peer=True)
            rounds.append(got)
        solo = [float(np.median(r["solo"]["seconds"])) for r in rounds]
        ours = [float(np.median(r["pipeline"]["seconds"])) for r in rounds]
        rows += [
            row("b", f"{model}: jax.jit on one core", interval([solo]), "s"),
            row("b", f"{model}: two ranks", interval([ours]), "s", rounds=rounds),
            row("b", f"{model}: speed-up over one core", interval([solo, ours], ratio), "×"),
            row("b", f"{model}: efficiency", interval([[r["pipeline"]["efficiency"] for r in rounds]]), "", "≥ 0.95"),
            row(
                "b",
                f"{model}: efficiency by the medians of the functions",
                interval([[r["pipeline"]["efficiency_of_medians"] for r in rounds]]),
                "",
            ),
        ]
        if "torch solo" in rounds[0]:
            theirs = [[r[f"torch {kind}"]["median_s"] for r in rounds] for kind in ("solo", "pipeline")]
            rows += [
                row("b", f"{model}: torch on two ranks", interval([theirs[1]]), "s"),
                row("b", f"{model}: torch's speed-up over one core", interval(theirs, ratio), "×"),
                row("b", f"{model}: two ranks, torch's time / ours", interval([theirs[1], ours], ratio), "×", "≥ 1"),
            ]
    return rows


def planning(args: argparse.Namespace) -> list[Row]:
    """(c) From trace to the staged module."""
    runs = [worker("planning", "--layers", "24", "--stages", "4", "--microbatches", "4") for _ in range(args.rounds)]
    name = f"GPT of 24 layers with AdamW, {runs[0]['ops']:,} ops: trace to staged module"
    return [row("c", name, interval([[r["seconds"] for r in runs]]), "s", "≤ 5", runs=runs)]


def instructions(args: argparse.Namespace) -> list[Row]:
    """(d) The executor's own time."""
    rows = list[Row]()
    for stages in (1, 4):
        options = ["--stages", str(stages), "--microbatches", "8", "--steps", str(args.steps), "--core", str(CORES[0])]
        got = worker("instructions", *options)
        micro = [x * 1e6 for x in got["seconds_per_instruction"]]
        name = f"executor, {stages} stage{'s' * (stages > 1)} in one process, {got['instructions']} instructions: each"
        rows.append(row("d", name, interval([micro]), "µs", "≤ 30"))
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "a": one_stage,
    "b": two_ranks,
    "c": planning,
    "d": instructions,
}


def show(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table("", "what", "median", "95 % interval", "target")
    for entry in rows:
        spread = f"{entry['low']:.3g} – {entry['high']:.3g}" if entry["low"] != entry["high"] else ""
        table.add_row(entry["part"], entry["name"], f"{entry['value']:.3g} {entry['unit']}", spread, entry["target"])
    Console(width=140).print(table)


def machine() -> Row:
    """What the figures belong to."""
    names = ("jax", "jaxlib", "numpy", "mpi4py")
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(CORES),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="abcd", help="which of a, b, c, d")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side that are compared")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a run")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--torch-peer", type=Path, help="script that runs the same MLP with torch's pipelining")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter that has torch")
    args = parser.parse_args()
    before, rows = machine(), list[Row]()
    for part in args.parts:
        rows += PARTS[part](args)
        show(rows)
        if args.json:
            args.json.write_text(json.dumps({"machine": before, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
