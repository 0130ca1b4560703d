"""Layers are named after the user's modules and lines, and have the seconds of a microbatch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import bactrian

W = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
X = jax.ShapeDtypeStruct((8, 64), jnp.float32)


def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
    with jax.named_scope("first"):
        x = jnp.einsum("bi,ij->bj", x, weights[0])
    with jax.named_scope("second"):
        x = jnp.tanh(x @ weights[1])
    return jnp.einsum("bi,bi->", x, x)


def test_layers_have_modules_lines_and_seconds() -> None:
    @bactrian.parallelize(num_stages=2, num_microbatches=2)
    def step(weights: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = bactrian.value_and_grad(loss)(weights, x)
        return weights - gradient, value

    plan = step.trace(W, X).plan().plan
    first, second = plan.layers
    assert (first.modules, second.modules) == (("first",), ("second",))  # the text of an einsum is none
    assert first.first_op.startswith("stablehlo.dot_general at test_layer_names.py:")
    for stage, layer in zip(plan.stages, plan.layers, strict=True):
        assert stage.timing is not None
        busy = stage.timing.forward_seconds + stage.timing.backward_seconds
        assert layer.seconds == pytest.approx(busy, rel=0.5) and layer.seconds
