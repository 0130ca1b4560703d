<<<<<<< HEAD
"""Stages on one GPU, in one process: the reference's numbers, and the price of one stage against one program.

    python benchmarks/gpu/stages_on_one_gpu.py --json gpu.json

A GPT with AdamW and global-norm clipping. First the numbers (float32, matmuls at highest precision): 1, 2 and 4 stages,
both schedules, three steps, against ``step.reference``. Then the speed (JAX's default precision): one stage against
``jax.jit`` of the reference, alternating rounds of the same run, medians and the quartiles of the paired ratio.
=======
"""All stages in one process on one GPU: the reference's numbers, and one stage against ``jax.jit``.

    python benchmarks/gpu/stages_on_one_gpu.py --json out.json

Matrix products run in full float32, so that what is compared is the plan and not TF32.
>>>>>>> refs/heads/models
"""

from __future__ import annotations

import argparse
import json
<<<<<<< HEAD
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bactrian
from bactrian.driver.reference import reference_function


class Block(nn.Module):
    """A transformer block."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(y)


class GPT(nn.Module):
    """A decoder-only transformer with a tied embedding."""

    layers: int
    width: int
    heads: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width)
        x = embed(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = Block(self.width, self.heads)(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def make(
    args: argparse.Namespace, layers: int, width: int, length: int
) -> tuple[Callable[[Any, Any], Any], Any, np.ndarray]:
    """A train step, its state and a batch."""
    model = GPT(layers, width, width // 64, 1024)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    tokens = np.random.default_rng(0).integers(0, 1024, (args.batch, length + 1)).astype(np.int32)
    params = model.init(jax.random.key(0), tokens[:1, :-1])
    state = jax.device_get((params, optimizer.init(params)))

    def step(state: Any, tokens: jax.Array) -> Any:
        params, opt_state = state

        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, gradients = bactrian.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step, state, tokens


def largest_error(ours: Any, reference: Any) -> tuple[float, str]:
    """Largest relative error of a leaf in norm (tiny leaves against the whole tree), and where."""
    flat, _ = jax.tree_util.tree_flatten_with_path(reference)
    whole = float(np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for _, x in flat)))
    worst = (0.0, "")
    for (path, theirs), mine in zip(flat, jax.tree.leaves(ours), strict=True):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" in name:  # zero in exact arithmetic: its gradient is rounding noise, which Adam blows up
            continue
        a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        worst = max(worst, (float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-3 * whole), name))
    return worst


def check_numbers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Three steps of every plan against the reference."""
    rows: list[dict[str, Any]] = []
    with jax.default_matmul_precision("highest"):
        step, state, tokens = make(args, layers=4, width=256, length=128)
        for stages, schedule in ((1, "1f1b"), (2, "1f1b"), (2, "gpipe"), (4, "1f1b"), (4, "gpipe")):
            ours = bactrian.parallelize(step, num_stages=stages, num_microbatches=4, schedule=schedule)
            mine, theirs, loss, expected = state, state, None, None
            for _ in range(3):
                theirs, expected = ours.reference(theirs, tokens)
                mine, loss = ours(mine, tokens)
            error, where = largest_error(bactrian.gather((mine, loss)), (theirs, expected))
            rows.append({"stages": stages, "schedule": schedule, "error": error, "leaf": where})
            print(f"{stages} stages, {schedule}: largest relative error {error:.1e} at {where}", flush=True)
    return rows


def time_rounds(run: Callable[[], None], count: int) -> float:
    """Seconds of one of ``count`` calls that are dispatched together."""
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


def compare_speed(args: argparse.Namespace, layers: int, width: int, length: int) -> dict[str, Any]:
    """One stage against the reference as one jitted program, in alternating rounds."""
    step, state, tokens = make(args, layers, width, length)
    ours = bactrian.parallelize(step, num_stages=1, num_microbatches=args.microbatches)
    traced = ours.trace(state, tokens)
    jitted = reference_function(traced.captured, donate_state=True)
    holders: dict[str, Any] = {"ours": state, "jit": jax.device_put(state)}
    loss: dict[str, Any] = {}

    def steps(which: str, function: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(args.steps):
                holders[which], loss[which] = function(holders[which], tokens)
            jax.block_until_ready(loss[which])
            jax.block_until_ready(_device_leaves(holders[which]))

        return run

    runs = {"ours": steps("ours", ours), "jit": steps("jit", jitted)}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {"ours": [], "jit": []}
    for i in range(args.rounds):
        for which in ("ours", "jit") if i % 2 else ("jit", "ours"):
            seconds[which].append(time_rounds(runs[which], 1) / args.steps)
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["jit"], strict=True))
    row = {
        "layers": layers,
        "width": width,
        "length": length,
        "ours_seconds": statistics.median(seconds["ours"]),
        "jit_seconds": statistics.median(seconds["jit"]),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }
    print(
        f"{layers} layers, width {width}: ours {row['ours_seconds'] * 1e3:.2f} ms, jit {row['jit_seconds'] * 1e3:.2f} ms"
        f" a step, ratio {row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})",
        flush=True,
    )
    return row


def _device_leaves(state: Any) -> list[Any]:
    """Arrays to wait for, of either kind of state."""
    leaves = jax.tree.leaves(state)
    return [
        piece
        for leaf in leaves
        for piece in (leaf.pieces.values() if isinstance(leaf, bactrian.DistributedArray) else (leaf,))
    ]


def main() -> None:
    """Print both parts; write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="steps a round")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind}", flush=True)
    numbers = check_numbers(args)
    sizes = [(2, 128, 64)] if args.small else [(12, 768, 512), (12, 1024, 1024)]
    speed = [compare_speed(args, *size) for size in sizes]
    if args.json:
        record = {"device": device.device_kind, "jax": jax.__version__, "numbers": numbers, "speed": speed}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
=======
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
    import worker

    import bactrian

    step, state, batch = worker.PROGRAMS[model]()
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
>>>>>>> refs/heads/models


if __name__ == "__main__":
    main()
