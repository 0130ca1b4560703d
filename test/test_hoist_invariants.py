"""``hoist-invariants`` in whole steps: what runs once, what is held, and that the numbers are those of one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clusters import cluster_text
from numerics import assert_equal_step

import bactrian
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.staged_program import StagedProgram

WIDTH, ROWS, LAYERS, MICROBATCHES = 128, 64, 3, 4

Loss = Callable[[Any, Any], jax.Array]


def weights() -> dict[str, Any]:
    """A matrix for each layer, and a key."""
    random = np.random.default_rng(0)
    shape = WIDTH, WIDTH
    return {f"w{i}": random.standard_normal(shape, dtype=np.float32) / WIDTH**0.5 for i in range(LAYERS)}


def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.standard_normal((ROWS, WIDTH), dtype=np.float32) for name in ("x", "y")}


def mixed(w: Any, x: jax.Array) -> jax.Array:
    """A layer that computes in half precision."""
    return jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)


def unit(w: Any) -> jax.Array:
    """A weight with columns of length one."""
    return w / jnp.sqrt(jnp.sum(w * w, axis=0))


def normalized(w: Any, x: jax.Array) -> jax.Array:
    """A layer of such weights."""
    return jnp.tanh(x @ unit(w))


def chain_loss(layer: Callable[[Any, jax.Array], jax.Array]) -> Loss:
    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for i in range(LAYERS):
            x = layer(params[f"w{i}"], x)
        return jnp.mean((x - batch["y"]) ** 2)

    return loss


def masked_loss(params: Any, batch: Any) -> jax.Array:
    """A mask of weights that a key of the state draws, and one of activations that is new for every microbatch."""
    key, x = jax.random.key(3), batch["x"]
    own = jax.random.fold_in(key, bactrian.microbatch_index())
    for i in range(LAYERS):
        weight = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, (WIDTH, WIDTH)), params[f"w{i}"], 0.0)
        x = jnp.tanh(x @ weight)
        x = jnp.where(jax.random.bernoulli(jax.random.fold_in(own, i), 0.8, x.shape), x, 0.0)
    return jnp.mean((x - batch["y"]) ** 2)


def tied_loss(params: Any, batch: Any) -> jax.Array:
    """The first stage and the last one read what is made of one weight."""
    first = unit(params["w0"])
    x = jnp.tanh(batch["x"] @ first)
    x = jnp.tanh(x @ params["w1"]) * jnp.exp(params["w2"].sum(axis=0) / WIDTH)
    x = jnp.tanh(x @ params["w2"]) @ first.T
    return jnp.mean((x - batch["y"]) ** 2)


LOSSES: Mapping[str, Loss] = {
    "normalized": chain_loss(normalized),
    "checkpoint": chain_loss(jax.checkpoint(normalized)),
    "masks": masked_loss,
    "tied": tied_loss,
}


def made(loss: Loss, **options: Any) -> Any:
    """A step of plain gradient descent."""

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return bactrian.parallelize(step, num_microbatches=MICROBATCHES, **options)


def program_of(step: Any) -> StagedProgram:
    return step.compiled.session.staged.program


OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_stages": 1},
    {"num_stages": 1, "schedule": "gpipe"},
    {"num_stages": 3, "schedule": "gpipe"},
    {"num_stages": 3},
    {"num_stages": 2, "mesh": "data=2"},
)
SHORT = ("checkpoint-1", "masks-3", "tied-3-gpipe", "normalized-2-data=2")


def cases() -> Iterator[Any]:
    """Every loss with all options; few in the short form."""
    for name, options in itertools.product(LOSSES, OPTIONS):
        words = "-".join([name, *map(str, options.values())])
        yield pytest.param(name, options, id=words, marks=() if words in SHORT else pytest.mark.long)


@pytest.mark.parametrize(("name", "options"), [*cases()])
def test_numbers_are_those_of_one_device(name: str, options: dict[str, Any]) -> None:
    step = made(LOSSES[name], **options)
    reference = step.reference(weights(), batch())
    result = step(weights(), batch())
    assert_equal_step(bactrian.gather(result), reference)
    if options["num_stages"] > 1:
        assert any(call.phase == "prepare" for call in program_of(step).calls)


def test_a_cast_is_held_once_and_not_for_each_microbatch() -> None:
    step = made(chain_loss(mixed), num_stages=3)
    step(weights(), batch())
    program = program_of(step)
    prepared = {call.stage: call.outputs for call in program.calls if call.phase == "prepare"}
    for stage in range(3):
        assert [program.values[value].shape for value in prepared[stage]] == [(WIDTH, WIDTH)]
        assert not program.values[prepared[stage][0]].per_microbatch
    forward = next(call for call in program.calls if call.function == "stage0.forward")
    assert all(program.values[value].shape != (WIDTH, WIDTH) for value in forward.outputs)
    plan = step.compiled.session.staged.plan
    assert plan.stages[0].prepared_bytes == WIDTH * WIDTH * 2
    assert plan.stages[0].activation_bytes < 3 * ROWS // MICROBATCHES * WIDTH * 4


def test_checkpoint_casts_once() -> None:
    step = made(chain_loss(jax.checkpoint(mixed)), num_stages=1, schedule="gpipe")
    step(weights(), batch())
    (prepared,) = [call for call in program_of(step).calls if call.phase == "prepare"]
    assert len(prepared.outputs) == LAYERS  # forward and recomputation read the same ones


@pytest.mark.parametrize(("mesh", "strategy"), [("data=1", "auto"), ("data=2", "data")])
def test_a_stage_that_would_not_fit_so_computes_for_each_microbatch(tmp_path: Path, mesh: str, strategy: str) -> None:
    """Of a layer at a time there is room for what is made of its weight, of all layers there is not."""

    def step_within(gib: float) -> Any:
        (tmp_path / "cluster.toml").write_text(cluster_text("f32 = 1e-3", 0.1, 1, memory_gib=gib))
        cluster = str(tmp_path / "cluster.toml")
        return made(LOSSES["checkpoint"], num_stages=2, mesh=mesh, cluster=cluster, strategy=strategy)

    def plan_of(step: Any) -> Plan:
        return step.trace(weights(), batch()).plan().plan

    assert all(stage.prepared_bytes for stage in plan_of(step_within(1.0)).stages)
    gib = 1e-5
    for _ in range(4):  # each time as much as is needed at the least, as far as was seen
        try:
            plan = plan_of(step := step_within(gib))
            break
        except InfeasiblePlanError as error:
            assert error.needed_bytes is not None
            gib = error.needed_bytes / 2**30
    else:
        pytest.fail("what is needed is not enough")
    assert not all(stage.prepared_bytes for stage in plan.stages)
    assert any("for each microbatch what none of them changes" in remark.message for remark in plan.remarks)
    assert_equal_step(bactrian.gather(step(weights(), batch())), step.reference(weights(), batch()))
