"""Pipelines whose stages have meshes of different sizes and shapes, run in one process."""

from __future__ import annotations

from dataclasses import replace
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
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.plan.schema import Plan


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
    assert any(value.spec.axes for value in step.compiled.session.staged.program.values)


def weights_and_batch() -> tuple[list[np.ndarray], np.ndarray]:
    """Arguments of `train`."""
    random = np.random.default_rng(1)
    weights = [random.standard_normal((48, 48)).astype(np.float32) / 7 for _ in range(3)]
    return weights, random.standard_normal((48, 48)).astype(np.float32)


def with_sharding(plan: Plan, stage: int, path: str, text: str) -> Plan:
    """The plan with another sharding of an argument on one stage."""
    changed, sharding = plan.stages[stage], plan.stages[stage].sharding
    assert sharding is not None and path in dict(sharding.shardings)
    shardings = tuple((name, text if name == path else old) for name, old in sharding.shardings)
    stages = list(plan.stages)
    stages[stage] = replace(changed, sharding=replace(sharding, shardings=shardings))
    return replace(plan, stages=tuple(stages))


def specs_of(plan: Plan, path: str) -> list[str | None]:
    """The shardings of an argument, by stage."""
    return [None if stage.sharding is None else dict(stage.sharding.shardings).get(path) for stage in plan.stages]


def test_a_plan_shards_a_shared_argument_on_each_stage_in_its_own_way(tmp_path: Path) -> None:
    """Saved, changed, read and applied: the stages' meshes have no axis in common."""
    weights, batch = weights_and_batch()
    plan = train.with_options(mesh="x=2;y=3").trace(weights, batch).plan().plan
    plan = with_sharding(with_sharding(plan, 0, "weights[0]", "x,-"), 1, "weights[0]", "-,y")
    plan.save(tmp_path)
    step = train.with_options(plan=tmp_path)
    assert_equal_step(bactrian.gather(step(weights, batch)), step.reference(weights, batch))
    assert specs_of(step.compiled.plan, "weights[0]") == ["x,-", "-,y"]
    placed = step.compiled.placements[0]
    assert placed.stages == (0, 1) and placed.sharding_text == "dim 0 over x on mesh x=2; dim 1 over y on mesh y=3"
    again = train.with_options(plan=step.compiled.plan).trace(weights, batch).plan()
    assert specs_of(again.plan, "weights[0]") == ["x,-", "-,y"]
    assert again.staged_text == step.compiled.session.staged.text


def test_a_plan_with_an_axis_of_another_stage() -> None:
    weights, batch = weights_and_batch()
    plan = train.with_options(mesh="x=2;y=3").trace(weights, batch).plan().plan
    wrong = with_sharding(plan, 1, "weights[0]", "x,-")
    with pytest.raises(ConfigError, match=r"invalid sharding 'x,-' for weights\[0\] in the plan") as error:
        train.with_options(plan=wrong).trace(weights, batch).plan()
    assert "the mesh has no axis 'x'" in str(error.value)


def test_steps_share_state_on_different_meshes() -> None:
    """A second step takes the meshes and shardings of the first one's state; on other meshes it is refused."""
    weights, batch = weights_and_batch()
    step = train.with_options(mesh="x=2;y=3")
    state, _, _ = step(weights, batch)
    evaluate: Any = bactrian.parallelize(layers, forward_only=True, out_reduction="mean")
    expected = layers(bactrian.gather(state), jnp.asarray(batch))
    np.testing.assert_allclose(evaluate(state, batch), expected, rtol=1e-5)
    plan = evaluate.compiled.plan
    assert [stage.mesh for stage in plan.stages] == [(("x", 2),), (("y", 3),)]
    for placement, found in zip(step.compiled.placements, evaluate.compiled.placements, strict=True):
        assert {stage: placement.specs[stage] for stage in found.stages} == found.specs
    with pytest.raises(ConfigError, match="mesh is x=2, but the arguments were placed on x=2;y=3"):
        evaluate.with_options(mesh="x=2")(state, batch)
    other, _, _ = train.with_options(mesh="x=2;x=2")(weights, batch)
    with pytest.raises(ConfigError, match=r"placed by a step on the mesh x=2;y=3, weights\[1\] by one on x=2"):
        step([state[0], *other[1:]], batch)
