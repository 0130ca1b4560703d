"""The reference against plain JAX on the full batch, for the state that users have."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import bactrian
from bactrian.driver.capture.lower_step import capture
from bactrian.driver.capture.reference_step import reference, reference_function

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(8, 5)).astype(np.float32), "y": RNG.normal(size=(8, 2)).astype(np.float32)}
MICROBATCHES = pytest.mark.parametrize("num_microbatches", [1, 2, 4])


def close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not hasattr(x, "shape"):
            assert x is y
        elif jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(x), jax.random.key_data(y))
        else:
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def check(step, *args, num_microbatches, **kwargs):
    captured = capture(step, args, kwargs, num_microbatches=num_microbatches)
    expected = eqx.filter_jit(step)(*args, **kwargs)  # outside of a capture: plain JAX on the full batch
    close(reference(captured, args, kwargs), expected)
    return captured


@MICROBATCHES
def test_flax_train_state(num_microbatches):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Dense(7)(x)))

    model = Model()
    params = model.init(jax.random.key(0), BATCH["x"])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1, momentum=0.9))

    def step(state, batch):
        def loss(p):
            return jnp.mean((state.apply_fn(p, batch["x"]) - batch["y"]) ** 2)

        value, g = bactrian.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=g), value

    state = state.replace(step=jnp.int32(0))
    captured = check(step, state, BATCH, num_microbatches=num_microbatches)
    assert [a.role for a in captured.arguments if a.argnum == 0] == ["state"] * len(jax.tree.leaves(state))
    assert "state.params['params']['Dense_0']['bias']" in [a.path for a in captured.arguments]


@MICROBATCHES
def test_equinox_module(num_microbatches):
    model = eqx.nn.MLP(5, 2, 7, 2, activation=jax.nn.gelu, key=jax.random.key(0))
    tx = optax.sgd(0.1)
    opt = tx.init(eqx.filter(model, eqx.is_array))

    def step(model, batch, opt):
        arrays, static = eqx.partition(model, eqx.is_array)

        def loss(arrays):
            return jnp.mean((jax.vmap(eqx.combine(arrays, static))(batch["x"]) - batch["y"]) ** 2)

        value, g = bactrian.value_and_grad(loss)(arrays)
        updates, new = tx.update(g, opt, arrays)
        return eqx.apply_updates(model, updates), new, value

    captured = check(step, model, BATCH, opt, num_microbatches=num_microbatches)
    new, _, _ = reference(captured, (model, BATCH, opt))
    assert new.activation is model.activation
    assert {a.role for a in captured.arguments if a.argnum == 0} == {"state"}


@MICROBATCHES
def test_nnx_split_state(num_microbatches):
    graph, params = nnx.split(nnx.Linear(5, 2, rngs=nnx.Rngs(0)))

    def step(params, batch):
        def loss(p):
            return jnp.mean((nnx.merge(graph, p)(batch["x"]) - batch["y"]) ** 2)

        value, g = bactrian.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, g), value

    captured = check(step, params, BATCH, num_microbatches=num_microbatches)
    assert {a.role for a in captured.arguments if a.argnum == 0} == {"state"}


@MICROBATCHES
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_in_the_state(num_microbatches, impl):
    state = {"w": jnp.ones((5, 2)), "key": jax.random.key(3, impl=impl), "rows": jnp.float32(0)}

    def step(state, batch):
        def loss(w):
            keep = jax.random.bernoulli(state["key"], 0.5, (1, 5))
            return jnp.mean(((batch["x"] * keep) @ w - batch["y"]) ** 2)

        value, g = bactrian.value_and_grad(loss)(state["w"])
        new = {"w": state["w"] - g, "key": jax.random.split(state["key"])[0], "rows": state["rows"] + 8}
        return new, value

    captured = check(step, state, BATCH, num_microbatches=num_microbatches)
    key = next(a for a in captured.arguments if a.path == "state['key']")
    assert key.key_impl == impl
    assert key.shape == () and key.physical.dtype == np.uint32 and len(key.physical.shape) == 1
    assert bool(captured.remarks) == (num_microbatches > 1)


def test_each_microbatch_its_own_bits():
    def step(w, batch, key):
        def loss(w):
            bits = jax.random.normal(jax.random.fold_in(key, bactrian.microbatch_index()))
            return jnp.sum(w) * bits

        value, g = bactrian.value_and_grad(loss)(w)
        return w - g, value

    key = jax.random.key(0)
    captured = capture(step, (jnp.ones(3), BATCH, key), num_microbatches=4)
    assert not captured.remarks
    _, value = reference(captured, (jnp.ones(3), BATCH, key))
    bits = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(4)]
    np.testing.assert_allclose(value, 3 * np.mean(bits), rtol=1e-5)


@MICROBATCHES
def test_jitted_step_clip_and_scalars(num_microbatches):
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.adam(1e-3))

    @functools.partial(jax.jit, donate_argnums=(), static_argnames="scale")
    def step(params, batch, opt, rate, *, scale="two"):
        def loss(p):
            y = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]))(p, batch["x"])
            return {"two": 2, "one": 1}[scale] * jnp.mean((y - batch["y"]) ** 2)

        value, g = bactrian.value_and_grad(loss)(params)
        updates, opt = tx.update(g, opt, params)
        updates = jax.tree.map(lambda u: jnp.where(jnp.isfinite(value), u * rate, 0), updates)
        return optax.apply_updates(params, updates), opt, {"loss": value, "rate": rate, "norm": optax.tree.norm(g)}

    params = {"w": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32), "unused": jnp.zeros(3)}
    captured = check(step, params, BATCH, tx.init(params), 0.5, scale="one", num_microbatches=num_microbatches)
    roles = {a.argnum: a.role for a in captured.arguments}
    assert roles == {0: "state", 1: "batch", 2: "state", 3: "constant"}


def test_argnums_and_a_constant_of_the_program():
    table = jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32)

    def step(w, batch, v):
        def loss(w, v):
            return jnp.mean((batch["x"] @ w * v - jnp.sum(table)) ** 2)

        value, (gw, gv) = bactrian.value_and_grad(loss, argnums=(0, 1))(w, v)
        return w - gw, v - gv, value

    captured = check(step, jnp.ones((5, 2)), BATCH, jnp.ones(2), num_microbatches=2)
    assert [a.updated_by for a in captured.arguments] == [0, None, None, 1]


def test_forward_only():
    def fun(params, batch):
        return {"y": batch["x"] @ params, "mean": jnp.mean(batch["x"]), "n": batch["x"].shape[0], "name": "f"}

    words = {"y": "concat", "mean": "mean", "n": "sum", "name": "last"}
    w = np.ones((5, 2), np.float32)
    captured = capture(fun, (w, BATCH), num_microbatches=4, forward_only=True, out_reduction=words)
    assert 'kinds = "output,output,output"' in captured.text
    out = reference(captured, (w, BATCH))
    close(out, {"y": BATCH["x"] @ w, "mean": BATCH["x"].mean(), "n": np.int32(8), "name": "f"})


def test_functions_with_their_own_derivatives():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))

    def fun(w, x):
        return double(jax.nn.relu(x @ w)) + jax.lax.map(double, x @ w)

    captured = capture(fun, (jnp.ones((5, 2)), BATCH["x"]), num_microbatches=2, forward_only=True)
    close(reference(captured, (jnp.ones((5, 2)), BATCH["x"])), fun(jnp.ones((5, 2)), BATCH["x"]))

    def step(w, x):
        value, g = bactrian.value_and_grad(lambda w: jnp.mean(fun(w, x)))(w)
        return w - g, value

    check(step, jnp.ones((5, 2)), BATCH["x"], num_microbatches=2)


def test_reference_function_is_one_program_and_may_donate():
    def step(w, x):
        value, g = bactrian.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - g, value

    w = jnp.ones((5, 2))
    captured = capture(step, (w, BATCH["x"]), num_microbatches=4)
    expected = reference(captured, (w, BATCH["x"]))
    assert not w.is_deleted()
    assert reference_function(captured) is reference_function(captured)
    close(reference_function(captured, unroll=4)(w, BATCH["x"]), expected)
    close(reference_function(captured, donate_state=True)(w, BATCH["x"]), expected)
    assert w.is_deleted()
