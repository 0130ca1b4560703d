"""Steps on flax ``nnx`` objects, which they update in place as under ``nnx.jit``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import optax
import pytest
from flax import nnx

import bactrian
from bactrian.driver.capture.lower_step import capture
from bactrian.passes.frame.errors import ProgramError

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.b(jnp.tanh(self.a(x)))


class Statistics(nnx.Module):
    """With batch statistics and the key and count of a dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(6, momentum=0.8, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.b(self.drop(jnp.tanh(self.norm(self.a(x)))))


def objects(kind: type[nnx.Module] = Net) -> tuple[Any, Any]:
    model = kind(nnx.Rngs(0))
    # A bias before batch statistics has no gradient but rounding noise, which Adam would scale up.
    tx = optax.adam(0.01) if kind is Net else optax.sgd(0.1)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


def in_place(value_and_grad: Any) -> Any:
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        value, grads = value_and_grad(loss)(model, *batch)
        optimizer.update(model, grads)
        return value

    return step


def values(*trees: Any) -> list[Any]:
    return jax.tree.leaves(numerics.host(bactrian.gather(trees)))


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 2), (2, 2)])
def test_a_step_updates_its_objects_in_place(stages: int, microbatches: int):
    step = bactrian.parallelize(
        in_place(bactrian.value_and_grad), num_stages=stages, num_microbatches=microbatches, batch_argnums=2
    )
    plain = nnx.jit(in_place(nnx.value_and_grad))
    ours, theirs = objects(), objects()
    kernel = ours[0].a.kernel
    for number in range(3):
        want = plain(*theirs, (X, Y))
        if number == 0:
            numerics.assert_equal_step(step.reference(*ours, (X, Y)), want)
        numerics.assert_equal_step(step(*ours, batch=(X, Y)), want)
    assert ours[0].a.kernel is kernel
    for got, expected in zip(values(*ours), values(*theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert {info.role for info in step.compiled.captured.arguments} == {"state", "batch"}


@pytest.mark.parametrize("stages", [1, 2])
def test_what_the_loss_updates_is_updated(stages: int):
    step = bactrian.parallelize(in_place(bactrian.value_and_grad), num_stages=stages, batch_argnums=2)
    plain = nnx.jit(in_place(nnx.value_and_grad))
    ours, theirs = objects(Statistics), objects(Statistics)
    for _ in range(3):
        numerics.assert_equal_step(step(*ours, (X, Y)), plain(*theirs, (X, Y)))
    for got, expected in zip(values(*ours), values(*theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    assert int(ours[0].drop.rngs.count.get_raw_value()) == 3


def test_statistics_are_the_mean_over_the_microbatches():
    step = bactrian.parallelize(in_place(bactrian.value_and_grad), num_microbatches=2, batch_argnums=2)
    model, optimizer = objects(Statistics)
    halves = [objects(Statistics)[0] for _ in range(2)]
    for half, x in zip(halves, np.split(X, 2), strict=True):
        half(x)
    step(model, optimizer, (X, Y))
    want = np.mean([half.norm.mean[...] for half in halves], 0)
    np.testing.assert_allclose(bactrian.gather(model).norm.mean[...], want, rtol=1e-4, atol=1e-6)
    assert int(model.drop.rngs.count.get_raw_value()) == 1


def test_a_model_that_the_loss_did_not_get_is_refused():
    def step(model: Any, batch: Any) -> Any:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        value, grads = bactrian.value_and_grad(lambda p: loss(nnx.merge(graph, p, rest), *batch))(params)
        return value, grads

    with pytest.raises(
        ProgramError, match="updates an nnx variable inside of a gradient that did not get it"
    ) as caught:
        capture(step, (objects(Statistics)[0], (X, Y)))
    assert "copy=True" in caught.value.fix and "test_nnx_steps.py" in caught.value.where


def test_objects_that_are_returned_are_state_as_ever():
    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        value, grads = bactrian.value_and_grad(loss)(model, *batch)
        optimizer.update(model, grads)
        return model, optimizer, value

    captured = capture(step, (*objects(), (X, Y)), batch_argnums=(2,))
    assert captured.updated == ()
    assert {info.role for info in captured.arguments} == {"state", "batch"}


def test_a_new_variable_is_refused():
    def step(model: Any, batch: Any) -> Any:
        model.more = nnx.Param(jnp.zeros(3))
        value, grads = bactrian.value_and_grad(loss)(model, *batch)
        return value, grads

    with pytest.raises(ProgramError, match="changes the structure of argument 0 in place"):
        capture(step, (Net(nnx.Rngs(0)), (X, Y)))


def test_another_dtype_is_refused():
    def step(model: Any, batch: Any) -> Any:
        value, grads = bactrian.value_and_grad(loss)(model, *batch)
        model.b.bias.set_raw_value(grads.b.bias.get_raw_value().astype(jnp.bfloat16))
        return value

    with pytest.raises(ProgramError, match="changes a shape or a dtype of model in place") as caught:
        capture(step, (Net(nnx.Rngs(0)), (X, Y)))
    assert "model.b.bias.value is float32[3] and becomes bfloat16[3]" in str(caught.value)
