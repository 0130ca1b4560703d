"""Mistakes that systems of this kind made before, each run end to end and compared with the reference."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_equal_step

import bactrian
from bactrian.driver.api import Parallelized
from bactrian.passes.plan.schema import Plan
from bactrian.runtime.instructions import Send

RNG = np.random.default_rng(7)
WIDTH, ROWS = 6, 8
MICROBATCHES = pytest.mark.parametrize("num_microbatches", [1, 2, 4])
Tree = Any


def product_of(one: list[Any], other: list[Any], short: list[tuple[Any, Any]]) -> list[Any]:
    """Every pair; those that are not in ``short`` run with ``--long`` only."""
    assert {a for a, _ in short} == set(one) and {b for _, b in short} == set(other)
    return [pytest.param(*row, marks=() if row in short else pytest.mark.long) for row in itertools.product(one, other)]


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32) / 2


X = {"x": normal(ROWS, WIDTH), "y": normal(ROWS, WIDTH)}
TOKENS = {"x": RNG.integers(0, 5, (ROWS, 3)), "y": RNG.integers(0, 5, (ROWS, 3))}


def layers(count: int) -> list[np.ndarray]:
    return [normal(WIDTH, WIDTH) for _ in range(count)]


def mlp(params: list[Any], x: jax.Array) -> jax.Array:
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def mean_loss(params: list[Any], batch: Tree) -> jax.Array:
    return jnp.mean((mlp(params, batch["x"]) - batch["y"]) ** 2)


def sgd(params: Tree, gradients: Tree, rate: float = 0.1) -> Tree:
    return jax.tree.map(lambda p, g: p - rate * g, params, gradients)


def sgd_step(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def step(params: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        value, gradients = bactrian.value_and_grad(loss, **options)(params, batch)
        return sgd(params, gradients), value

    return step


def check(
    function: Callable[..., Any], *args: Any, num_steps: int = 1, stages: int | None = None, **options: Any
) -> Parallelized:
    """Run the step, each time compared with the reference from the same state; returns it."""
    step = bactrian.parallelize(**{"num_stages": 2, **options})(function)
    state, *rest = args
    for _ in range(num_steps):
        expected = step.reference(state, *rest)
        result = step(state, *rest)
        assert_equal_step(bactrian.gather(result), expected)
        if isinstance(result, tuple):
            state = result[0]
    if stages is not None:
        assert {s for placement in step.compiled.placements for s in placement.stages} == set(range(stages))
    return step


# ---- 1: the scale of loss and gradients ----


@MICROBATCHES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_scale_of_loss_and_gradients(reduction: str, num_microbatches: int) -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        squares = (mlp(params, batch["x"]) - batch["y"]) ** 2
        return jnp.mean(squares) if reduction == "mean" else jnp.sum(squares)

    params = layers(2)
    step = check(
        sgd_step(loss, reduction=reduction), params, X, num_microbatches=num_microbatches, stages=2, num_steps=2
    )
    # The reference itself must not depend on the microbatches.
    value, gradients = jax.value_and_grad(loss)(params, X)
    assert_equal_step(step.reference(params, X), (sgd(params, gradients), value))


# ---- 2, 3: values held or read by several stages ----


@pytest.mark.parametrize(
    ("num_stages", "num_microbatches"), product_of([2, 3], [1, 2, 4], short=[(2, 4), (3, 1), (3, 2)])
)
def test_a_tied_embedding(num_stages: int, num_microbatches: int) -> None:
    """The table is read by the first and the last stage, and with three stages by the middle one too."""

    def loss(params: Tree, batch: Tree) -> jax.Array:
        x = params["table"][batch["x"]]
        for number, w in enumerate(params["layers"]):
            x = jnp.tanh(x @ w)
            if num_stages == 3 and number == 0:
                x = jnp.tanh(x + jax.nn.softmax(x @ params["table"].T) @ params["table"])
            x = bactrian.stage_boundary(x)
        logits = jax.nn.log_softmax(x @ params["table"].T)
        return -jnp.mean(jnp.take_along_axis(logits, batch["y"][..., None], axis=-1))

    params = {"table": normal(5, WIDTH), "layers": layers(num_stages)}
    step = check(
        sgd_step(loss), params, TOKENS, num_stages=num_stages, num_microbatches=num_microbatches, stages=num_stages
    )
    table = next(p for p in step.compiled.placements if "table" in p.path)
    assert len(table.stages) >= 2, "the table is on one stage only: nothing was tested"


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_value_read_by_layers_of_three_stages(schedule: str) -> None:
    """Its gradient is a sum across stages."""

    def loss(params: Tree, batch: Tree) -> jax.Array:
        encoded = jnp.tanh(batch["x"] @ params["encoder"])
        x = encoded
        for w, v in zip(params["layers"], params["cross"], strict=True):
            x = jnp.tanh(bactrian.stage_boundary(x) @ w + encoded @ v)
        return jnp.mean((x - batch["y"]) ** 2)

    params = {"encoder": normal(WIDTH, WIDTH), "layers": layers(3), "cross": layers(3)}
    check(sgd_step(loss), params, X, num_stages=4, num_microbatches=4, schedule=schedule, stages=4)


# ---- 4: scalars across stages in the update ----


@pytest.mark.parametrize(
    ("bad", "num_microbatches"), product_of([False, True], [1, 2, 4], short=[(False, 1), (False, 4), (True, 2)])
)
def test_global_norm_clip_and_finite_check(num_microbatches: int, bad: bool) -> None:
    def step(params: Tree, batch: Tree) -> tuple[Tree, Tree]:
        value, gradients = bactrian.value_and_grad(mean_loss)(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients)]))
        scale = jnp.minimum(1.0, 0.01 / norm)
        new = jax.tree.map(lambda p, g: jnp.where(finite, p - scale * g, p), params, gradients)
        return new, {"loss": value, "norm": norm, "finite": finite, "skipped": 1 - finite.astype(jnp.int32)}

    batch = {**X, "y": X["y"].copy()}
    batch["y"][3, 2] = np.inf if bad else 0
    made = check(step, layers(3), batch, num_stages=3, num_microbatches=num_microbatches, stages=3)
    assert bool(made(layers(3), batch)[1]["finite"]) != bad


# ---- 5: unusual results ----


def test_an_empty_update() -> None:
    """Gradients are handed out, the state comes back as it was."""

    def step(params: Tree, batch: Tree) -> tuple[Tree, Tree, jax.Array]:
        value, gradients = bactrian.value_and_grad(mean_loss)(params, batch)
        return params, jax.tree.map(lambda g: {"gradient": g}, gradients), value

    check(step, layers(2), X, num_microbatches=2)


def test_gradients_alone() -> None:
    def step(params: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        value, gradients = bactrian.value_and_grad(mean_loss)(params, batch)
        return {"gradients": gradients}, value

    check(step, layers(2), X, num_microbatches=2)


def test_a_parameter_without_gradient() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        return mean_loss(params["layers"], batch) + 0 * jnp.sum(jax.lax.stop_gradient(params["frozen"]))

    params = {"layers": layers(2), "unused": normal(3), "frozen": normal(4)}
    check(sgd_step(loss), params, X, num_microbatches=2)


def test_integer_results_and_state() -> None:
    def step(state: Tree, batch: Tree) -> tuple[Tree, jax.Array, jax.Array]:
        value, gradients = bactrian.value_and_grad(mean_loss)(state["params"], batch)
        count = state["count"] + 1
        return {"params": sgd(state["params"], gradients), "count": count}, value, count * 2

    check(step, {"params": layers(2), "count": jnp.int32(3)}, X, num_microbatches=2)


@MICROBATCHES
def test_aux_outputs(num_microbatches: int) -> None:
    words = {"mean": "mean", "sum": "sum", "last": "last", "concat": "concat", "rows": "sum", "argmax": "concat"}

    def loss(params: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        hidden = mlp(params[:1], batch["x"])
        out = mlp(params[1:], hidden)
        aux = {
            "mean": jnp.mean(hidden),
            "sum": jnp.sum(out, axis=0),
            "last": hidden[0],
            "concat": out * 2,
            "rows": jnp.int32(batch["x"].shape[0]),
            "argmax": jnp.argmax(hidden, axis=-1),
        }
        return jnp.mean((out - batch["y"]) ** 2), aux

    def step(params: Tree, batch: Tree) -> tuple[Tree, jax.Array, Tree]:
        vg = bactrian.value_and_grad(loss, has_aux=True, aux_reduction=words)
        (value, aux), gradients = vg(params, batch)
        return sgd(params, gradients), value, aux

    made = check(step, layers(2), X, num_microbatches=num_microbatches)
    _, _, aux = made(layers(2), X)
    assert aux["concat"].shape == (ROWS, WIDTH) and aux["rows"] == ROWS and aux["argmax"].dtype == jnp.int32


def test_results_that_are_inputs() -> None:
    def step(params: Tree, batch: Tree, rate: Any, table: Any) -> tuple[Tree, jax.Array, Any, Any]:
        value, gradients = bactrian.value_and_grad(mean_loss)(params, batch)
        return sgd(params, gradients, rate), value, {"rate": rate}, {"table": table, "again": table}

    check(step, layers(2), X, jnp.float32(0.2), normal(4, 2), num_microbatches=2)


def test_a_result_that_is_a_constant_or_twice_the_same() -> None:
    def step(params: Tree, batch: Tree) -> tuple[Tree, jax.Array, jax.Array, jax.Array]:
        value, gradients = bactrian.value_and_grad(mean_loss)(params, batch)
        return sgd(params, gradients), value, value, jnp.arange(3.0)

    check(step, layers(2), X, num_microbatches=2)


# ---- 6: shapes of the pipeline ----


SHAPES = [(3, 2, 2), (5, 2, 4), (5, 3, 4), (7, 4, 2), (4, 4, 1), (3, 3, 2)]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "num_microbatches", "schedule"),
    [
        pytest.param(*shape, schedule, marks=() if number % 2 == schedules else pytest.mark.long)
        for number, shape in enumerate(SHAPES)
        for schedules, schedule in enumerate(("gpipe", "1f1b"))
    ],
)
def test_odd_layers_and_few_microbatches(
    num_layers: int, num_stages: int, num_microbatches: int, schedule: str
) -> None:
    check(
        sgd_step(mean_loss),
        layers(num_layers),
        X,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
        stages=num_stages,
    )


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_layer_without_weights(place: str) -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        x = jnp.sin(batch["x"]) if place == "first" else batch["x"]
        x = jnp.tanh(x @ params[0])
        x = jnp.sin(bactrian.stage_boundary(x)) if place == "middle" else x
        x = bactrian.stage_boundary(x) @ params[1]
        x = jnp.sin(bactrian.stage_boundary(x)) if place == "last" else x
        return jnp.mean((x - batch["y"]) ** 2)

    check(sgd_step(loss), layers(2), X, num_microbatches=2)


def test_a_stage_without_output() -> None:
    """The frozen last stage keeps no state, and no result but the loss comes from it."""

    def step(params: Tree, batch: Tree, frozen: Any) -> tuple[Tree, jax.Array]:
        def loss(params: Tree) -> jax.Array:
            return jnp.mean((jnp.tanh(mlp(params, batch["x"]) @ frozen) - batch["y"]) ** 2)

        value, gradients = bactrian.value_and_grad(loss)(params)
        return sgd(params, gradients), value

    def without_loss(params: Tree, batch: Tree, frozen: Any) -> Tree:
        return step(params, batch, frozen)[0]

    for function in (step, without_loss):
        check(function, layers(1), X, normal(WIDTH, WIDTH), num_microbatches=2)


# ---- 7: traffic ----


@pytest.mark.parametrize(
    ("schedule", "num_stages"), product_of(["gpipe", "1f1b"], [2, 4], short=[("gpipe", 2), ("1f1b", 4)])
)
def test_every_value_travels_once_per_pair(schedule: str, num_stages: int) -> None:
    """A chain sends one activation down and one gradient up per microbatch and pair of neighbours, nothing else."""
    num_microbatches = 4
    step = bactrian.parallelize(num_stages=num_stages, num_microbatches=num_microbatches, schedule=schedule)(
        sgd_step(mean_loss)
    )
    step(layers(num_stages), X)
    session = step.compiled.session
    hidden = ROWS // num_microbatches * WIDTH * 4
    assert session.statistics.num_messages == 2 * (num_stages - 1) * num_microbatches
    assert session.statistics.message_bytes == session.statistics.num_messages * hidden
    check_messages(step)


def test_a_value_with_several_readers_travels_once_to_each() -> None:
    def loss(params: Tree, batch: Tree) -> jax.Array:
        first = x = jnp.tanh(batch["x"] @ params[0])
        for w in params[1:]:
            x = jnp.tanh((bactrian.stage_boundary(x) + first) @ w) + first * jnp.sin(first)
        return jnp.mean((x - batch["y"]) ** 2)

    step = check(sgd_step(loss), layers(4), X, num_stages=4, num_microbatches=2)
    check_messages(step)


def check_messages(step: Parallelized) -> None:
    """No (value, microbatch, pair of ranks) twice, and each message as long as its value."""
    session = step.compiled.session
    values = session.staged.program.values
    seen: Counter[tuple[int, int, int, int]] = Counter()
    total = 0
    for stream in session.streams:
        for send in (i for i in stream.instructions if isinstance(i, Send)):
            slot = stream.slots[send.slot]
            seen[slot.value, slot.microbatch, stream.rank, send.destination] += 1
            assert send.nbytes == slot.nbytes == values[slot.value].nbytes
            total += send.nbytes
    assert set(seen.values()) == {1}
    assert session.statistics.num_messages == len(seen) and session.statistics.message_bytes == total


# ---- 9: plans ----


def test_plan_save_load_is_the_same_text(tmp_path: Path) -> None:
    params = layers(3)
    step = bactrian.parallelize(num_stages=2, num_microbatches=2)(sgd_step(mean_loss))
    planned = step.trace(params, X).plan()
    planned.save(tmp_path / "a")
    loaded = Plan.load(tmp_path / "a")
    assert loaded.to_json() == planned.plan.to_json() == (tmp_path / "a" / "plan.json").read_text()
    again = bactrian.parallelize(plan=tmp_path / "a")(sgd_step(mean_loss))
    replanned = again.trace(params, X).plan()
    replanned.save(tmp_path / "b")
    for name in ("plan.json", "staged.mlir"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert_equal_step(bactrian.gather(again(params, X)), step.reference(params, X))


PLAN_SCRIPT = """
import hashlib, jax, jax.numpy as jnp, bactrian

@bactrian.parallelize(num_stages=3, num_microbatches=2)
def step(state, batch):
    def loss(p):
        x = p["table"][batch]
        for name in ("a", "b", "c"):
            x = jnp.tanh(x @ p[name])
        return jnp.mean((x @ p["table"].T) ** 2)
    value, g = bactrian.value_and_grad(loss)(state["params"])
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    new = jax.tree.map(lambda p, m, x: p - 0.1 * (m + x / norm), state["params"], state["moment"], g)
    return {"params": new, "moment": g}, {"loss": value, "norm": norm}

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
params = {"table": f32(5, 6), **{name: f32(6, 6) for name in ("a", "b", "c")}}
args = {"params": params, "moment": params}, jax.ShapeDtypeStruct((4, 3), jnp.int32)
planned = step.trace(*args).plan()
print(hashlib.sha256((planned.plan.to_json() + planned.staged_text).encode()).hexdigest())
"""


def plans_of(seeds: range) -> set[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    return {
        subprocess.run(
            [sys.executable, "-c", PLAN_SCRIPT],
            env=environment | {"PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            check=True,
            timeout=120,
        ).stdout
        for seed in seeds
    }


def test_the_same_plan_whatever_the_hash_seed() -> None:
    assert len(plans_of(range(2))) == 1


@pytest.mark.long
def test_the_same_plan_for_a_hundred_hash_seeds() -> None:
    assert len(plans_of(range(100))) == 1


# ---- 12: random numbers ----


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 2), (2, 1), (2, 4)])
def test_keyed_random_numbers(num_stages: int, num_microbatches: int) -> None:
    """Dropout in layers of different stages, other bits for every microbatch and step."""

    def step(state: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        key, now = jax.random.split(state["key"])
        now = jax.random.fold_in(now, bactrian.microbatch_index())

        def loss(params: list[Any]) -> jax.Array:
            x = batch["x"]
            for number, w in enumerate(params):
                bits = jax.random.bits(jax.random.fold_in(now, number), x.shape, jnp.uint8)
                x = jnp.tanh((x * (bits > 100)) @ w)
            return jnp.mean((x - batch["y"]) ** 2)

        value, gradients = bactrian.value_and_grad(loss)(state["params"])
        return {"params": sgd(state["params"], gradients), "key": key}, value

    state = {"params": layers(2), "key": jax.random.key(5)}
    made = check(step, state, X, num_stages=num_stages, num_microbatches=num_microbatches)
    assert not np.allclose(made({**state, "key": jax.random.key(6)}, X)[1], made(state, X)[1], rtol=1e-3)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_host_memory_may_be_written_to_when_the_step_returns(num_stages: int, num_microbatches: int) -> None:
    """A data loader fills one buffer again and again, while the step that reads it is still under way."""
    rows, width = 1024, 256
    params = [normal(width, width) / 4 for _ in range(4)]
    batch = {"x": normal(rows, width), "y": normal(rows, width)}
    rate = np.float32(0.1)

    def update(params: Tree, batch: Tree, rate: Any) -> tuple[Tree, jax.Array]:
        value, gradients = bactrian.value_and_grad(mean_loss)(params, batch)
        return sgd(params, gradients, rate), value

    step = bactrian.parallelize(update, num_stages=num_stages, num_microbatches=num_microbatches)
    step(*jax.tree.map(np.copy, (params, batch)), rate)  # compiled: the next call returns before it is carried out
    expected = step.reference(params, batch, rate)
    for placed in (False, True):
        own: Any = jax.tree.map(np.copy, (params, batch))
        state = bactrian.put(own[0], step.compiled, argnum=0) if placed else own[0]
        if placed:
            for array in own[0]:
                array[:] = np.nan
        got = step(state, own[1], rate)
        for array in jax.tree.leaves(own):
            array[:] = np.nan
        for one, other in zip(jax.tree.leaves(bactrian.gather(got)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
