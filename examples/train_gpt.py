"""Train a GPT on text, as a pipeline.

    bactrian run -n 2 examples/train_gpt.py             two ranks under MPI
    bactrian run examples/train_gpt.py --stages 2       the same in one process, on virtual devices

The text is on every machine: the source files of Python's standard library, read as bytes. A train step is ordinary JAX
(and optax); what makes it a pipeline are the decorator `bactrian.parallelize` and `bactrian.value_and_grad`.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bactrian
from bactrian.driver.models.parameters import draw
from bactrian.driver.models.transformer import Transformer, cross_entropy

VOCABULARY = 256  # bytes


def read_text(max_bytes: int = 4_000_000) -> tuple[np.ndarray, np.ndarray]:
    """Bytes for training and for validation, split by file: every tenth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 10 == 9].append(file.read_bytes())
    train, validation = (np.frombuffer(b"".join(part), np.uint8)[:max_bytes] for part in parts)
    return train, validation


def batches(text: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Random windows of ``length + 1`` bytes, the same on every rank: int32, batch × (length + 1)."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(text) - length - 1, batch)
        yield np.stack([text[start : start + length + 1] for start in starts]).astype(np.int32)


def gpt(args: argparse.Namespace) -> Transformer:
    """A GPT of bytes, its embedding tied to its head."""
    shape = args.layers, args.width, args.heads, VOCABULARY, args.length
    return Transformer(*shape, tied=True, dropout=args.dropout)


def make_steps(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The initial state, the train step and the evaluation, the latter two as pipelines."""
    model = gpt(args)
    warmup = optax.warmup_cosine_decay_schedule(0.0, args.rate, max(1, args.steps // 10), max(2, args.steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(warmup, b2=0.98, weight_decay=0.01))
    params = draw(model.parameters(), jax.random.key(args.seed))
    state = {"params": params, "optimizer": optimizer.init(params), "key": jax.random.key(args.seed + 1)}

    @bactrian.parallelize(num_stages=args.stages, num_microbatches=args.microbatches, schedule=args.schedule)
    def train_step(state: dict[str, Any], tokens: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        next_key, key = jax.random.split(state["key"])

        def loss_fn(params: Any) -> jax.Array:
            dropout = jax.random.fold_in(key, bactrian.microbatch_index()) if args.dropout else None
            return cross_entropy(model.logits(params, tokens[:, :-1], dropout), tokens[:, 1:])

        loss, gradients = bactrian.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return {"params": params, "optimizer": opt_state, "key": next_key}, metrics

    @bactrian.parallelize(
        num_stages=args.stages, num_microbatches=args.microbatches, forward_only=True, out_reduction="mean"
    )
    def evaluate(params: Any, tokens: jax.Array) -> jax.Array:
        return cross_entropy(model.logits(params, tokens[:, :-1]), tokens[:, 1:])

    return state, train_step, evaluate


def validate(evaluate: Any, params: Any, text: np.ndarray, args: argparse.Namespace) -> float:
    """Bits per byte on the held-out files."""
    windows = batches(text, args.batch, args.length, seed=0)
    losses = [evaluate(params, next(windows)) for _ in range(args.validation_batches)]
    return float(np.mean([float(loss) for loss in losses])) / math.log(2)


def train(args: argparse.Namespace) -> None:
    """The training run; every rank executes this function."""
    text, held_out = read_text()
    state, train_step, evaluate = make_steps(args)
    reference = state if args.compare else None
    worst, say = 0.0, print if bactrian.is_main_rank() else _silent
    before = validate(evaluate, state["params"], held_out, args)
    say(f"{len(text):,} bytes to train on, {len(held_out):,} held out; untrained: {before:.3f} bits per byte")
    seconds, losses = 0.0, []
    windows = batches(text, args.batch, args.length, args.seed)
    with bactrian.progress("training", total=args.steps) as advance:
        for step in range(args.steps):
            tokens = next(windows)
            if step == args.steps - 1:
                train_step.compiled.observe(trace=True) if step else None
            begin = time.perf_counter()
            state, metrics = train_step(state, tokens)
            losses.append(float(metrics["loss"]) / math.log(2))
            seconds += time.perf_counter() - begin if step else 0.0  # the first step compiles
            if reference is not None:
                reference, expected = train_step.reference(reference, tokens)
                worst = max(worst, relative_error((state["params"], metrics), (reference["params"], expected)))
            advance()
            if step % args.report_every == 0 or step == args.steps - 1:
                speed = step * args.batch * args.length / seconds if step else 0.0
                trained = f"train {np.mean(losses[-args.report_every :]):.3f}"
                held = f"validation {validate(evaluate, state['params'], held_out, args):.3f} bits per byte"
                say(f"step {step + 1:5d}  {trained}  {held}  {speed:,.0f} tokens/s")
    if args.compare:
        say(f"largest relative error {worst:.1e}")
    write_run_files(train_step, args)
    params = bactrian.gather(state["params"])  # all ranks take part
    if bactrian.is_main_rank():
        print(f"\na sample:\n{sample(params, args)}")
        print(f"\nplan and trace are in {args.out}: open trace.json in Perfetto or chrome://tracing")


def relative_error(ours: Any, reference: Any) -> float:
    """Largest relative error of a leaf, in norm; tiny leaves are measured against the whole tree."""
    ours = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(bactrian.gather(ours))]
    expected = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(reference)]
    whole = math.sqrt(sum(float((leaf**2).sum()) for leaf in expected))
    return max(
        float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-3 * whole)
        for a, b in zip(ours, expected, strict=True)
    )


def write_run_files(train_step: Any, args: argparse.Namespace) -> None:
    """The plan as a table and as files, and the last step's timeline."""
    compiled = train_step.compiled
    if args.steps > 1:
        compiled.write_trace(args.out / "trace.json")
    if bactrian.is_main_rank():
        compiled.session.staged.save(args.out)
        (args.out / "plan.txt").write_text(str(compiled.plan))
        print(f"\n{compiled.plan}")


def sample(params: Any, args: argparse.Namespace, prompt: str = "def ", count: int = 200) -> str:
    """Text drawn from the model, byte by byte, on one device."""
    model, params = gpt(args), jax.tree.map(jnp.asarray, params)

    @jax.jit
    def draw(tokens: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.logits(params, tokens[None])[0, last]
        return jax.random.categorical(key, logits / 0.7)

    text = list(prompt.encode())
    for i in range(count):
        window = text[-args.length :]
        tokens = np.zeros(args.length, np.int32)
        tokens[: len(window)] = window
        text.append(int(draw(tokens, len(window) - 1, jax.random.key(args.seed + i))))
    return bytes(text).decode(errors="replace")


def _silent(*_: Any) -> None:
    """What ranks other than the first print."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stages", type=int, help="pipeline stages (default: one per rank)")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", choices=["1f1b", "eager-1f1b", "gpipe"], default="1f1b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate after warm-up")
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--validation-batches", type=int, default=4)
    parser.add_argument("--compare", action="store_true", help="also run the one-device reference and compare")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for plan and trace")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    train(parse_arguments())
