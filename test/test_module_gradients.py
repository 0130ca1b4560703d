"""Gradients of modules are those that their libraries take, inside of a step and outside."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from flax import nnx

import bactrian

X = np.random.default_rng(0).standard_normal((8, 4), np.float32)


class Net(eqx.Module):
    """Arrays of floats and integers, a function, a number and a text."""

    linear: eqx.nn.Linear
    order: jax.Array
    activation: Any = jax.nn.relu
    rate: float = 0.5
    mode: str = "plain"

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(jax.vmap(self.linear)(x[:, self.order])) * self.rate


def net() -> Net:
    return Net(eqx.nn.Linear(4, 4, key=jax.random.key(0)), jnp.array([2, 0, 1, 3]))


def loss(model: Net, x: Any, scale: Any = 1.0) -> Any:
    return jnp.mean(model(x) ** 2) * scale


def same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_equinox_modules_outside_of_a_step() -> None:
    same(bactrian.value_and_grad(loss)(net(), X), eqx.filter_value_and_grad(loss)(net(), X))
    same(bactrian.grad(loss)(net(), X), eqx.filter_grad(loss)(net(), X))
    with_aux = lambda model, x: (loss(model, x), x)  # noqa: E731
    same(bactrian.grad(with_aux, has_aux=True)(net(), X), eqx.filter_grad(with_aux, has_aux=True)(net(), X))
    # Several arguments, by number, and a module inside of a tree.
    pair = eqx.filter_value_and_grad(lambda both: loss(both[0]["net"], X, both[1]))(({"net": net()}, jnp.float32(2)))
    found = bactrian.value_and_grad(lambda scale, x, tree: loss(tree["net"], x, scale), (2, 0))(
        jnp.float32(2), X, {"net": net()}
    )
    same(found, pair)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_step_on_an_equinox_module(microbatches: int) -> None:
    def step(model: Any, x: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(model, x)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -g, gradients)), value

    made = bactrian.parallelize(step, num_stages=1, num_microbatches=microbatches)
    expected, state = net(), net()
    for _ in range(2):
        expected, value = eqx.filter_jit(step)(expected, X)
        state, ours = made(state, X)
        np.testing.assert_allclose(ours, value, rtol=1e-5)
    numerics.assert_equal_step(bactrian.gather(state.linear), expected.linear)
    assert (state.activation, state.rate, state.mode) == (jax.nn.relu, 0.5, "plain")


class Noisy(nnx.Module):
    """Parameters, batch statistics and random streams."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(jnp.tanh(self.norm(self.linear(x))))


def noisy_loss(model: Noisy, x: Any) -> Any:
    return jnp.mean(model(x) ** 2)


def test_nnx_modules_outside_of_a_step() -> None:
    ours, theirs = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    same(bactrian.value_and_grad(noisy_loss)(ours, X), nnx.value_and_grad(noisy_loss)(theirs, X))
    same(bactrian.grad(lambda x, model: noisy_loss(model, x), 1)(X, ours), nnx.grad(noisy_loss)(theirs, X))
    statistics = [nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) for model in (ours, theirs)]
    same(*statistics)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_on_an_nnx_module(microbatches: int) -> None:
    def step_with(value_and_grad: Any) -> Any:
        def step(model: Any, x: Any) -> Any:
            value, gradients = value_and_grad(noisy_loss)(model, x)
            nnx.update(model, jax.tree.map(lambda w, g: w - g, nnx.state(model, nnx.Param), gradients))
            return value

        return step

    made = bactrian.parallelize(step_with(bactrian.value_and_grad), num_stages=1, num_microbatches=microbatches)
    ours, theirs = Noisy(nnx.Rngs(0)), Noisy(nnx.Rngs(0))
    expected_mean = 0.01 * np.asarray(theirs.linear(X)).mean(0)  # that of all rows is the mean of those of microbatches
    for number in range(2):
        expected = made.reference(ours, X)
        numerics.assert_equal_step(made(ours, X), expected)
        if number == 0:
            np.testing.assert_allclose(ours.norm.mean.get_raw_value(), expected_mean, rtol=1e-4)
    boundary = made.compiled.captured.dataflow.boundary
    assert len(boundary.inputs) == 1 + 4 + 3, "loss, gradients, and what the loss updates: two statistics and a count"
    assert int(ours.drop.rngs.count.get_raw_value()) == 2
    if microbatches == 1:
        plain = nnx.jit(step_with(nnx.value_and_grad))
        for _ in range(2):
            plain(theirs, X)
        numerics.assert_equal_step(
            *(bactrian.gather(nnx.to_pure_dict(nnx.state(each.norm))) for each in (ours, theirs))
        )
