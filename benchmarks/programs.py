"""The train steps that pipelines are measured on: each a parallelized step, its state and a batch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Program = tuple[Any, Any, Any]  # parallelized step, state, batch


def mlp(width: int = 512, batch: int = 32, length: int = 128, layers: int = 8) -> Program:
    """``y = x + relu(x W + b)``, mean squared error, SGD with 1e-3: the torch peer's model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(7)
    bound = width**-0.5
    state = [
        {
            "w": random.uniform(-bound, bound, (width, width)).astype(np.float32),
            "b": random.uniform(-bound, bound, width).astype(np.float32),
        }
        for _ in range(layers)
    ]
    data = tuple(random.standard_normal((2, batch, length, width), dtype=np.float32))

    def loss(layers: Any, batch: Any) -> jax.Array:
        x, y = batch
        for layer in layers:
            x = x + jax.nn.relu(x @ layer["w"] + layer["b"])
        return jnp.square(x - y).mean()

    return _with_sgd(loss), state, data


def gpt(layers: int = 4, width: int = 128, batch: int = 16) -> Program:
    """The example's GPT with AdamW and dropout."""
    import jax

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    example = importlib.import_module("train_gpt")
    args = argparse.Namespace(
        layers=layers, width=width, heads=4, length=128, batch=batch, dropout=0.1,
        rate=3e-3, steps=400, seed=0, stages=None, microbatches=8, schedule="1f1b",
    )  # fmt: skip
    state, step, _ = example.make_steps(args)
    text, _ = example.read_text()
    return step, jax.device_get(state), next(example.batches(text, batch, args.length, 0))


def words(vocabulary: int = 4096, width: int = 128, layers: int = 6, batch: int = 16, length: int = 64) -> Program:
    """An embedding, residual layers, and a head that takes most of the time; cross-entropy, SGD."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(7)
    state = {
        "embedding": random.standard_normal((vocabulary, width), dtype=np.float32) / width,
        "layers": [random.standard_normal((width, width), dtype=np.float32) / width for _ in range(layers)],
        "head": random.standard_normal((width, vocabulary), dtype=np.float32) / width,
    }
    data = {name: random.integers(0, vocabulary, (batch, length), np.int32) for name in ("word", "next")}

    def loss(state: Any, batch: Any) -> jax.Array:
        x = state["embedding"][batch["word"]]
        for w in state["layers"]:
            x = x + jax.nn.relu(x @ w)
        scores = jax.nn.log_softmax(x @ state["head"])
        return -jnp.take_along_axis(scores, batch["next"][..., None], -1).mean()

    return _with_sgd(loss), state, data


def tables(count: int = 4, rows: int = 16384, width: int = 128, layers: int = 8, batch: int = 512) -> Program:
    """The sum of what several large tables have, residual networks of two layers, and one number; squared error, SGD."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(7)

    def weights(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32) * shape[-2] ** -0.5

    state = {
        "tables": [weights(rows, width) for _ in range(count)],
        "layers": [(weights(width, 4 * width), weights(4 * width, width)) for _ in range(layers)],
        "head": weights(width, 1),
    }
    data = random.integers(0, rows, (batch, count), np.int32), random.standard_normal((batch, 1), dtype=np.float32)

    def loss(state: Any, batch: Any) -> jax.Array:
        keys, y = batch
        x = sum(table[keys[:, number]] for number, table in enumerate(state["tables"]))
        for up, down in state["layers"]:
            x = x + jax.nn.relu(x @ up) @ down
        return jnp.square(x @ state["head"] - y).mean()

    return _with_sgd(loss), state, data


def transformer(layers: int = 8, width: int = 512, heads: int = 8, batch: int = 8, length: int = 128) -> Program:
    """Blocks of causal attention and of two layers with GELU, each behind a layer norm; mean squared error, SGD: the torch
    peer's model, with a quarter of its batch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(7)

    def linear(inputs: int, outputs: int) -> Any:
        bound = inputs**-0.5
        weights = random.uniform(-bound, bound, (inputs, outputs)).astype(np.float32)
        return {"w": weights, "b": random.uniform(-bound, bound, outputs).astype(np.float32)}

    def block() -> Any:
        shapes = {"qkv": (width, 3 * width), "o": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
        norms = {name: {"w": np.ones(width, np.float32), "b": np.zeros(width, np.float32)} for name in ("n1", "n2")}
        return {name: linear(*shape) for name, shape in shapes.items()} | norms

    state = [block() for _ in range(layers)]
    data = tuple(random.standard_normal((2, batch, length, width), dtype=np.float32))

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + p["b"]

    def norm(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, epsilon=1e-5) * p["w"] + p["b"]

    def attention(p: Any, x: jax.Array) -> jax.Array:
        split = apply(p["qkv"], x).reshape(*x.shape[:2], 3, heads, width // heads)
        q, k, v = jnp.moveaxis(split, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
        scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return apply(p["o"], mixed.reshape(x.shape))

    def loss(state: Any, batch: Any) -> jax.Array:
        x, y = batch
        for p in state:
            x = x + attention(p, norm(p["n1"], x))
            x = x + apply(p["down"], jax.nn.gelu(apply(p["up"], norm(p["n2"], x))))
        return jnp.square(x - y).mean()

    return _with_sgd(loss), state, data


def mixture(
    width: int = 128, experts: int = 8, dense: int = 6, mixed: int = 2, batch: int = 32, length: int = 64
) -> Program:
    """Residual networks of two layers, the last of which are a mixture of experts each: tokens have as much room in every
    expert as if all went to one of two; mean squared error, SGD."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(7)

    def weights(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32) * shape[-2] ** -0.5

    state = {
        "dense": [(weights(width, 4 * width), weights(4 * width, width)) for _ in range(dense)],
        "mixed": [
            (weights(width, experts), weights(experts, width, 4 * width), weights(experts, 4 * width, width))
            for _ in range(mixed)
        ],
    }
    data = tuple(random.standard_normal((2, batch, length, width), dtype=np.float32))

    def loss(state: Any, batch: Any) -> jax.Array:
        x, y = batch
        for up, down in state["dense"]:
            x = x + jax.nn.relu(x @ up) @ down
        room = length // 2
        for gate, up, down in state["mixed"]:
            scores = jax.nn.softmax(x @ gate)
            chosen = jax.nn.one_hot(scores.argmax(-1), experts)
            place = jnp.cumsum(chosen, axis=1) * chosen - 1
            sent = jax.nn.one_hot(place.astype(np.int32), room) * chosen[..., None]  # by sequence, token, expert, place
            inside = jnp.einsum("btec,btw->ebcw", sent, x)
            made = jnp.einsum("ebcw,ewh->ebch", inside, up)
            back = jnp.einsum("ebch,ehw->ebcw", jax.nn.relu(made), down)
            x = x + jnp.einsum("btec,ebcw,bte->btw", sent, back, scores)
        return jnp.square(x - y).mean()

    return _with_sgd(loss), state, data


def unet(channels: int = 16, size: int = 32, batch: int = 32) -> Program:
    """Convolutions down to an eighth of the image and up again, where each level also gets what the way down had there;
    mean squared error, SGD."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random, levels = np.random.default_rng(7), 3
    widths = [channels * 2**level for level in range(levels + 1)]

    def weights(inputs: int, outputs: int) -> Any:
        return random.standard_normal((3, 3, inputs, outputs), dtype=np.float32) * (9 * inputs) ** -0.5

    state = {
        "in": weights(3, channels),
        "down": [weights(widths[level], widths[level + 1]) for level in range(levels)],
        "up": [weights(widths[level + 1] + widths[level], widths[level]) for level in reversed(range(levels))],
        "out": weights(channels, 3),
    }
    data = tuple(random.standard_normal((2, batch, size, size, 3), dtype=np.float32))

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(state: Any, batch: Any) -> jax.Array:
        x, y = batch
        x, before = jax.nn.relu(convolve(x, state["in"])), list[jax.Array]()
        for w in state["down"]:
            before.append(x)
            half = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]).mean((2, 4))
            x = jax.nn.relu(convolve(half, w))
        for w in state["up"]:
            twice = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = jax.nn.relu(convolve(jnp.concatenate([twice, before.pop()], -1), w))
        return jnp.square(convolve(x, state["out"]) - y).mean()

    return _with_sgd(loss), state, data


def _with_sgd(loss: Callable[[Any, Any], Any]) -> Any:
    """The step of a loss."""
    import jax

    import bactrian

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, state, gradients), value

    return bactrian.parallelize(step)


PROGRAMS: dict[str, Callable[..., Program]] = {
    "mlp": mlp,
    "gpt": gpt,
    "words": words,
    "tables": tables,
    "transformer": transformer,
    "mixture": mixture,
    "unet": unet,
}
