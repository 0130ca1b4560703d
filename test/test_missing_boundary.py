"""A step whose gradient is taken by another function than ours: the error names that, its line, and what to write."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bactrian
from bactrian.passes.frame.errors import ProgramError

W, X = np.full((4, 4), 0.1, np.float32), np.ones((8, 4), np.float32)


def loss(w: Any, x: Any) -> Any:
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def with_aux(w: Any, x: Any) -> Any:
    return loss(w, x), 1.0


def inner(w: Any, x: Any) -> Any:
    return jnp.sum(jax.grad(loss)(w, x) ** 2)


@pytest.mark.parametrize(
    ("take", "name"),
    [
        (lambda w, x: jax.value_and_grad(loss)(w, x)[1], "jax.value_and_grad"),
        (lambda w, x: jax.grad(loss)(w, x), "jax.grad"),
        (lambda w, x: jax.grad(with_aux, has_aux=True)(w, x)[0], "jax.grad"),
        (lambda w, x: jax.value_and_grad(inner)(w, x)[1], "jax.value_and_grad"),
        (lambda w, x: jax.jit(jax.grad(loss))(w, x), "jax.grad"),
        (lambda w, x: jax.jit(lambda w: jax.value_and_grad(loss)(w, x))(w)[1], "jax.value_and_grad"),
        (lambda w, x: eqx.filter_value_and_grad(loss)(w, x)[1], "eqx.filter_value_and_grad"),
        (lambda w, x: eqx.filter_grad(loss)(w, x), "eqx.filter_grad"),
        (lambda w, x: eqx.filter_jit(eqx.filter_grad(loss))(w, x), "eqx.filter_grad"),
        (lambda w, x: nnx.value_and_grad(loss)(w, x)[1], "nnx.value_and_grad"),
        (lambda w, x: nnx.grad(with_aux, has_aux=True)(w, x)[0], "nnx.grad"),
    ],
)
def test_the_call_is_named(take: Any, name: str) -> None:
    def step(w: Any, x: Any) -> Any:
        return w - take(w, x), jnp.float32(0)

    with pytest.raises(ProgramError, match=f"the step has no gradient boundary: {name} takes its gradient") as error:
        bactrian.parallelize(step, num_stages=1).trace(W, X)
    kind = "bactrian.value_and_grad" if "value" in name else "bactrian.grad"
    assert error.value.fix == f"write {kind} in the place of {name}; it takes the same arguments"
    line = take.__code__.co_firstlineno
    assert f"test_missing_boundary.py:{line} (<lambda>" in error.value.where


def test_a_step_without_any_gradient_says_so() -> None:
    step = bactrian.parallelize(functools.partial(lambda w, x: (w, loss(w, x))))
    with pytest.raises(ProgramError, match="the step has no gradient boundary\n") as error:
        step.trace(W, X)
    assert "forward_only=True" in error.value.fix
