"""Train steps of the models that layouts are judged on: MLP, GPT, mixture of experts, wide ResNet, encoder-decoder.

Sizes follow the evaluation of Alpa (Zheng et al., OSDI 2022): GPT as in GPT-3, in the mixture every second block has experts
that tokens are sent to as in GShard (Lepikhin et al., 2020), the ResNet is that of Zagoruyko and Komodakis (2016).
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

Loss = Callable[[Any, Any], jax.Array]


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


class Experts(nn.Module):
    """Each token goes to one expert, which takes at most ``2 * tokens / experts`` of a group."""

    experts: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, capacity = x.shape[-1], max(1, 2 * x.shape[1] // self.experts)
        up = self.param("up", nn.initializers.normal(0.02), (self.experts, width, 4 * width)).astype(x.dtype)
        down = self.param("down", nn.initializers.normal(0.02), (self.experts, 4 * width, width)).astype(x.dtype)
        gates = jax.nn.softmax(nn.Dense(self.experts, use_bias=False, dtype=x.dtype, name="router")(x))
        chosen = jax.nn.one_hot(gates.argmax(-1), self.experts, dtype=jnp.float32)
        place = jnp.cumsum(chosen, axis=1) * chosen - 1.0
        sent = jax.nn.one_hot(place.astype(jnp.int32), capacity, dtype=x.dtype)  # group, token, expert, place
        tokens = jnp.einsum("gsec,gsd->egcd", sent, x)
        hidden = nn.relu(jnp.einsum("egcd,edf->egcf", tokens, up))
        return jnp.einsum("gsec,gse,egcd->gsd", sent, gates, jnp.einsum("egcf,efd->egcd", hidden, down))


class Block(nn.Module):
    """Attention, to a source too where there is one, and a network of two layers or experts."""

    heads: int
    causal: bool = True
    experts: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=x.dtype)(x)
        x = x + Attention(self.heads, self.causal, name="self")(y, y)
        if source is not None:
            x = x + Attention(self.heads, False, name="cross")(nn.LayerNorm(dtype=x.dtype)(x), source)
        y = nn.LayerNorm(dtype=x.dtype)(x)
        if self.experts:
            return x + Experts(self.experts, name="experts")(y)
        y = jax.nn.gelu(nn.Dense(4 * width, dtype=x.dtype, name="up")(y))
        return x + nn.Dense(width, dtype=x.dtype, name="down")(y)


class Gpt(nn.Module):
    """A decoder; with ``experts`` every second block has them."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    experts: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = (nn.Embed(self.vocabulary, self.width, name="embed")(tokens) + position).astype(self.dtype)
        for i in range(self.layers):
            x = Block(self.heads, True, self.experts * (i % 2), name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")(x)


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


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, each normalized over the batch, beside a shortcut."""

    channels: int
    inner: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normalized(y: jax.Array) -> jax.Array:
            mean = y.mean((0, 1, 2))
            scale = self.param(f"scale{len(seen)}", nn.initializers.ones, y.shape[-1:])
            seen.append(0)
            return (y - mean) * jax.lax.rsqrt(jnp.square(y - mean).mean((0, 1, 2)) + 1e-5) * scale

        seen = list[int]()
        y = nn.relu(normalized(nn.Conv(self.inner, (1, 1), use_bias=False)(x)))
        y = nn.relu(normalized(nn.Conv(self.inner, (3, 3), (self.stride,) * 2, use_bias=False)(y)))
        y = normalized(nn.Conv(self.channels, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), (self.stride,) * 2, use_bias=False)(x)
        return nn.relu(x + y)


class WideResNet(nn.Module):
    """Four groups of bottlenecks, each with twice the channels of the one before."""

    blocks: tuple[int, ...]
    channels: int
    factor: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.channels, (7, 7), (2, 2), use_bias=False)(x))
        for group, count in enumerate(self.blocks):
            inner = self.channels * 2**group * self.factor
            for block in range(count):
                stride = 2 if group and not block else 1
                x = Bottleneck(4 * self.channels * 2**group, inner, stride, name=f"group{group}_{block}")(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def mlp(layers: int = 4, width: int = 256, batch: int = 512) -> Problem:
    """Square error of an MLP."""

    def data() -> Any:
        return {"x": jnp.ones((batch, width)), "y": jnp.zeros((batch, width))}

    return problem(Mlp(layers, width), lambda out, given: jnp.square(out - given["y"]).mean(), data)


def gpt(
    layers: int = 2, width: int = 128, heads: int = 8, vocabulary: int = 512, length: int = 128, batch: int = 16,
    experts: int = 0, dtype: Any = jnp.float32,
) -> Problem:  # fmt: skip
    """Cross-entropy of the next token; ``experts`` in every second block."""

    def data() -> Any:
        tokens = jnp.zeros((batch, length), jnp.int32)
        return {"x": tokens, "y": tokens}

    return problem(Gpt(layers, width, heads, vocabulary, length, experts, dtype), _entropy, data)


def encoder_decoder(
    layers: int = 2, width: int = 128, heads: int = 8, vocabulary: int = 512, length: int = 64, batch: int = 16
) -> Problem:
    """Cross-entropy of the next token, given a source."""

    def data() -> Any:
        tokens = jnp.zeros((batch, length), jnp.int32)
        return {"x": (tokens, tokens), "y": tokens}

    return problem(EncoderDecoder(layers, width, heads, vocabulary), _entropy, data)


def wide_resnet(
    blocks: tuple[int, ...] = (1, 1, 1, 1), channels: int = 16, factor: int = 2, size: int = 64, batch: int = 16,
    classes: int = 128,
) -> Problem:  # fmt: skip
    """Cross-entropy of classes of images."""

    def data() -> Any:
        return {"x": jnp.ones((batch, size, size, 3)), "y": jnp.zeros((batch,), jnp.int32)}

    return problem(WideResNet(blocks, channels, factor, classes), _entropy, data)


def _entropy(logits: jax.Array, given: Mapping[str, Any]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), given["y"]).mean()


SMALL: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "gpt": gpt,
    "moe": lambda: gpt(experts=8),
    "wide-resnet": wide_resnet,
    "encoder-decoder": encoder_decoder,
}
"""Small enough to run on virtual devices of a few cores."""

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def of_suite(suite: Mapping[str, Any], family: str, name: str, batch: int) -> Problem:
    """A model of Alpa's suite.

    Args:
        suite: tables ``gpt``, ``moe`` and ``wide_resnet``, by name ``hidden``, ``layers``, ``heads``, ``vocab`` and ``experts``, or
            ``depth``, ``channels`` and ``width``.
        batch: sequences of 1024 tokens, or images of 224 x 224, that are worked on at once.
    """
    row = suite[family][name]
    if family == "wide_resnet":
        return wide_resnet(_BLOCKS[row["depth"]], row["channels"], row["width"], 224, batch, 1024)
    return gpt(
        row["layers"], row["hidden"], row["heads"], row["vocab"], 1024, batch, row.get("experts", 0), jnp.bfloat16
    )
