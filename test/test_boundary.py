"""The public boundary functions: outside of a capture they are JAX's own; misuse is refused with the user's line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bactrian
from bactrian.driver.capture.lower_step import capture
from bactrian.driver.capture.reference_step import reference
from bactrian.passes.frame.errors import ConfigError, ProgramError


def loss(w, x):
    return jnp.mean((x @ w) ** 2)


W = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
X = np.linspace(-2, 1, 32, dtype=np.float32).reshape(8, 4)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_outside_of_a_capture_value_and_grad_is_jax_s():
    same(bactrian.value_and_grad(loss)(W, X), jax.value_and_grad(loss)(W, X))
    same(bactrian.value_and_grad(loss, argnums=(0, 1))(W, X), jax.value_and_grad(loss, argnums=(0, 1))(W, X))
    aux_loss = lambda w, x: (loss(w, x), {"n": 3, "y": x @ w})  # noqa: E731
    same(bactrian.grad(aux_loss, has_aux=True)(W, X), jax.grad(aux_loss, has_aux=True)(W, X))
    assert bactrian.microbatch_index() == 0
    tree = {"a": X, "b": None}
    assert bactrian.stage_boundary(tree) is tree


def test_errors_of_jax_come_through():
    with pytest.raises(TypeError, match="scalar-output"):
        bactrian.grad(lambda w: w * 2)(W)
    with pytest.raises(TypeError, match="real- or complex-valued"):
        bactrian.grad(lambda n: n * 2)(3)
    gradient = bactrian.grad(lambda n: jnp.float32(2.0), allow_int=True)(3)
    assert gradient.dtype == jax.dtypes.float0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holomorphic": True}, "holomorphic"),
        ({"reduce_axes": ("data",)}, "'reduce_axes'"),
        ({"mode": "fwd"}, "'mode'"),
        ({"reduction": "max"}, "'max'"),
        ({"reduction": "concat"}, "'concat'"),
        ({"aux_reduction": {"a": "median"}}, "'median'"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        bactrian.value_and_grad(loss, **options)
    assert "test_boundary.py" in error.value.where


def step_with(aux, words):
    def step(w, x):
        def fun(w):
            return loss(w, x), aux(w, x)

        (value, out), g = bactrian.value_and_grad(fun, has_aux=True, aux_reduction=words)(w)
        return w - g, value, out

    return step


@pytest.mark.parametrize(
    ("aux", "words", "message"),
    [
        (lambda w, x: {"n": jnp.int32(3)}, "mean", r"mean of \['n'\].*int32\[\]"),
        (lambda w, x: {"n": 3}, "mean", r"mean of \['n'\]"),
        (lambda w, x: {"ok": jnp.all(x > 0)}, "sum", r"sum \['ok'\].*bool"),
        (lambda w, x: {"k": jax.random.key(0)}, "sum", r"sum \['k'\]"),
        (lambda w, x: {"s": jnp.sum(x)}, "concat", r"\['s'\]: it is a scalar"),
        (lambda w, x: {"s": jnp.sum(x)}, {"t": "mean"}, "no prefix"),
    ],
)
def test_aux_that_can_t_be_reduced(aux, words, message):
    with pytest.raises(ProgramError, match=message) as error:
        capture(step_with(aux, words), (W, X), num_microbatches=2)
    assert "test_boundary.py" in error.value.where


def test_aux_of_every_reduction():
    words = {"mean": "mean", "sum": "sum", "last": {"a": "last", "k": "last"}, "concat": "concat", "static": "mean"}

    def aux(w, x):
        return {
            "mean": jnp.mean(x),
            "sum": x.shape[0],
            "last": {"a": x[0, 0], "k": jax.random.fold_in(jax.random.key(0), bactrian.microbatch_index())},
            "concat": x @ w,
            "static": "name",
        }

    captured = capture(step_with(aux, words), (W, X), num_microbatches=4)
    _, value, out = reference(captured, (W, X))
    np.testing.assert_allclose(value, loss(W, X), rtol=1e-6)
    np.testing.assert_allclose(out["mean"], X.mean(), rtol=1e-6)
    assert out["sum"] == 8
    assert out["last"]["a"] == X[6, 0]
    same(jax.random.key_data(out["last"]["k"]), jax.random.key_data(jax.random.fold_in(jax.random.key(0), 3)))
    np.testing.assert_allclose(out["concat"], X @ W, rtol=1e-5)
    assert out["static"] == "name"


def test_below_the_boundary_concat_has_the_full_batch():
    def step(w, x):
        fun = lambda w: (loss(w, x), x @ w)  # noqa: E731
        (value, y), g = bactrian.value_and_grad(fun, has_aux=True, aux_reduction="concat")(w)
        assert y.shape == (8, 3)
        return w - g, value, jnp.max(y)

    captured = capture(step, (W, X), num_microbatches=2)
    np.testing.assert_allclose(reference(captured, (W, X))[2], (X @ W).max(), rtol=1e-6)


def test_a_trace_outside_is_not_used_inside_and_the_other_way_round():
    @jax.jit
    def number():
        return jnp.float32(bactrian.microbatch_index())

    gradient = jax.jit(bactrian.value_and_grad(lambda w, x: loss(w, x) + number()))

    def step(w, x):
        value, g = gradient(w, x)
        return w - g, value

    outside = step(W, X)[1]
    captured = capture(step, (W, X), num_microbatches=4)
    np.testing.assert_allclose(reference(captured, (W, X))[1], outside + 1.5, rtol=1e-6)
    assert step(W, X)[1] == outside


def test_microbatch_index_in_a_loop():
    def step(w, x):
        def fun(w):
            return jax.lax.fori_loop(0, 3, lambda i, v: v + bactrian.microbatch_index(), loss(w, x))

        value, g = bactrian.value_and_grad(fun)(w)
        return w - g, value

    captured = capture(step, (W, X), num_microbatches=2)
    assert "bactrian.microbatch_index" in captured.text
    np.testing.assert_allclose(reference(captured, (W, X))[1], loss(W, X) + 1.5, rtol=1e-6)


def test_stage_boundary_marks_and_keeps_the_gradient():
    def fun(w, x):
        hidden = bactrian.stage_boundary({"h": jnp.tanh(x @ w), "mask": x[:, 0] > 0})
        rows = jax.vmap(lambda row: bactrian.stage_boundary(row * 2))(hidden["h"])
        return jnp.mean(jnp.where(hidden["mask"][:, None], rows, 0) ** 2)

    def step(w, x):
        value, g = bactrian.value_and_grad(fun)(w, x)
        return w - g, value

    captured = capture(step, (W, X), num_microbatches=2)
    assert captured.text.count("stablehlo.custom_call @bactrian.stage_boundary") == 2
    new, value = reference(captured, (W, X))
    expected, g = jax.value_and_grad(fun)(W, X)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(new, W - g, rtol=1e-5, atol=1e-6)


def test_stage_boundary_without_a_gradient_and_inside_a_scan():
    def fun(x, w):
        x, _ = jax.lax.scan(lambda c, _: (bactrian.stage_boundary(jnp.tanh(c @ w)), None), x, length=2)
        return bactrian.stage_boundary(x)

    w = W @ W.T
    captured = capture(fun, (X, w), batch_argnums=(0,), num_microbatches=2, forward_only=True)
    np.testing.assert_allclose(reference(captured, (X, w)), np.tanh(np.tanh(X @ w) @ w), rtol=1e-5)


def test_the_gradient_of_the_boundary_is_refused():
    def step(w, x):
        return jax.grad(lambda w: jnp.sum(bactrian.grad(loss)(w, x)))(w)

    with pytest.raises(ProgramError, match="is differentiated") as error:
        capture(step, (W, X))
    assert "test_boundary.py" in error.value.where


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_loss_and_gradient_equal_the_full_batch(reduction, num_microbatches):
    full = loss if reduction == "mean" else lambda w, x: jnp.sum((x @ w) ** 2)

    def step(w, x):
        value, g = bactrian.value_and_grad(full, reduction=reduction)(w, x)
        return w - 0.1 * g, value

    captured = capture(step, (W, X), num_microbatches=num_microbatches)
    new, value = reference(captured, (W, X))
    expected, g = jax.value_and_grad(full)(W, X)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(new, W - 0.1 * g, rtol=1e-5, atol=1e-6)
