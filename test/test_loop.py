"""One stage whose microbatches are turns of a loop: what comes out of it, whatever its type and reduction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import models
import numerics
import numpy as np
import pytest
from cases import WIDTH, matrices

import bactrian


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("reduction", ["last", "sum", "mean", "concat"])
@pytest.mark.parametrize("dtype", ["complex64", "bfloat16", "float16"])
def test_aux_of_every_type(stages: int, reduction: str, dtype: str) -> None:
    weights = matrices(*"ab")

    def loss(weights: Any, x: jax.Array) -> Any:
        y = x
        for name in "ab":
            y = jnp.tanh(y @ weights[name])
        return (y**2).mean(), y[:, 0].astype(dtype) * (1 + 1j if dtype == "complex64" else 1)

    def step(weights: Any, x: jax.Array) -> Any:
        (value, aux), gradients = bactrian.value_and_grad(loss, has_aux=True, aux_reduction=reduction)(weights, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), value, aux

    x = np.random.default_rng(0).standard_normal((8, WIDTH), dtype=np.float32)
    parallel = bactrian.parallelize(step, num_stages=stages, num_microbatches=4)
    ours, reference = bactrian.gather(parallel(weights, x)), parallel.reference(weights, x)
    numerics.assert_equal_step(ours[:2], reference[:2])
    assert ours[2].dtype == reference[2].dtype and ours[2].shape == reference[2].shape
    tolerance = 1e-5 if dtype == "complex64" else 1e-2
    np.testing.assert_allclose(
        np.asarray(ours[2], np.complex128), np.asarray(reference[2], np.complex128), rtol=tolerance, atol=tolerance
    )


def test_one_call_per_step() -> None:
    built = models.train_case("mlp/plain", "adamw", stages=1, microbatches=4).make()
    planned = bactrian.parallelize(built.step, **built.options).trace(built.state, *built.batches[0]).plan()
    assert [call.function for call in planned.staged.program.calls] == ["stage0.forward_backward"]
    assert planned.staged.program.num_microbatches == 1 and planned.plan.num_microbatches == 4
