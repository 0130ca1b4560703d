"""Stages that take equally long, and what is said where they do not."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clusters import FAST, cluster_text
from numerics import assert_equal_step

import bactrian
from bactrian.driver.api import Parallelized
from bactrian.driver.planned_step import Planned
from bactrian.passes.plan.schema import Plan, Remark

RANDOM = np.random.default_rng(3)
WIDTH, LENGTH, HEADS, LAYERS, ROWS = 32, 16, 4, 4, 8
SIZE = WIDTH // HEADS


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])


def sgd(loss: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], Any]:
    def step(params: Any, batch: Any) -> tuple[Any, jax.Array]:
        value, gradients = bactrian.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def shares(planned: Planned) -> list[float]:
    """Of the predicted time, times the number of stages: 1 is even."""
    return [(share or 0.0) * planned.plan.num_stages for share in planned.plan.time_shares()]


def balance(planned: Planned) -> list[float]:
    """As `shares`, of what layers take before it is known what stages keep and compute again."""
    plan = planned.plan
    seconds = [
        sum(layer.seconds or 0.0 for layer in plan.layers[s.first_layer : s.last_layer + 1]) for s in plan.stages
    ]
    return [plan.num_stages * each / sum(seconds) for each in seconds]


def rotated(x: jax.Array, position: jax.Array) -> jax.Array:
    angle = position[:, :, None, None].astype(jnp.float32) * 0.01 ** jnp.linspace(0, 1, SIZE // 2)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def attention(x: jax.Array, layer: Any, batch: Any) -> jax.Array:
    """Tokens see those of their segment before them; queries and keys are rotated by their position."""
    segment, position = batch["segment"], batch["position"]
    q = rotated(jnp.einsum("btd,dhk->bthk", x, layer["q"]), position)
    scores = jnp.einsum("bthk,bshk->bhts", q, q)
    mask = (segment[:, :, None] == segment[:, None, :]) & (position[:, :, None] >= position[:, None, :])
    y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e9)), q)
    return x + jnp.tanh(jnp.einsum("bthk,hkd->btd", y, layer["o"]))


def masked(layer: Callable[..., jax.Array]) -> tuple[Parallelized, Any, Any]:
    """Layers and a small head, in two stages."""
    layers = [{"q": normal(WIDTH, HEADS, SIZE), "o": normal(HEADS, SIZE, WIDTH)} for _ in range(LAYERS)]
    params = {"layers": layers, "head": normal(WIDTH, 4)}
    batch = {
        "x": normal(ROWS, LENGTH, WIDTH),
        "position": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segment": np.repeat(np.array([[0, 1]], np.int32), LENGTH // 2, axis=1).repeat(ROWS, axis=0),
    }

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        for each in params["layers"]:
            x = layer(x, each, batch)
        return jnp.mean((x @ params["head"]) ** 2)

    return bactrian.parallelize(sgd(loss), num_stages=2, num_microbatches=2), params, batch


@pytest.mark.parametrize("layer", [attention, jax.checkpoint(attention)], ids=["kept", "checkpoint"])
def test_masks_and_rotary_tables_forbid_no_cut_and_are_not_sent(layer: Callable[..., jax.Array]) -> None:
    step, params, batch = masked(layer)
    planned = step.trace(params, batch).plan()
    assert max(shares(planned)) < 1.1
    stream = ROWS // 2 * LENGTH * WIDTH * 4
    assert [stage.sent_bytes_forward for stage in planned.plan.stages] == [stream, 0]
    assert not planned.plan.remarks
    assert_equal_step(bactrian.gather(step(params, batch)), step.reference(params, batch))


def test_a_part_that_is_computed_again_is_cut_where_nothing_else_is_even() -> None:
    @jax.checkpoint
    def all_layers(layers: Any, x: jax.Array) -> jax.Array:
        for w in layers:
            x = jnp.tanh(x @ w)
        return x

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((all_layers(params["layers"], x) @ params["head"]) ** 2)

    params, batch = {"layers": [normal(64, 64) for _ in range(6)], "head": normal(64, 2)}, normal(4, 64)
    step = bactrian.parallelize(sgd(loss), num_stages=2, num_microbatches=2)
    assert max(shares(step.trace(params, batch).plan())) < 1.4
    assert_equal_step(bactrian.gather(step(params, batch)), step.reference(params, batch))


class Convolutions(nn.Module):
    """Large images with few channels first, small ones with many last: most bytes in front, most flops behind."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels, stride in ((8, 1), (8, 1), (8, 1), (40, 4), (40, 1), (40, 1), (40, 1)):
            x = nn.Conv(channels, (3, 3), (stride, stride), use_bias=False)(x)
            x = nn.relu((x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5))
        return nn.Dense(8)(x.mean((1, 2)))


def convolutions() -> tuple[Callable[[Any, Any], Any], Any, Any]:
    model, images = Convolutions(), jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    return sgd(lambda params, x: jnp.mean(model.apply(params, x) ** 2)), params, images


def cluster(folder: Path, tflops: float, gb_per_s: float) -> Path:
    path = folder / f"{tflops}-{gb_per_s}.toml"
    path.write_text(cluster_text(f"f32 = {tflops}", gb_per_s, 1))
    return path


def test_stages_are_balanced_by_predicted_time_on_the_devices_that_they_get(tmp_path: Path) -> None:
    step, params, images = convolutions()
    traced = bactrian.parallelize(step, num_stages=2, num_microbatches=4).trace(params, images)
    cores = traced.plan()
    slow_arithmetic = traced.plan(cluster(tmp_path, 1e-3, 1e3))
    slow_memory = traced.plan(cluster(tmp_path, 1e3, 0.1))
    for planned in (cores, slow_arithmetic, slow_memory):
        assert max(balance(planned)) < 1.25
    for planned in (cores, slow_arithmetic):
        assert max(shares(planned)) < 1.25
    # What is kept and what is computed again is known only when there are stages; here it moves bytes to the second.
    assert max(shares(slow_memory)) < 1.4
    first_flops = [planned.plan.stages[0].flops or 0 for planned in (slow_memory, slow_arithmetic)]
    assert first_flops[0] < 0.8 * first_flops[1], "the bytes are in front, the flops behind"
    seconds = [planned.plan.predicted_step_seconds for planned in (cores, slow_memory)]
    assert seconds[0] != seconds[1], "times are those of the cluster, on stages of one device too"


def scanned() -> tuple[Callable[[Any, Any], Any], Any, Any]:
    def loss(params: Any, batch: Any) -> jax.Array:
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params["layers"])[0]  # the scan
        return jnp.mean((x @ params["head"]) ** 2)

    shape = jax.ShapeDtypeStruct
    params = {"layers": shape((LAYERS, 64, 64), jnp.float32), "head": shape((64, 8), jnp.float32)}
    return sgd(loss), params, shape((64, 64), jnp.float32)


def the_remark(planned: Planned) -> Remark:
    (remark,) = planned.plan.remarks
    return remark


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{Path(__file__).name}:{first + next(n for n, line in enumerate(lines) if text in line)}"


def test_a_scan_that_is_nearly_all_work_is_blamed_with_its_line_in_the_plan() -> None:
    step, params, batch = scanned()
    planned = bactrian.parallelize(step, num_stages=2, num_microbatches=2).trace(params, batch).plan()
    remark = the_remark(planned)
    assert remark.severity == "warning"
    assert remark.where.startswith(line_of(scanned, "# the scan"))
    assert "an even share of the predicted time; next to nothing is left for stage 1" in remark.message
    assert "one stablehlo.while takes" in remark.why
    assert "in Python" in remark.fix
    assert " ".join(str(planned).split()).count(remark.message) == 1
    assert Plan.from_json(planned.plan.to_json()).remarks == planned.plan.remarks


def test_a_scan_is_planned_and_blamed_with_more_stages_than_products() -> None:
    step, params, batch = scanned()
    planned = bactrian.parallelize(step, num_stages=3, num_microbatches=2).trace(params, batch).plan()
    assert the_remark(planned).where.startswith(line_of(scanned, "# the scan"))


def test_parameters_of_all_layers_in_one_array_are_blamed_by_name() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        for layer in range(LAYERS):
            x = jnp.tanh(x @ params["w"][layer])
        return jnp.mean(x**2)

    shape = jax.ShapeDtypeStruct
    stacked = {"w": shape((LAYERS, 64, 64), jnp.float32)}, shape((16, 64), jnp.float32)
    planned = bactrian.parallelize(sgd(loss), num_stages=4, num_microbatches=2).trace(*stacked).plan()
    assert "it updates params['w'], which stages" in the_remark(planned).why
    assert "parameters of its own" in the_remark(planned).fix


def test_remarks_of_passes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    step, params, batch = scanned()
    made = bactrian.parallelize(step, num_stages=2, num_microbatches=2)
    arguments = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), (params, batch))
    with caplog.at_level(logging.WARNING, "bactrian"):
        made(*arguments)
        made.trace(*arguments).plan_with_all().compile()
    told = [record.getMessage() for record in caplog.records if "even share" in record.getMessage()]
    assert told == [the_remark(made.trace(*arguments).plan()).text()]


def test_a_mesh_whose_devices_repeat_all_work_is_told_with_what_would_pay(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(FAST.replace("latency_us = 1", "latency_us = 1e5"))
    loss = sgd(lambda params, x: jnp.mean((x @ params) ** 2))
    shape = jax.ShapeDtypeStruct
    step = bactrian.parallelize(loss, num_stages=1, mesh="data=4", cluster=path)
    remark = the_remark(step.trace(shape((16, 16), jnp.float32), shape((32, 16), jnp.float32)).plan())
    assert remark.message == "each of the 4 devices of stage 0 repeats all of its work"
    assert "exchanges values for" in remark.why
    assert "times as many rows" in remark.fix
    odd = the_remark(step.trace(shape((16, 16), jnp.float32), shape((33, 16), jnp.float32)).plan())
    assert odd.why == "no batch has rows that divide by 4"
    assert "multiple of 4" in odd.fix


def test_even_stages_and_shared_work_are_not_told_of(slow: Path) -> None:
    step, params, images = convolutions()
    planned = bactrian.parallelize(step, num_stages=1, mesh="data=4", cluster=slow).trace(params, images).plan()
    assert not planned.plan.remarks


def test_stages_that_shardings_make_uneven_are_told_of(slow: Path) -> None:
    """A prime width divides by no axis, so that half of the layers are repeated on every device."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    shape = jax.ShapeDtypeStruct
    params = [shape((size, size), jnp.float32) for size in (509, 509)] + [shape((509, 512), jnp.float32)]
    params.append(shape((512, 512), jnp.float32))
    step = bactrian.parallelize(sgd(loss), num_stages=2, num_microbatches=2, mesh="model=4", cluster=slow)
    planned = step.trace(params, shape((254, 509), jnp.float32)).plan()
    (told,) = (r for r in planned.plan.remarks if r.message.startswith("with its shardings, stage 0 takes 1."))
    assert told.severity == "warning"
