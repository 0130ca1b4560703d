"""What programs of the numerics tests are made of: a case, its data, losses and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bactrian

WIDTH, HEADS, VOCABULARY, SEQUENCE, BATCH, STEPS = 32, 4, 64, 16, 8, 3
BLOCKS = 2  # of a transformer
LAYERS = 4  # of an MLP or a conv net
MAX_STAGES = 4

Loss = Callable[..., Any]


class Model(NamedTuple):
    """Parameters, per-step extras (statistics, or an empty dict) and ``loss(params, extra, batch, key)``.

    The loss is the mean over the examples it gets, and returns ``(loss, new extra)``. ``data(random, step)`` makes a batch.
    """

    params: Any
    extra: Any
    loss: Loss
    data: Callable[[np.random.Generator], dict[str, np.ndarray]]
    zero_gradient_leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A train step, where it starts, the further arguments of each step, and how it is parallelized."""

    step: Callable[..., Any]
    state: Any
    batches: list[tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    max_stages: int = MAX_STAGES
    zero_gradient_leaves: tuple[str, ...] = ()
    next_state: Callable[[Any], Any] = lambda result: result[0]


@dataclass(frozen=True)
class Case:
    """A program by name; ``make`` builds it anew each time."""

    name: str
    make: Callable[[], Built]


def token_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Tokens and the tokens to predict."""
    tokens = random.integers(0, VOCABULARY, (BATCH, SEQUENCE + 1), dtype=np.int32)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def pair_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Source tokens, target tokens and the tokens to predict."""
    return token_data(random) | {"source": random.integers(0, VOCABULARY, (BATCH, SEQUENCE), dtype=np.int32)}


def vector_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Vectors to regress."""
    x, y = random.standard_normal((2, BATCH, WIDTH), dtype=np.float32)
    return {"x": x, "y": y}


def image_data(random: np.random.Generator) -> dict[str, np.ndarray]:
    """Images and their classes."""
    x = random.standard_normal((BATCH, 8, 8, 3), dtype=np.float32)
    return {"x": x, "y": random.integers(0, 10, BATCH, dtype=np.int32)}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all elements."""
    return jnp.square(prediction - target).mean()


def on_host(tree: Any) -> Any:
    """Arrays as numpy arrays of their own, so that no one can donate them away; keys stay as they are."""

    def leaf(x: Any) -> Any:
        return np.array(x) if eqx.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(leaf, tree)


def batches(data: Callable[[np.random.Generator], Any], steps: int = STEPS) -> list[tuple[Any, ...]]:
    """The same data each time."""
    random = np.random.default_rng(0)
    return [(data(random),) for _ in range(steps)]


def matrices(*names: str) -> dict[str, np.ndarray]:
    """A square matrix per name."""
    random = np.random.default_rng(1)
    return {name: random.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5 for name in names}


def sgd_step(
    loss: Callable[[Any, Any], jax.Array], reduction: str = "mean", rate: float = 0.1
) -> Callable[[Any, Any], Any]:
    """``params -> params - rate * gradient`` of ``loss(params, batch)``."""

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss, reduction=reduction)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradients), value

    return step


def options(stages: int, microbatches: int, **more: Any) -> dict[str, Any]:
    """Arguments of ``parallelize``."""
    return {"num_stages": stages, "num_microbatches": microbatches, **more}


def chain_loss(names: str) -> Callable[[Any, Any], jax.Array]:
    """``tanh(x W)`` for each name."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for name in names:
            x = jnp.tanh(x @ params[name])
        return squared_error(x, batch["y"])

    return loss
