"""Steps as users write them: gradients of the batch, metrics after the gradient, updates in place, weak types, mapped axes."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from jax import lax

import bactrian
from bactrian.driver.capture.lower_step import capture
from bactrian.driver.capture.reference_step import reference
from bactrian.passes.frame.errors import ProgramError

RNG = np.random.default_rng(0)
MATRICES = [RNG.normal(size=(6, 6)).astype(np.float32) / 3 for _ in range(3)]
X = RNG.normal(size=(8, 6)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 6
PLANS = [(1, 2), (2, 2), (2, 4)]
plans = pytest.mark.parametrize(("stages", "microbatches"), PLANS)


def chain(p: Any, x: Any) -> Any:
    for w in p:
        x = jnp.tanh(x @ w)
    return x


def mean_loss(p: Any, x: Any) -> Any:
    return jnp.mean((chain(p, x) - 0.2) ** 2)


def sum_loss(p: Any, x: Any) -> Any:
    return jnp.sum((chain(p, x) - 0.2) ** 2)


def sgd(p: Any, g: Any) -> Any:
    return jax.tree.map(lambda a, b: a - 0.1 * b, p, g)


def refused(step: Any, *args: Any, message: str, **options: Any) -> ProgramError:
    with pytest.raises(ProgramError, match=message) as caught:
        capture(step, args, **options)
    assert "test_step_idioms.py" in caught.value.where
    return caught.value


# ---- gradients with respect to the batch ----


def with_batch_gradient(transform: Any, loss: Any, **options: Any) -> Any:
    def step(p: Any, batch: Any) -> Any:
        value, (g, gx) = transform(loss, argnums=(0, 1), **options)(p, batch["x"])
        return sgd(p, g), value, gx, jnp.sqrt(jnp.sum(gx**2))

    return step


@plans
@pytest.mark.parametrize(("loss", "reduction"), [(mean_loss, "mean"), (sum_loss, "sum")])
def test_the_gradient_of_the_batch_is_that_of_one_device(loss: Any, reduction: str, stages: int, microbatches: int):
    ours = with_batch_gradient(bactrian.value_and_grad, loss, reduction=reduction)
    step = bactrian.parallelize(ours, num_stages=stages, num_microbatches=microbatches)
    whole = with_batch_gradient(jax.value_and_grad, loss)(MATRICES, {"x": X})
    assert whole[2].shape == X.shape
    numerics.assert_equal_step(step.reference(MATRICES, {"x": X}), whole)
    numerics.assert_equal_step(bactrian.gather(step(MATRICES, {"x": X})), whole)


def test_the_gradient_of_the_batch_on_a_mesh(slow: Any):
    ours = with_batch_gradient(bactrian.value_and_grad, mean_loss)
    step = bactrian.parallelize(ours, num_stages=1, num_microbatches=2, mesh="data=2", cluster=slow)
    whole = with_batch_gradient(jax.value_and_grad, mean_loss)(MATRICES, {"x": X})
    numerics.assert_equal_step(bactrian.gather(step(MATRICES, {"x": X})), whole)


@pytest.mark.parametrize(
    "values",
    [
        lambda batch: batch * 2,
        lambda batch: jnp.mean(batch, 0),
        lambda batch: batch.T,
        lambda batch: MATRICES[0][LABELS[: batch.shape[0]]] + 0 * batch,
    ],
)
def test_the_gradient_of_what_is_computed_from_the_batch_is_refused(values: Any):
    def step(p: Any, x: Any) -> Any:
        z = values(x)
        g, gz = bactrian.grad(lambda p, z: jnp.mean(chain(p, x)) + jnp.sum(z), argnums=(0, 1))(p, z)
        return sgd(p, g), gz

    error = refused(step, MATRICES, X, num_microbatches=2, message="is computed from the batch")
    assert "a leaf of the batch" in error.fix
    capture(step, (MATRICES, X))


def test_the_gradient_of_a_perturbation_is_refused():
    def step(p: Any, x: Any) -> Any:
        g, gd = bactrian.grad(lambda p, d: mean_loss(p, x + d), argnums=(0, 1))(p, jnp.zeros(x.shape))
        return sgd(p, g), gd

    refused(step, MATRICES, X, num_microbatches=2, message=r"float32\[4,6\]\) has as many rows as a microbatch")
    capture(step, (MATRICES, X))


def test_gradients_of_what_is_computed_from_state_are_reduced_as_ever():
    def step(p: Any, x: Any) -> Any:
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        g = bactrian.grad(lambda q: mean_loss(q, x).astype(jnp.float32))(half)
        return sgd(p, g)

    captured = capture(step, (MATRICES, X), num_microbatches=2)
    assert "differentiated" not in captured.text
    assert captured.dataflow.reductions == ("mean",) * 4


def test_rows_in_aux_need_a_word():
    def step(p: Any, x: Any, **options: Any) -> Any:
        loss = lambda p: (mean_loss(p, x), {"logits": chain(p, x)})  # noqa: E731
        (value, aux), g = bactrian.value_and_grad(loss, has_aux=True, **options)(p)
        return sgd(p, g), value, aux

    error = refused(step, MATRICES, X, num_microbatches=2, message=r"\['logits'\] may have a row for each example")
    assert "aux_reduction='concat'" in error.fix
    for word, rows in (("concat", 8), ("mean", 4)):
        captured = capture(step, (MATRICES, X), {"aux_reduction": word}, num_microbatches=2)
        assert captured.results[-1].shape == (rows, 6)
    capture(step, (MATRICES, X))


def with_counts(value_and_grad: Any) -> Any:
    def step(p: Any, x: Any) -> Any:
        def loss(p: Any) -> Any:
            return mean_loss(p, x), {"right": jnp.sum(chain(p, x) > 0), "all": jnp.all(x < 9)}

        (value, aux), g = value_and_grad(loss, has_aux=True)(p)
        return sgd(p, g), value, aux

    return step


def test_with_one_microbatch_counts_in_aux_need_no_word():
    step = bactrian.parallelize(with_counts(bactrian.value_and_grad), num_stages=2)
    want = with_counts(jax.value_and_grad)(MATRICES, X)
    numerics.assert_equal_step(bactrian.gather(step(MATRICES, X)), want)
    refused(with_counts(bactrian.value_and_grad), MATRICES, X, num_microbatches=2, message="cannot take the mean")


# ---- gradients that reach no result ----


def test_gradients_that_reach_no_result_are_refused():
    def step(state: Any, x: Any) -> Any:
        value, g = bactrian.value_and_grad(mean_loss)(state["p"], x)
        state["p"] = sgd(state["p"], g)
        return value

    error = refused(step, {"p": MATRICES}, X, message="the gradients reach no result")
    assert "return the updated state" in error.fix


# ---- metrics after the gradient ----


def with_metrics(value_and_grad: Any) -> Any:
    def step(p: Any, batch: Any) -> Any:
        def loss(p: Any) -> Any:
            logits = chain(p, batch["x"])
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(logits.shape[0]), batch["y"]]), logits

        (value, logits), g = value_and_grad(loss, has_aux=True)(p)
        new = sgd(p, g)
        metrics = {
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["y"]),
            "after": mean_loss(new, batch["x"]),  # another forward pass, with the new parameters
            "labels": batch["y"],
            "mean": jnp.mean(batch["x"], 0),
            "index": bactrian.microbatch_index() + 1,
        }
        return new, value, metrics

    return step


@pytest.mark.parametrize("stages", [1, 2])
def test_with_one_microbatch_what_is_behind_the_gradient_reads_the_batch(stages: int):
    args = MATRICES, {"x": X, "y": LABELS}
    step = bactrian.parallelize(with_metrics(bactrian.value_and_grad), num_stages=stages)
    want = with_metrics(jax.value_and_grad)(*args)
    numerics.assert_equal_step(step.reference(*args), want)
    numerics.assert_equal_step(bactrian.gather(step(*args)), want)


def test_with_more_microbatches_metrics_name_the_line_and_what_to_write():
    def step(p: Any, batch: Any) -> Any:
        loss = lambda p: (mean_loss(p, batch["x"]), chain(p, batch["x"]))  # noqa: E731
        (value, logits), g = bactrian.value_and_grad(loss, has_aux=True, aux_reduction="concat")(p)
        return sgd(p, g), value, jnp.mean(jnp.argmax(logits, -1)[: batch["y"].shape[0]] == batch["y"])

    error = refused(
        step, MATRICES, {"x": X, "y": LABELS}, num_microbatches=2, message=r"result\[2\] depends on the batch"
    )
    assert f"test_step_idioms.py:{step.__code__.co_firstlineno + 3} (" in error.where
    assert "(loss, aux), grads = bactrian.value_and_grad(loss_fn, has_aux=True)(params)" in error.fix


# ---- the batch is another argument ----


def keyed(key: Any, p: Any, batch: Any) -> Any:
    value, g = bactrian.value_and_grad(mean_loss)(p, batch["x"])
    return sgd(p, g), value


PARAMETERS = {"a": np.ones((6, 4), np.float32), "b": np.ones((4, 3), np.float32)}


def dense(key: Any, p: Any, batch: Any) -> Any:
    value, g = bactrian.value_and_grad(lambda p: jnp.mean((batch["x"] @ p["a"] @ p["b"]) ** 2))(p)
    return sgd(p, g), value


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
def test_a_batch_that_is_not_argument_1_is_found_out(microbatches: int):
    args = jax.random.key(0), PARAMETERS, {"x": X, "y": LABELS}
    with pytest.raises(ProgramError) as caught:
        capture(dense, args, num_microbatches=microbatches)
    assert "argument 1 (p) is taken for the batch, since batch_argnums is not given" in caught.value.why
    assert caught.value.fix.startswith("say batch_argnums=(2,) if the batch is batch")
    capture(dense, args, num_microbatches=2, batch_argnums=(2,))


def test_errors_of_a_step_with_its_batch_in_place_are_its_own():
    def step(p: Any, batch: Any) -> Any:
        return bactrian.grad(lambda p: jnp.sum(batch["x"] @ p["b"]))(p)

    with pytest.raises(TypeError, match="dot_general"):
        capture(step, (PARAMETERS, {"x": X, "y": LABELS}), num_microbatches=2)


# ---- weak types ----


@pytest.mark.parametrize("start", [0, 0.0, jnp.int32(0)])
def test_a_step_that_counts_from_a_python_number_is_traced_once(start: Any, caplog: pytest.LogCaptureFixture):
    @bactrian.parallelize(num_stages=1)
    def step(state: Any, x: Any, key: Any) -> Any:
        value, g = bactrian.value_and_grad(mean_loss)(state["p"], x)
        return {"p": sgd(state["p"], g), "step": state["step"] + 1}, value

    state: Any = {"p": MATRICES, "step": start}
    with caplog.at_level(logging.WARNING, "bactrian"):
        for number in range(3):
            state, _ = step(state, X, jax.random.PRNGKey(number))
    assert "traced again" not in caplog.text
    assert bactrian.gather(state)["step"] == 3
    assert state["step"].weak_type == isinstance(start, (int, float))


def test_an_error_about_weak_types_says_so():
    def step(state: Any, x: Any) -> Any:
        return {"p": sgd(state["p"], bactrian.grad(mean_loss)(state["p"], x)), "step": state["step"] + 1}

    captured = capture(step, ({"p": MATRICES, "step": 0}, X))
    with pytest.raises(ProgramError, match="not those it was captured with") as caught:
        captured.flatten(({"p": MATRICES, "step": jnp.int32(0)}, X))
    assert caught.value.why == "state['step'] was int32[] of weak type (as a Python number) and is int32[]"


# ---- the axis of a pmapped step ----


def pmapped(value_and_grad: Any, axis: bool) -> Any:
    def over(name: str, x: Any, *rest: Any) -> Any:
        return getattr(lax, name)(x, "batch", *rest) if axis else x

    def step(p: Any, x: Any) -> Any:
        def loss(p: Any) -> Any:
            h = chain(p, x)
            h = h - over("pmean", jnp.mean(h, 0))  # as batch statistics do
            h, _ = lax.scan(lambda c, _: (over("psum", c) * 0.5, None), h, None, length=2)
            return jnp.mean(h**2)

        value, g = value_and_grad(loss)(p)
        g = over("pmean", g)
        number = lax.axis_index("batch") if axis else jnp.int32(0)
        gathered = lax.all_gather(value, "batch") if axis else value[None]
        moved = over("ppermute", value, [(0, 0)])
        size = lax.psum(1, "batch") if axis else 1
        return sgd(p, g), over("pmax", value) * size, (number, gathered, moved)

    return step


@plans
def test_a_pmapped_step_is_that_of_one_device(stages: int, microbatches: int):
    ours = pmapped(bactrian.value_and_grad, axis=True)
    step = bactrian.parallelize(ours, num_stages=stages, num_microbatches=microbatches, axis_name="batch")
    plain = capture(pmapped(bactrian.value_and_grad, axis=False), (MATRICES, X), num_microbatches=microbatches)
    want = reference(plain, (MATRICES, X))
    numerics.assert_equal_step(step.reference(MATRICES, X), want)
    numerics.assert_equal_step(bactrian.gather(step(MATRICES, X)), want)
    captured = step.trace(MATRICES, X).captured
    assert not any("psum" in op.equation.primitive.name for op in captured.dataflow.operations)
    assert "test_step_idioms.py" in captured.text


def test_an_axis_that_nothing_binds_names_the_option():
    error = refused(
        pmapped(bactrian.value_and_grad, axis=True), MATRICES, X, message="uses the axis 'batch', which nothing binds"
    )
    assert "parallelize(axis_name='batch')" in error.fix
