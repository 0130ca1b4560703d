"""Train steps of the models that layouts are judged on: MLP, GPT, mixture of experts, wide ResNet, encoder-decoder.

GPT, mixture and ResNet are those of the package (`bactrian.driver.models`), the others are flax with optax's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bactrian
from bactrian.driver.models.alpa_suite import small
from bactrian.driver.models.training_program import TrainingProgram


@dataclass(frozen=True)
class Problem:
    """A train step, and functions that make its state and its batch (``jax.eval_shape`` of them makes abstract ones)."""

    step: Callable[[Any, Any], Any]
    state: Callable[[], Any]
    batch: Callable[[], Any]

    def shapes(self) -> tuple[Any, Any]:
        """Abstract arguments."""
        return jax.eval_shape(self.state), jax.eval_shape(self.batch)


def problem(model: nn.Module, loss: Callable[[jax.Array, Any], jax.Array], batch: Callable[[], Any]) -> Problem:
    """A step of AdamW on a model whose input is ``batch["x"]``."""
    optimizer = optax.adamw(1e-3)

    def state() -> Any:
        x = jax.tree.map(lambda leaf: leaf[:1], batch()["x"])
        params = model.init(jax.random.key(0), x)
        return {"params": params, "optimizer": optimizer.init(params)}

    def step(state: Any, batch: Any) -> Any:
        def of(params: Any) -> jax.Array:
            return loss(model.apply(params, batch["x"]), batch)

        value, gradients = bactrian.value_and_grad(of)(state["params"])
        updates, new = optimizer.update(gradients, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": new}, value

    return Problem(step, state, batch)


class Mlp(nn.Module):
    """Layers of one width."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(4 * self.width)(x)))
        return x


class Attention(nn.Module):
    """Several heads, each query of which sees all keys or those before it."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array) -> jax.Array:
        size = x.shape[-1] // self.heads
        shape = (self.heads, size)
        q = nn.DenseGeneral(shape, use_bias=False, dtype=x.dtype, name="q")(x)
        k = nn.DenseGeneral(shape, use_bias=False, dtype=x.dtype, name="k")(source)
        v = nn.DenseGeneral(shape, use_bias=False, dtype=x.dtype, name="v")(source)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(size).astype(x.dtype)
        if self.causal:
            mask = jnp.tril(jnp.ones((x.shape[1], source.shape[1]), bool))
            scores = jnp.where(mask, scores, jnp.finfo(x.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, dtype=x.dtype, name="o")(mixed)


class Block(nn.Module):
    """Attention, to a source too where there is one, and a network of two layers."""

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=x.dtype)(x)
        x = x + Attention(self.heads, self.causal, name="self")(y, y)
        if source is not None:
            x = x + Attention(self.heads, False, name="cross")(nn.LayerNorm(dtype=x.dtype)(x), source)
        y = nn.LayerNorm(dtype=x.dtype)(x)
        y = jax.nn.gelu(nn.Dense(4 * width, dtype=x.dtype, name="up")(y))
        return x + nn.Dense(width, dtype=x.dtype, name="down")(y)


class EncoderDecoder(nn.Module):
    """Every decoder block reads what the encoder gives."""

    layers: int
    width: int
    heads: int
    vocabulary: int

    @nn.compact
    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        source, x = embed(inputs[0]), embed(inputs[1])
        for i in range(self.layers):
            source = Block(self.heads, False, name=f"encoder_{i}")(source)
        for i in range(self.layers):
            x = Block(self.heads, name=f"decoder_{i}")(x, source)
        return nn.Dense(self.vocabulary, use_bias=False, name="head")(x)


def mlp(layers: int = 4, width: int = 256, batch: int = 512) -> Problem:
    """Square error of an MLP."""

    def data() -> Any:
        return {"x": jnp.ones((batch, width)), "y": jnp.zeros((batch, width))}

    return problem(Mlp(layers, width), lambda out, given: jnp.square(out - given["y"]).mean(), data)


def encoder_decoder(
    layers: int = 2, width: int = 128, heads: int = 8, vocabulary: int = 512, length: int = 64, batch: int = 16
) -> Problem:
    """Cross-entropy of the next token, given a source."""

    def data() -> Any:
        tokens = jnp.zeros((batch, length), jnp.int32)
        return {"x": (tokens, tokens), "y": tokens}

    return problem(EncoderDecoder(layers, width, heads, vocabulary), _entropy, data)


def _entropy(logits: jax.Array, given: Mapping[str, Any]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), given["y"]).mean()


def _of_package(family: str) -> Problem:
    made = small(family)
    return Problem(made.step, lambda: made.state(jax.random.key(0)), lambda: _data(made))


def _data(made: TrainingProgram) -> Any:
    """A batch of ones."""
    return {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in made.batch.items()}


SMALL: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "gpt": lambda: _of_package("gpt"),
    "moe": lambda: _of_package("moe"),
    "wide-resnet": lambda: _of_package("wresnet"),
    "encoder-decoder": encoder_decoder,
}
"""Small enough to run on virtual devices of a few cores."""
