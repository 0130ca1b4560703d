"""Small models in several frameworks, and a train step of each with an optimizer, as named cases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from cases import BATCH, LAYERS, Built, Case, Model, batches, cross_entropy, image_data, on_host
from flax import linen
from gpts import encoder_decoder, gpt_equinox, gpt_linen, gpt_nnx, gpt_plain
from mlps import mlp_equinox, mlp_linen, mlp_nnx, mlp_plain

import bactrian


class ConvNet(linen.Module):
    """Residual convolutions with batch normalization."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(16, (3, 3), use_bias=False)(x)
        for _ in range(LAYERS):
            h = linen.Conv(16, (3, 3), use_bias=False)(x)
            x = x + linen.relu(linen.BatchNorm(use_running_average=False)(h))
        return linen.Dense(10)(x.mean((1, 2)))


def conv_net() -> Model:
    """Batch statistics are part of the state and come back as aux."""
    model = ConvNet()

    def loss(params: Any, statistics: Any, batch: Any, key: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        logits, new = model.apply(variables, batch["x"], mutable=["batch_stats"])
        return cross_entropy(logits, batch["y"]), new["batch_stats"]

    variables = model.init(jax.random.PRNGKey(0), jnp.zeros((1, 8, 8, 3)))
    return Model(variables["params"], variables["batch_stats"], loss, image_data)


MODELS: dict[str, Callable[[], Model]] = {
    "mlp/plain": mlp_plain,
    "mlp/linen": mlp_linen,
    "mlp/nnx": mlp_nnx,
    "mlp/equinox": mlp_equinox,
    "gpt/plain": gpt_plain,
    "gpt/nnx": gpt_nnx,
    "gpt/equinox": gpt_equinox,
    "encoder-decoder/linen": encoder_decoder,
    "conv/linen": conv_net,
} | {
    f"gpt{'-tied' * tied}{'-dropout' * (dropout > 0)}{'-remat' * remat}/linen": functools.partial(
        gpt_linen, tied, dropout, remat
    )
    for tied in (False, True)
    for dropout in (0.0, 0.1)
    for remat in (False, True)
}

# Covers each pair of tied, dropout and remat; the others run with --long.
GPT_COVER = ("gpt/linen", "gpt-dropout-remat/linen", "gpt-tied-remat/linen", "gpt-tied-dropout/linen")
# The frameworks differ in their pytrees: the MLP is made with each, the GPT with two.
SMALL_MODELS = (*(name for name in MODELS if name.startswith("mlp")), "conv/linen")
LARGE_MODELS_COVER = ("encoder-decoder/linen", "gpt/plain", *GPT_COVER)
ONE_OF_EACH = ("mlp/plain", "gpt-tied-dropout/linen", "encoder-decoder/linen", "conv/linen")  # of each architecture

# Optimizers


def skip_if_not_finite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leave parameters and optimizer state as they are when any gradient is not finite."""

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradients))
        updates, new = inner.update(gradients, state, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0.0), updates)
        return updates, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)

    return optax.GradientTransformation(inner.init, update)


def adamw() -> optax.GradientTransformation:
    """AdamW with warm-up, a global norm and an all-finite check: two groups of scalars over all stages."""
    schedule = optax.linear_schedule(1e-4, 1e-3, 10)
    return skip_if_not_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)))


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1e-2),
    "adamw": adamw,
}


def arrays_of(tree: Any) -> Any:
    """The tree with ``None`` in the place of functions and other static leaves."""
    return eqx.filter(tree, eqx.is_array)


@functools.cache
def made(name: str) -> Model:
    """A model, its parameters on the host: frameworks make them op by op, which takes longer than most steps."""
    model = MODELS[name]()
    return model._replace(params=on_host(model.params), extra=on_host(model.extra))


def train_case(
    model: str,
    optimizer: str = "sgd",
    loss: str = "mean",
    microbatches: int = 4,
    stages: int = 2,
    schedule: str = "1f1b",
    result: str = "state",
    **_: Any,
) -> Case:
    """A model, an optimizer and a loss as one train step; ``result`` may be ``"gradients"`` to get these too."""
    names = (model, optimizer, loss, f"m{microbatches}", f"s{stages}", schedule, result)

    def make() -> Built:
        built, tx = made(model), OPTIMIZERS[optimizer]()
        scale = 1.0 if loss == "mean" else BATCH / microbatches  # a sum over examples, not a mean

        def total(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
            value, extra = built.loss(params, extra, batch, key)
            return value * scale, extra

        def step(state: Any, batch: Any) -> Any:
            arrays, static = eqx.partition(state["params"], eqx.is_array)
            value_and_grad = bactrian.value_and_grad(
                lambda arrays, *rest: total(eqx.combine(arrays, static), *rest), has_aux=True, reduction=loss
            )
            (value, extra), gradients = value_and_grad(arrays, state["extra"], batch, state["key"])
            if loss == "sum":
                scaled = jax.tree.map(lambda g: g / BATCH, gradients)  # else the step would be too long
            else:
                scaled = gradients
            updates, opt = tx.update(scaled, state["opt"], arrays)
            params = eqx.apply_updates(state["params"], updates)
            key = jax.random.fold_in(state["key"], 1)
            new = {"params": params, "opt": opt, "extra": extra, "key": key}
            return (new, value, gradients) if result == "gradients" else (new, value)

        state = on_host(
            {
                "params": built.params,
                "opt": tx.init(arrays_of(built.params)),
                "extra": built.extra,
                "key": jax.random.PRNGKey(42),
            }
        )
        options = {"num_stages": stages, "num_microbatches": microbatches, "schedule": schedule}
        return Built(step, state, batches(built.data), options, zero_gradient_leaves=built.zero_gradient_leaves)

    return Case("-".join(names), make)
