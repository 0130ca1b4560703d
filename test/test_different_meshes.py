"""Pipelines whose stages have meshes of different sizes and shapes, run in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from clusters import SLOW
from meshes import check, cut
from numerics import assert_equal_step

import bactrian


@pytest.mark.parametrize(
    ("name", "mesh", "devices"),
    [
        ("mlp/plain", "data=2;data=1", [2, 1]),
        ("mlp/plain", "data=1;data=2,model=2;model=2", [1, 4, 2]),
        pytest.param("gpt-tied-dropout/linen", "data=2,model=2;model=2", [4, 2], marks=pytest.mark.long),
        pytest.param("encoder-decoder/linen", "data=4;data=1;model=2", [4, 1, 2], marks=pytest.mark.long),
        pytest.param("conv/linen", "data=2;data=2,model=2", [2, 4], marks=pytest.mark.long),
    ],
)
def test_models_equal_one_device(tmp_path: Path, name: str, mesh: str, devices: list[int]) -> None:
    (tmp_path / "cluster.toml").write_text(SLOW)
    stages = len(devices)
    built = models.train_case(name, "sgd", microbatches=4, stages=stages).make()
    compiled = check(built, mesh=mesh, num_stages=stages, cluster=str(tmp_path / "cluster.toml"))
    assert [stage.num_devices for stage in compiled.plan.stages] == devices
    used = [device for own in compiled.session.devices.values() for device in own]
    assert len(used) == len(set(used)) == sum(devices)
    assert cut(compiled)


def layers(weights: Any, batch: jax.Array) -> jax.Array:
    """The loss of a chain of layers; the last one has the first one's weight too."""
    for weight in (*weights, weights[0]):
        batch = jnp.tanh(batch @ weight)
    return jnp.square(batch).mean()


@bactrian.parallelize(num_microbatches=2, state={0: 0})
def train(weights: Any, batch: jax.Array) -> Any:
    """Gradient descent; the largest gradients are results of all stages."""
    loss, gradients = bactrian.value_and_grad(layers)(weights, batch)
    weights = jax.tree.map(lambda weight, gradient: weight - 0.1 * gradient, weights, gradients)
    return weights, loss, jax.tree.map(jnp.abs, gradients)


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,model=3;data=2",
        "model=3;data=2;data=3",
        "data=1;data=6;data=1",
        pytest.param("data=8;model=2,data=4", marks=pytest.mark.long),
        pytest.param("data=3,model=2;data=1;data=1", marks=pytest.mark.long),
        pytest.param("data=2;data=2;data=3;data=1", marks=pytest.mark.long),
    ],
)
def test_state_that_several_stages_read_and_results_of_all(tmp_path: Path, mesh: str) -> None:
    """The sizes of the meshes divide rows and columns; stages share devices where there are too few."""
    (tmp_path / "cluster.toml").write_text(SLOW)
    step = train.with_options(mesh=mesh, cluster=str(tmp_path / "cluster.toml"))
    random = np.random.default_rng(0)
    weights = [random.standard_normal((48, 48)).astype(np.float32) / 7 for _ in range(3)]
    for _ in range(2):
        batch = random.standard_normal((48, 48)).astype(np.float32)
        expected = step.reference(weights, batch)
        found = step(weights, batch)
        assert_equal_step(bactrian.gather(found), expected)
        weights = found[0]
    assert cut(step.compiled)
