"""GPT, and a mixture of experts in its likeness: every second block has experts in the place of its MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bactrian.driver.models.experts import expert_parameters, mixture
from bactrian.driver.models.optimizers import adamw
from bactrian.driver.models.parameters import Parameter, Tree, matrix
from bactrian.driver.models.training_program import Batch, TrainingProgram


@dataclass(frozen=True)
class Transformer:
    """A decoder of tokens (Radford et al., "Language models are unsupervised multitask learners", 2019).

    Parameters are float32 and cast where they are used; losses and statistics of norms are float32 too.

    Attributes:
        layers: blocks of attention and an MLP, each behind a layer norm and beside a residual connection.
        width: of what goes from block to block.
        heads: of the attention.
        vocabulary: tokens that there are.
        length: of the longest sequence.
        inner: width of the MLPs and experts; 4 times ``width`` by default.
        experts: of every second block, from the second one on; none by default.
        group: tokens that compete for places at experts, see `mixture`.
        tied: whether the embedding is the head, too.
        dropout: share of what each part of a block gives that is dropped, where there is a key.
        dtype: that products are computed in.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    inner: int = 0
    experts: int = 0
    group: int = 2048
    tied: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def parameters(self) -> Tree:
        """A tree of `Parameter`."""
        tree = {
            "embed": Parameter((self.vocabulary, self.width), 0.02),
            "position": Parameter((self.length, self.width), 0.02),
            "blocks": [self._block_parameters(number) for number in range(self.layers)],
            "norm": _norm_parameters(self.width),
        }
        return tree if self.tied else tree | {"head": matrix(self.width, self.vocabulary, inputs=self.width)}

    def _block_parameters(self, number: int) -> Tree:
        width, inner = self.width, self.inner or 4 * self.width
        block = {
            "norm_1": _norm_parameters(width),
            "qkv": matrix(width, 3, self.heads, width // self.heads, inputs=width),
            "qkv_bias": Parameter((3, self.heads, width // self.heads)),
            "out": matrix(self.heads, width // self.heads, width, inputs=width),
            "out_bias": Parameter((width,)),
            "norm_2": _norm_parameters(width),
        }
        if self.experts and number % 2:
            return block | {"experts": expert_parameters(self.experts, width, inner)}
        return block | {
            "up": matrix(width, inner, inputs=width),
            "up_bias": Parameter((inner,)),
            "down": matrix(inner, width, inputs=inner),
            "down_bias": Parameter((width,)),
        }

    def logits(self, params: Tree, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """What is predicted of the token behind each one: float32, batch × length × vocabulary.

        Args:
            params: of the shapes of `parameters`.
            tokens: integers, batch × length.
            key: for dropout; without one nothing is dropped.
        """
        x = (params["embed"][tokens] + params["position"][: tokens.shape[1]]).astype(self.dtype)
        for number, block in enumerate(params["blocks"]):
            keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, number))
            x = x + self._dropped(self._attention(block, _norm(block["norm_1"], x)), keys[0])
            x = x + self._dropped(self._mlp(block, _norm(block["norm_2"], x)), keys[1])
        head = params["embed"].T if self.tied else params["head"]
        return (_norm(params["norm"], x) @ head.astype(self.dtype)).astype(jnp.float32)

    def loss(self, params: Tree, batch: Batch) -> jax.Array:
        """Mean cross-entropy in nats of ``batch["labels"]``, given ``batch["tokens"]``."""
        return cross_entropy(self.logits(params, batch["tokens"]), batch["labels"])

    def training(self, batch: int) -> TrainingProgram:
        """A step of AdamW on so many sequences."""
        tokens = jax.ShapeDtypeStruct((batch, self.length), jnp.int32)
        return TrainingProgram(self.parameters(), self.loss, {"tokens": tokens, "labels": tokens}, adamw())

    def _attention(self, block: Tree, x: jax.Array) -> jax.Array:
        """Each token reads of those up to itself (Vaswani et al., "Attention is all you need", 2017)."""
        qkv = jnp.einsum("bsd,dthk->tbshk", x, block["qkv"].astype(x.dtype))
        query, key, value = qkv + block["qkv_bias"].astype(x.dtype)[:, None, None]
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / math.sqrt(query.shape[-1])
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(x.dtype).min))
        mixed = jnp.einsum("bhqs,bshk->bqhk", weights, value)
        return jnp.einsum("bqhk,hkd->bqd", mixed, block["out"].astype(x.dtype)) + block["out_bias"].astype(x.dtype)

    def _mlp(self, block: Tree, x: jax.Array) -> jax.Array:
        if "experts" in block:
            return mixture(block["experts"], x, self.group)
        up = jax.nn.gelu(x @ block["up"].astype(x.dtype) + block["up_bias"].astype(x.dtype))
        return up @ block["down"].astype(x.dtype) + block["down_bias"].astype(x.dtype)

    def _dropped(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is None or not self.dropout:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x / (1 - self.dropout), 0)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all labels of the negative logarithm of their probability."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def _norm_parameters(width: int) -> Tree:
    return {"scale": Parameter((width,), mean=1.0), "bias": Parameter((width,))}


def _norm(params: Tree, x: jax.Array) -> jax.Array:
    """Layer norm (Ba, Kiros and Hinton, "Layer normalization", 2016), computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    return (wide * params["scale"] + params["bias"]).astype(x.dtype)
