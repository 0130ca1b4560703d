"""All stages in one process on one GPU: the reference's numbers, and one stage against ``jax.jit``.

    python benchmarks/gpu/stages_on_one_gpu.py --json out.json

Matrix products run in full float32, so that what is compared is the plan and not TF32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def largest_error(model: str, stages: int, microbatches: int, schedule: str, steps: int = 3) -> float:
    """Run some steps on both sides, each with its own state; the largest relative error of loss and state."""
    import jax
    import numpy as np
    import programs

    import bactrian

    step, state, batch = programs.PROGRAMS[model]()
    step = step.with_options(num_stages=stages, num_microbatches=microbatches, schedule=schedule)
    ours, reference, worst = state, state, 0.0
    for _ in range(steps):
        result, theirs = step(ours, batch), step.reference(reference, batch)
        mine, expected = (
            [np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if np.issubdtype(x.dtype, np.floating)]
            for tree in (bactrian.gather(result), jax.device_get(theirs))
        )
        floor = 1e-3 * np.sqrt(sum(np.square(x).sum() for x in expected))
        for a, b in zip(mine, expected, strict=True):
            worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), floor)))
        ours, reference = result[0], theirs[0]
    return worst


def one_stage(model: str, microbatches: int, steps: int) -> dict[str, Any]:
    """Seconds per step of one stage and of ``jax.jit``, in turn."""
    import worker

    args = argparse.Namespace(model=model, microbatches=microbatches, steps=steps, warmup=5)
    return worker.measure_one_stage(args)


def main() -> None:
    """Both measurements for both models."""
    import jax
    from pipeline import interval, ratio, row, show

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, rows = jax.local_devices()[0].device_kind, []
    for model in ("mlp", "gpt"):
        for stages, microbatches, schedule in ((1, 1, "1f1b"), (2, 4, "1f1b"), (2, 4, "gpipe"), (4, 8, "1f1b")):
            error = largest_error(model, stages, microbatches, schedule)
            name = f"{model}, {stages} stages, {microbatches} microbatches, {schedule}: largest relative error"
            rows.append(row("", name, error, "", "≤ 1e-5"))
        for microbatches in (1, 8):
            got = one_stage(model, microbatches, args.steps)
            name = f"{model}, {microbatches} microbatches: one stage / jax.jit"
            rows.append(row("a", name, interval([got["ours"], got["jit"]], ratio), "×", "≤ 1.02", samples=got))
    print(device)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
