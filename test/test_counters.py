"""Counters of the state are brought up to date by every stage for itself, and stay equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
from cases import WIDTH, matrices

import bactrian


def make() -> tuple[Any, Any, Any]:
    """A step whose rate and noise depend on a count and a key, both read by every stage."""
    weights = matrices(*"ab")

    @bactrian.parallelize(num_stages=2, num_microbatches=2)
    def step(state: Any, x: jax.Array) -> Any:
        keys = jax.random.split(state["key"], 3)

        def loss(weights: Any) -> jax.Array:
            y = x
            for name, key in zip("ab", keys[1:], strict=True):
                y = jnp.tanh(y @ weights[name]) * jax.random.bernoulli(key, 0.9, (1, WIDTH))
            return (y**2).mean()

        value, gradients = bactrian.value_and_grad(loss)(state["weights"])
        count = state["count"] + 1
        rate = 0.1 / count
        weights = jax.tree.map(lambda w, g: w - rate * g, state["weights"], gradients)
        return {"weights": weights, "count": count, "key": keys[0]}, value

    state = {"weights": weights, "count": np.int32(0), "key": jax.random.key(3)}
    return step, state, np.random.default_rng(0).standard_normal((4, WIDTH), dtype=np.float32)


def test_counters_are_not_sent() -> None:
    step, state, x = make()
    planned = step.trace(state, x).plan()
    program = planned.staged.program
    sent = {program.values[transfer.source].dtype for transfer in program.transfers}
    assert sent == {"float32"}
    ours = reference = state
    for _ in range(3):
        result, expected = step(ours, x), step.reference(reference, x)
        gathered = bactrian.gather(result)
        numerics.assert_equal_step(gathered, expected)
        for name in ("count", "key"):
            copies = [np.asarray(piece) for piece in result[0][name].pieces.values()]
            assert len(copies) == 2
            assert np.array_equal(copies[0], copies[1])
        ours, reference = result[0], expected[0]


def test_every_stage_has_the_number_of_the_step() -> None:
    @bactrian.parallelize(num_stages=3)
    def step(state: Any, x: jax.Array) -> Any:
        def loss(weights: Any) -> jax.Array:
            return (jnp.tanh(jnp.tanh(x @ weights["a"]) @ weights["b"]) @ weights["c"]).mean()

        value, gradients = bactrian.value_and_grad(loss)(state["weights"])
        weights = jax.tree.map(lambda w, g: w - g, state["weights"], gradients)
        new = {
            "step": state["step"] + 1,
            "even": state["even"] + 2 * (state["step"] % 2),
            "scale": state["scale"] * 0.5,
        }
        return new | {"weights": weights}, value

    state = {"step": 0, "even": np.int32(0), "scale": np.float32(1), "weights": matrices(*"abc")}
    x = np.ones((4, WIDTH), np.float32)
    assert step.trace(state, x).plan().staged.program.num_stages == 3
    ours = reference = state
    for number in (1, 2):
        result, expected = step(ours, x), step.reference(reference, x)
        numerics.assert_equal_step(bactrian.gather(result), expected)
        ours, reference = result[0], expected[0]
        assert ours["step"].stages == ours["even"].stages == (0, 1, 2)
        assert len(ours["scale"].stages) == 1
        assert {int(piece) for piece in ours["step"].pieces.values()} == {number}
