"""Several functions on one state: the second one reads it where the first one placed it."""

from __future__ import annotations

import logging
import math

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import optax
import pytest

import bactrian
from bactrian.driver.arrays import host_values
from bactrian.driver.run import compiled_step
from bactrian.passes.frame.errors import ConfigError, ProgramError

WIDTHS = [16, 16, 64, 64, 64, 16, 48, 96, 24]  # of unequal layers


@pytest.fixture
def moves(monkeypatch):
    """The arrays that were brought to the host or to other stages."""
    made = []
    real = host_values.physical_values

    def counted(array):
        made.append(array.path)
        return real(array)

    monkeypatch.setattr(host_values, "physical_values", counted)
    monkeypatch.setattr(compiled_step, "physical_values", counted)
    return made


def make_params():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(key, (a, b)) / math.sqrt(a), "b": jnp.zeros(b)}
        for key, a, b in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def predict(params, x, upto=None):
    for layer in params[:upto]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x


def make_train(learning_rate, **options):
    optimizer = optax.adam(learning_rate)

    @bactrian.parallelize(num_microbatches=2, **options)
    def train(state, x):
        def loss_of(params):
            # The first layers are read once more, so that training weighs the stages otherwise than predicting does.
            again = predict(params, x, 2)
            for _ in range(6):
                again = jnp.tanh(again @ params[1]["w"].T @ params[1]["w"])
            return (predict(params, x) ** 2).mean() + again.mean()

        loss, grads = bactrian.value_and_grad(loss_of)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return train, {"params": make_params(), "opt": optimizer.init(make_params())}


def batch(rows=8):
    return jax.random.normal(jax.random.key(1), (rows, WIDTHS[0]))


def stages_of(tree):
    return [leaf.stages for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("num_stages", [2, 3])
def test_three_functions_share_one_state(num_stages, moves, caplog):
    first, state = make_train(optax.cosine_decay_schedule(1e-2, 10), num_stages=num_stages)
    second, _ = make_train(optax.exponential_decay(1e-3, 5, 0.5))
    evaluate = bactrian.parallelize(predict, num_microbatches=4, forward_only=True)
    x = batch()
    expected, expected_loss = first.reference(state, x)
    ours, loss = first(state, x)
    kept = stages_of(ours)
    prediction = evaluate(ours["params"], x)
    again = evaluate(ours["params"], 2 * x)
    after, second_loss = second(ours, x)
    assert stages_of(after) == kept
    last, last_loss = first(after, x)
    assert stages_of(last) == kept
    assert moves == []
    assert not [r for r in caplog.records if "moves" in r.message or "again" in r.message]
    # The evaluation alone would cut elsewhere.
    alone = evaluate.trace(make_params(), x).plan(num_stages=num_stages).plan
    assert [s.num_parameters for s in alone.stages] != [s.num_parameters for s in evaluate.compiled.plan.stages]

    numerics.assert_equal_step((prediction,), (evaluate.reference(expected["params"], x),))
    numerics.assert_equal_step((again,), (evaluate.reference(expected["params"], 2 * x),))
    expected, expected_second = second.reference(expected, x)
    expected, expected_last = first.reference(expected, x)
    losses = (expected_loss, expected_second, expected_last)
    numerics.assert_equal_step(
        (bactrian.gather(last), loss, second_loss, last_loss), (expected, *losses), zero_gradient_leaves=()
    )


def test_the_normal_loop_compiles_once(moves):
    step, state = make_train(1e-2, num_stages=2)
    made = set()
    for _ in range(3):
        state, _ = step(state, batch())
        made.add(id(step.compiled))
    assert len(made) == 1 and moves == []


def test_a_step_is_planned_again_for_state_that_is_elsewhere(moves, caplog):
    train, state = make_train(1e-2, num_stages=2)
    evaluate = bactrian.parallelize(predict, num_stages=2, num_microbatches=2, forward_only=True)
    x = batch()
    evaluate(state["params"], x)
    own = evaluate.compiled
    state, _ = train(state, x)
    with caplog.at_level(logging.WARNING, "bactrian"):
        for _ in range(2):
            result = evaluate(state["params"], x)
    assert evaluate.compiled is not own and moves == []
    again, uneven = [r.message for r in caplog.records]
    assert again == "predict is planned again: its state is where another step placed it"
    assert "another step has placed its state" in uneven
    numerics.assert_equal_step((result,), (evaluate.reference(bactrian.gather(state["params"]), x),))


def test_the_homes_are_in_the_module():
    train, state = make_train(1e-2, num_stages=2)
    state, _ = train(state, batch())
    evaluate = bactrian.parallelize(predict, forward_only=True)
    text = evaluate.trace(state["params"], batch()).text
    assert "bactrian.num_stages = 2 : i64" in text
    assert "bactrian.pinned_stages = [0]" in text and "bactrian.pinned_stages = [1]" in text
    assert "bactrian.pinned_stages" not in evaluate.trace(make_params(), batch()).text


def test_another_number_of_stages_is_refused():
    train, state = make_train(1e-2, num_stages=2)
    state, _ = train(state, batch())
    evaluate = bactrian.parallelize(predict, num_stages=3, forward_only=True)
    with pytest.raises(ConfigError, match=r"num_stages is 3, but .* by a step of 2 stages") as error:
        evaluate(state["params"], batch())
    assert "num_stages=2" in error.value.fix
    with pytest.raises(ConfigError, match="placed by a step of 2 stages"):
        bactrian.parallelize(predict, forward_only=True).trace(state["params"], batch()).plan(num_stages=3)
    other, others = make_train(1e-2, num_stages=3)
    others, _ = other(others, batch())
    mixed = [*state["params"][:4], *others["params"][4:]]
    with pytest.raises(ConfigError, match=r"by a step of 2 stages, .* by one of 3"):
        bactrian.parallelize(predict, forward_only=True)(mixed, batch())


@pytest.mark.parametrize("mesh", [None, "data=2"])
def test_stages_without_work_are_allowed_where_the_state_is(mesh, slow):
    square = [jax.random.normal(key, (32, 32)) / 6 for key in jax.random.split(jax.random.key(0), 4)]
    x = jnp.ones((4, 32))

    def forward(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    @bactrian.parallelize(num_stages=2, num_microbatches=2, mesh=mesh, cluster=slow)
    def train(params, x):
        loss, grads = bactrian.value_and_grad(lambda params: (forward(params, x) ** 2).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    def norms(params, x):
        return [jnp.sum(w**2) for w in reversed(params)]

    params, _ = train(square, x)
    first, last, half = (lambda params, x, part=part: forward(params[part], x) for part in PARTS)
    for fun, reduction in ((first, "concat"), (last, "concat"), (half, "concat"), (norms, "last")):
        step = bactrian.parallelize(fun, forward_only=True, out_reduction=reduction, cluster=slow)
        ours, want = bactrian.gather(step(params, x)), step.reference(params, x)
        for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        placed = [placement.stages for placement in step.compiled.placements]
        held = [leaf.stages for leaf in params]
        assert all(not stages or stages == there for stages, there in zip(placed, held, strict=False))
    train(params, x)


PARTS = (slice(1), slice(3, 4), slice(2, 4))  # of four matrices on two stages


def test_another_order_is_refused_by_name():
    square = [jax.random.normal(key, (32, 32)) for key in jax.random.split(jax.random.key(0), 4)]

    def forward(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    @bactrian.parallelize(num_stages=2, num_microbatches=2)
    def train(params, x):
        loss, grads = bactrian.value_and_grad(lambda params: (forward(params, x) ** 2).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    params, _ = train(square, jnp.ones((4, 32)))
    backwards = bactrian.parallelize(lambda params, x: forward(params[::-1], x), forward_only=True)
    with pytest.raises(ProgramError, match="cannot leave the arguments on the 2 stages") as error:
        backwards(params, jnp.ones((4, 32)))
    assert "params[1] (on stage 0) is read after params[3] (on stage 1)" in error.value.why
    assert "test_shared_state.py" in error.value.where
    placed_anew = backwards(bactrian.gather(params), jnp.ones((4, 32)))
    assert placed_anew.shape == (4, 32)


def test_what_has_to_move_is_told_once(moves, caplog):
    train, state = make_train(1e-2, num_stages=2)
    state, _ = train(state, batch())

    def scaled(params, x):  # the scalar is of the first stage, and read at the end
        return predict(params, x) * params[0]["b"][0]

    evaluate = bactrian.parallelize(scaled, num_microbatches=2, forward_only=True)
    with caplog.at_level(logging.WARNING, "bactrian"):
        results = [evaluate(state["params"], batch()) for _ in range(2)]
    assert moves == ["params[0]['b']"] * 2 or moves == ["state['params'][0]['b']"] * 2
    told = [r.message for r in caplog.records if "moves" in r.message]
    assert len(told) == 1 and "64 B" in told[0] and "params[0]['b']" in told[0]
    np.testing.assert_array_equal(*results)


def test_the_plan_of_a_forward_only_program():
    evaluate = bactrian.parallelize(predict, num_stages=2, num_microbatches=2, forward_only=True)
    plan = evaluate.trace(make_params(), batch()).plan().plan
    assert "forward only" in str(plan) and "1f1b" not in str(plan)
    assert sum(s.num_parameters for s in plan.stages) == sum(x.size for x in jax.tree.leaves(make_params()))
    assert all(s.parameter_bytes == s.state_bytes == 4 * s.num_parameters for s in plan.stages)
