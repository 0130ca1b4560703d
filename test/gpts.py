"""One GPT in four frameworks, and an encoder that each layer of a decoder reads."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from cases import (
    BLOCKS,
    HEADS,
    SEQUENCE,
    VOCABULARY,
    WIDTH,
    Model,
    cross_entropy,
    pair_data,
    token_data,
)
from flax import linen, nnx

import bactrian


def causal_mask(length: int) -> jax.Array:
    """True where a query may look."""
    return jnp.tril(jnp.ones((length, length), bool))


def gpt_plain() -> Model:
    """Blocks as dicts; attention by einsum."""
    keys = iter(jax.random.split(jax.random.PRNGKey(0), 64))

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    def block() -> dict[str, jax.Array]:
        return {
            "scale1": jnp.ones(WIDTH),
            "qkv": matrix(WIDTH, 3 * WIDTH),
            "out": matrix(WIDTH, WIDTH),
            "scale2": jnp.ones(WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH),
            "down": matrix(4 * WIDTH, WIDTH),
        }

    params = {
        "embedding": matrix(WIDTH, VOCABULARY).T,
        "position": matrix(WIDTH, SEQUENCE).T,
        "blocks": [block() for _ in range(BLOCKS)],
        "head": matrix(WIDTH, VOCABULARY),
    }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale

    def attend(x: jax.Array, weights: Any) -> jax.Array:
        b, s, _ = x.shape
        q, k, v = jnp.moveaxis((x @ weights["qkv"]).reshape(b, s, 3, HEADS, WIDTH // HEADS), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
        scores = jnp.where(causal_mask(s), scores, -1e30)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(b, s, WIDTH) @ weights["out"]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        x = params["embedding"][batch["x"]] + params["position"]
        for weights in params["blocks"]:
            x = x + attend(norm(x, weights["scale1"]), weights)
            x = x + jax.nn.gelu(norm(x, weights["scale2"]) @ weights["up"]) @ weights["down"]
        return cross_entropy(x @ params["head"], batch["y"]), extra

    return Model(params, {}, loss, token_data)


class LinenBlock(linen.Module):
    """Attention and MLP with dropout; with ``memory``, also attention to an encoder's output."""

    dropout: float = 0.0
    causal: bool = True

    @linen.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        attention = functools.partial(linen.MultiHeadDotProductAttention, HEADS)
        fixed = self.dropout == 0.0
        h = attention()(linen.LayerNorm()(x), mask=causal_mask(x.shape[1]) if self.causal else None)
        x = x + linen.Dropout(self.dropout, deterministic=fixed)(h)
        if memory is not None:
            x = x + attention()(linen.LayerNorm()(x), memory)
        h = linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(linen.LayerNorm()(x))))
        return x + linen.Dropout(self.dropout, deterministic=fixed)(h)


class LinenGpt(linen.Module):
    """A GPT; the head may be the embedding, and each block may be rematerialized."""

    tied: bool
    dropout: float
    remat: bool

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = linen.Embed(VOCABULARY, WIDTH)
        x = embed(tokens) + self.param("position", linen.initializers.normal(0.1), (SEQUENCE, WIDTH))
        block = linen.remat(LinenBlock) if self.remat else LinenBlock
        for number in range(BLOCKS):
            x = block(self.dropout, name=f"block{number}")(x)
        x = linen.LayerNorm()(x)
        return embed.attend(x) if self.tied else linen.Dense(VOCABULARY)(x)


def gpt_linen(tied: bool = False, dropout: float = 0.0, remat: bool = False) -> Model:
    """The GPT with everything that linen has to offer."""
    model = LinenGpt(tied, dropout, remat)

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        rngs = {"dropout": jax.random.fold_in(key, bactrian.microbatch_index())} if dropout else {}
        return cross_entropy(model.apply({"params": params}, batch["x"], rngs=rngs), batch["y"]), extra

    keys = {"params": jax.random.PRNGKey(0), "dropout": jax.random.PRNGKey(1)}
    params = model.init(keys, jnp.zeros((1, SEQUENCE), jnp.int32))["params"]
    return Model(params, {}, loss, token_data, ("key/bias",))


class NnxBlock(nnx.Module):
    """Attention and MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=causal_mask(x.shape[1]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NnxGpt(nnx.Module):
    """A GPT."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.position = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(SEQUENCE, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def gpt_nnx() -> Model:
    """Split, merged in the loss."""
    graph, params, rest = nnx.split(NnxGpt(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return cross_entropy(nnx.merge(graph, params, rest)(batch["x"]), batch["y"]), extra

    return Model(params, {}, loss, token_data, ("key/bias",))


class EquinoxBlock(eqx.Module):
    """Attention and MLP of one sequence."""

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        key1, key2 = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key1)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=key2)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=causal_mask(len(x)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class EquinoxGpt(eqx.Module):
    """A GPT of one sequence."""

    embed: eqx.nn.Embedding
    position: jax.Array
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, BLOCKS + 3)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.position = jax.random.normal(keys[1], (SEQUENCE, WIDTH)) / 10
        self.blocks = [EquinoxBlock(key) for key in keys[3:]]
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[2])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embed)(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def gpt_equinox() -> Model:
    """Partitioned: the arrays are the state, the rest is closed over."""
    arrays, static = eqx.partition(EquinoxGpt(jax.random.PRNGKey(0)), eqx.is_array)

    def loss(arrays: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return cross_entropy(jax.vmap(eqx.combine(arrays, static))(batch["x"]), batch["y"]), extra

    return Model(arrays, {}, loss, token_data)


class EncoderDecoder(linen.Module):
    """Both decoder blocks read the encoder's output."""

    @linen.compact
    def __call__(self, source: jax.Array, tokens: jax.Array) -> jax.Array:
        embed = linen.Embed(VOCABULARY, WIDTH)
        memory = LinenBlock(causal=False, name="encoder")(embed(source))
        x = embed(tokens)
        for number in range(2):
            x = LinenBlock(name=f"decoder{number}")(x, memory)
        return linen.Dense(VOCABULARY)(x)


def encoder_decoder() -> Model:
    """The encoder's gradient is a sum over the decoder's layers."""
    model = EncoderDecoder()

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return cross_entropy(model.apply({"params": params}, batch["source"], batch["x"]), batch["y"]), extra

    tokens = jnp.zeros((1, SEQUENCE), jnp.int32)
    return Model(model.init(jax.random.PRNGKey(0), tokens, tokens)["params"], {}, loss, pair_data, ("key/bias",))
