"""Train a small GPT on the source of the Python standard library, as a pipeline.

    bactrian run examples/train_gpt.py            one process, a virtual device for each stage
    bactrian run -n 2 examples/train_gpt.py       two processes, one stage each

The train step below is plain JAX, flax and optax. What makes it a pipeline are three names: ``bactrian.value_and_grad``
says where a microbatch ends, ``bactrian.microbatch_index`` gives each microbatch its own dropout, and
``bactrian.parallelize`` does the rest.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import bactrian

SEQUENCE, BATCH, VOCABULARY = 128, 16, 256  # the vocabulary is all bytes


class Block(nn.Module):
    """Attention and MLP, each with dropout."""

    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        mask = nn.make_causal_mask(x[..., 0])
        h = nn.SelfAttention(num_heads=4, use_bias=False)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dropout(self.dropout, deterministic=not train)(nn.Dense(x.shape[-1])(h))


class Gpt(nn.Module):
    """Bytes in, logits of the next byte out; input and output share the embedding."""

    layers: int = 6
    width: int = 192
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        embed = nn.Embed(VOCABULARY, self.width)
        position = self.param("position", nn.initializers.normal(0.02), (SEQUENCE, self.width))
        x = embed(tokens) + position[: tokens.shape[1]]
        for _ in range(self.layers):
            x = Block(self.dropout)(x, train)
        return embed.attend(nn.LayerNorm()(x))


def bits_per_byte(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in bits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean() / jnp.log(2.0)


def make_steps(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The initial state, the train step and the validation step."""
    model = Gpt(dropout=args.dropout)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, min(50, args.steps // 4), args.steps, args.rate / 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    pipeline = {"num_stages": args.stages, "num_microbatches": args.microbatches, "schedule": args.schedule}

    def loss(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.fold_in(key, bactrian.microbatch_index())} if args.dropout else {}
        return bits_per_byte(model.apply({"params": params}, batch[:, :-1], train=True, rngs=rngs), batch[:, 1:])

    @bactrian.parallelize(**pipeline)
    def train_step(state: Any, batch: jax.Array) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state["params"], batch, state["key"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "key": jax.random.fold_in(state["key"], 1)}, value

    @bactrian.parallelize(**pipeline, forward_only=True, out_reduction="mean")
    def validate(params: Any, batch: jax.Array) -> jax.Array:
        return bits_per_byte(model.apply({"params": params}, batch[:, :-1]), batch[:, 1:])

    key = jax.random.PRNGKey(args.seed)
    params = model.init(key, jnp.zeros((1, SEQUENCE), jnp.int32))["params"]
    state = {"params": params, "opt": optimizer.init(params), "key": key}
    return jax.device_get(state), train_step, validate


def standard_library() -> tuple[np.ndarray, np.ndarray]:
    """All bytes of the standard library's Python files: every tenth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not {"site-packages", "test"} & set(path.parts))
    text = [path.read_bytes() for path in files]
    train, validation = b"".join(t for i, t in enumerate(text) if i % 10), b"".join(text[::10])
    return np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)


def sample_batch(data: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Random windows: the same ones on every rank, and whenever this step is repeated."""
    starts = np.random.default_rng((seed, step)).integers(0, len(data) - SEQUENCE, BATCH)
    return data[starts[:, None] + np.arange(SEQUENCE + 1)].astype(np.int32)


def generate(params: Any, prompt: str, length: int, temperature: float = 0.7) -> str:
    """Sample text from gathered parameters with plain JAX."""
    model = Gpt()

    @jax.jit
    def next_byte(tokens: jax.Array, end: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[None])[0, end - 1]
        return jax.random.categorical(key, logits / temperature)

    text = list(prompt.encode())
    for key in jax.random.split(jax.random.PRNGKey(0), length):
        window = text[-SEQUENCE:]
        padded = np.zeros(SEQUENCE, np.int32)
        padded[: len(window)] = window
        text.append(int(next_byte(padded, len(window), key)))
    return bytes(text).decode(errors="replace")


def largest_relative_error(ours: Any, reference: Any) -> float:
    """Over the leaves of parameters: distance over the leaf's norm, or a thousandth of the tree's if that is larger."""
    mine, theirs = jax.tree.leaves(ours), jax.tree.leaves(reference)
    floor = 1e-3 * np.sqrt(sum(np.linalg.norm(x) ** 2 for x in theirs))
    return max(float(np.linalg.norm(x - y) / max(np.linalg.norm(y), floor)) for x, y in zip(mine, theirs, strict=True))


def write_run_files(step: Any, out: Path) -> None:
    """Leave the plan in the run's folder."""
    step.plan().save(out / "plan")


def train(args: argparse.Namespace) -> None:
    """Train, validate now and then, and sample some text at the end."""
    state, train_step, validate = make_steps(args)
    data, validation = standard_library()
    main_rank = is_main_rank()
    if main_rank:
        count = sum(x.size for x in jax.tree.leaves(state["params"]))
        print(f"{count / 1e6:.1f} M parameters, {len(data) / 1e6:.1f} MB to train on, {len(validation) / 1e6:.1f} MB held out")
    reference, compared, worst = state, args.steps if args.compare is True else args.compare or 0, 0.0

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, disable=not main_rank) as progress:
        task = progress.add_task("", total=args.steps, note="")
        start, done = time.perf_counter(), 0
        for step in range(args.steps):
            batch = sample_batch(data, args.seed, step)
            state, loss = train_step(state, batch)
            if step < compared:
                reference, _ = train_step.reference(reference, batch)
                worst = max(worst, largest_relative_error(bactrian.gather(state["params"]), reference["params"]))
            if step == 0:
                jax.block_until_ready(loss)
                start = time.perf_counter()  # compiled by now
                write_run_files(train_step, args.out)
            if (step + 1) % args.validate_every == 0 or step + 1 == args.steps:
                rate = (step - done) * BATCH * SEQUENCE / (time.perf_counter() - start)
                held_out = np.mean([float(validate(state["params"], sample_batch(validation, 0, i))) for i in range(4)])
                line = f"step {step + 1}: {float(loss):.2f} bits per byte, {held_out:.2f} held out, {rate:,.0f} tokens/s"
                if main_rank:
                    progress.console.print(line)
                start, done = time.perf_counter(), step
            progress.update(task, advance=1)
    params = bactrian.gather(state["params"])  # on all ranks
    if main_rank:
        if compared:
            print(f"largest relative error {worst:.1e}")
        print(generate(params, "def ", args.sample))


def is_main_rank() -> bool:
    """Whether this process is rank 0, also without mpirun."""
    try:
        from mpi4py import MPI
    except ImportError:
        return True
    return MPI.COMM_WORLD.Get_rank() == 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small GPT on the Python standard library, as a pipeline.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stages", type=int, default=None, help="default: one for each rank")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--schedule", choices=["1f1b", "gpipe"], default="1f1b")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=40, metavar="STEPS")
    parser.add_argument("--sample", type=int, default=300, metavar="BYTES", help="text to write at the end")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for the plan and the trace")
    parser.add_argument(
        "--compare", nargs="?", type=int, const=True, metavar="STEPS",
        help="also run all steps, or the first STEPS, on one device, and print the largest relative error",
    )  # fmt: skip
    train(parser.parse_args())


if __name__ == "__main__":
    main()
