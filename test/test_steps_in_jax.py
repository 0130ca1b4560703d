"""A step inside of JAX's own transformations, and what it says of the rest of a jitted function's interface."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest

import bactrian

W, X = np.full((4, 4), 0.1, np.float32), np.ones((8, 4), np.float32)


@pytest.fixture
def step() -> Any:
    @bactrian.parallelize(num_stages=2, num_microbatches=2)
    def train(state: Any, x: Any) -> Any:
        def loss(w: Any) -> Any:
            return jnp.mean(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) ** 2)

        value, g = bactrian.value_and_grad(loss)(state["w"])
        return {"w": jax.tree.map(lambda w, g: w - g, state["w"], g), "count": state["count"] + 1}, {"loss": value}

    return train


def state() -> Any:
    return {"w": {"a": W, "b": W}, "count": jnp.int32(3)}


def test_shapes_and_programs_are_those_of_the_reference(step: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = step.reference(state(), X)
    with caplog.at_level(logging.WARNING, logger="bactrian"):
        shapes = jax.eval_shape(step, state(), X)
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state(), X))
    assert jax.eval_shape(step, *abstract) == shapes
    program = jax.make_jaxpr(step)(state(), X)
    assert [v.aval.shape for v in program.jaxpr.outvars] == [a.shape for a in jax.tree.leaves(expected)]
    numerics.assert_equal_step(jax.jit(step)(state(), X), expected)
    assert [record.message for record in caplog.records] == [
        "train is traced by JAX: there it is a function of one device, and has no stages"
    ]


def test_a_traced_batch_beside_placed_state_names_gather(step: Any) -> None:
    placed, _ = step(state(), X)
    with pytest.raises(bactrian.BactrianError, match=r"bactrian\.gather"):
        jax.jit(lambda x: step(placed, x))(X)
    numerics.assert_equal_step(step(placed, X), step.reference(step.reference(state(), X)[0], X))


@pytest.mark.parametrize(
    ("name", "use"),
    [("lower", "trace(*args).plan().compile()"), ("eval_shape", "jax.eval_shape"), ("clear_cache", "with_options")],
)
def test_what_a_jitted_function_has_says_what_to_use(step: Any, name: str, use: str) -> None:
    assert not hasattr(step, name)
    with pytest.raises(AttributeError) as error:
        getattr(step, name)
    assert use in str(error.value)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        _ = step.nothing
