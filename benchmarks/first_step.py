"""How long it takes to the first step, against ``jax.jit`` of the same step: trace, plan, compile, run.

    python benchmarks/first_step.py                                          # a few minutes
    python benchmarks/first_step.py --programs mlp:2000 stages:64 --rounds 3 --json out.json

A program is a name and a size: ``mlp`` and ``chain`` by parameter leaves, ``gpt`` and ``layers`` by layers, ``stages`` by
pipeline stages. Each measurement is a process of its own, Bactrian and ``jax.jit`` in turn, with nothing cached.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipeline
from rich.console import Console
from rich.table import Table

PROGRAMS = ("mlp:1000", "mlp:2000", "chain:60", "layers:200", "gpt:24", "stages:64")
PHASES = ("trace", "plan", "compile", "first step")
Case = tuple[Any, Any, Any]  # parallelized step, state, batch


def _case(loss: Callable[[Any, Any], Any], params: Any, batch: Any, **options: Any) -> Case:
    """A step of gradient descent."""
    import jax

    import bactrian

    def train(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    options = {"num_stages": 2, "num_microbatches": 2} | options
    return bactrian.parallelize(**options)(train), params, batch


def mlp(leaves: int) -> Case:
    """Layers ``tanh((x w + b) s + o)`` of width 16, four leaves each."""
    import jax.numpy as jnp

    def loss(params: Any, x: Any) -> Any:
        for p in params:
            x = jnp.tanh((x @ p["w"] + p["b"]) * p["s"] + p["o"])
        return jnp.mean(x**2)

    vector = np.ones(16, np.float32)
    params = [{"w": np.eye(16, dtype=np.float32), "b": vector, "s": vector, "o": vector} for _ in range(leaves // 4)]
    return _case(loss, params, np.ones((16, 16), np.float32))


def chain(leaves: int) -> Case:
    """``0.999 y + 0.001 p`` for one leaf of 8 numbers after the other: no product, and nothing to cut at."""
    import jax.numpy as jnp

    def loss(params: Any, x: Any) -> Any:
        for p in params:
            x = x * 0.999 + p * 1e-3
        return jnp.mean(x**2)

    params = [np.full(8, i % 7, np.float32) for i in range(leaves)]
    return _case(loss, params, np.ones((16, 8), np.float32))


def _residual(layers: int, **options: Any) -> Case:
    """Layers ``x + relu(x w + b)`` of width 64."""
    import jax
    import jax.numpy as jnp

    def loss(params: Any, x: Any) -> Any:
        for p in params:
            x = x + jax.nn.relu(x @ p["w"] + p["b"])
        return jnp.mean(x**2)

    params = [{"w": np.eye(64, dtype=np.float32), "b": np.zeros(64, np.float32)} for _ in range(layers)]
    return _case(loss, params, np.ones((16, 64), np.float32), **options)


def layers(count: int) -> Case:
    """A residual MLP, unrolled."""
    return _residual(count)


def stages(count: int) -> Case:
    """The same in many stages of two layers."""
    return _residual(2 * count, num_stages=count, num_microbatches=4)


def gpt(count: int) -> Case:
    """The example's GPT of width 32 with AdamW and dropout, unrolled, in four stages."""
    import programs

    step, state, batch = programs.gpt(layers=count, width=32, batch=4)
    return step.with_options(num_stages=4, num_microbatches=2), state, batch


CASES: dict[str, Callable[[int], Case]] = {"mlp": mlp, "chain": chain, "layers": layers, "stages": stages, "gpt": gpt}


def measure(name: str, kind: str) -> dict[str, Any]:
    """Seconds of each phase in this process, by the clock and of its cores."""
    import jax
    import worker

    which, _, size = name.partition(":")
    step, state, batch = CASES[which](int(size))
    jax.block_until_ready(jax.numpy.ones(4) + 1)  # the backend is there before the clocks run
    marks = [(time.perf_counter(), time.process_time())]

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    timing: list[Any] = []
    if kind == "jit":  # its three phases are trace, lower and compile
        traced = jax.jit(step.fun, donate_argnums=0).trace(state, batch)
        mark()
        lowered = traced.lower()
        mark()
        compiled = lowered.compile()
    else:
        from bactrian.driver.report.timing_table import timing_json

        traced = step.trace(state, batch)
        mark()
        planned = traced.plan()
        mark()
        compiled = planned.compile()
        timing = timing_json(compiled.timing.phases)
    mark()
    worker.wait(compiled(state, batch))
    mark()
    clock, cores = ([b - a for a, b in itertools.pairwise(column)] for column in zip(*marks, strict=True))
    return {"name": name, "kind": kind, "seconds": clock, "core_seconds": cores, "timing": timing}


def figures(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a program: medians of seconds, and of each round's ratio to what ``jax.jit`` traces and compiles."""

    def ratio(key: str, count: int) -> float:
        """Of our first phases, so many of them."""
        return float(pipeline.ratio([sum(run[key][:count]) for run in ours], [sum(run[key][:3]) for run in theirs]))

    def medians(runs: list[dict[str, Any]]) -> list[float]:
        return np.median([run["seconds"] for run in runs], axis=0).tolist()

    return {
        "program": ours[0]["name"],
        "seconds": medians(ours),
        "jit_seconds": medians(theirs),
        "plan_ratio": ratio("seconds", 2),
        "compile_ratio": ratio("seconds", 3),
        "plan_core_ratio": ratio("core_seconds", 2),
        "compile_core_ratio": ratio("core_seconds", 3),
        "runs": ours + theirs,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    ratios = ("planned / jit", "compiled / jit", "of cores: planned", "compiled")
    for header in ("program", *PHASES, "jax.jit", *ratios):
        table.add_column(header, justify="left" if header == "program" else "right", no_wrap=True)
    for row in rows:
        seconds = [f"{value:.2f} s" for value in (*row["seconds"], sum(row["jit_seconds"][:3]))]
        keys = ("plan_ratio", "compile_ratio", "plan_core_ratio", "compile_core_ratio")
        table.add_row(row["program"], *seconds, *(f"{row[key]:.2f}" for key in keys))
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, metavar="NAME:SIZE", help=", ".join(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=("bactrian", "jit"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.programs[0], args.one)))
        return
    rows = list[dict[str, Any]]()
    for name in args.programs:
        runs: dict[str, list[dict[str, Any]]] = {"bactrian": [], "jit": []}
        for _, kind in itertools.product(range(args.rounds), runs):
            runs[kind].append(pipeline.last_json([sys.executable, __file__, "--programs", name, "--one", kind]))
        rows.append(figures(runs["bactrian"], runs["jit"]))
    Console(width=120).print(_table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
