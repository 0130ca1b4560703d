"""Traps that a system of this kind fell into before, as cases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import (
    WIDTH,
    Built,
    Case,
    batches,
    chain_loss,
    matrices,
    on_host,
    options,
    sgd_step,
    squared_error,
    vector_data,
)
from models import skip_if_not_finite

import bactrian


def tied(stages: int) -> Built:
    """One matrix read by the first layer, the last, and with three stages the middle one too."""
    params = matrices("shared", "a", "b", "c", "d")

    def loss(params: Any, batch: Any) -> jax.Array:
        x = jnp.tanh(batch["x"] @ params["shared"])
        x = bactrian.stage_boundary(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]))
        if stages == 3:
            x = bactrian.stage_boundary(jnp.tanh(jnp.tanh(x @ params["shared"]) @ params["c"]))
        return squared_error(jnp.tanh(x @ params["d"]) @ params["shared"].T, batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(stages, 4))


def read_by_three() -> Built:
    """A value read by three layers of different stages: its gradient is a sum over stages."""
    params = matrices("encoder", "a", "b", "c", "d")

    def loss(params: Any, batch: Any) -> jax.Array:
        memory = jnp.tanh(batch["x"] @ params["encoder"])
        x = memory
        for name in "abcd":
            x = jnp.tanh(x @ params[name]) + memory
        return squared_error(x, batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(4, 4))


def empty_update() -> Built:
    """Nothing is updated: the gradients themselves are the result."""

    def step(params: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(chain_loss("abcd"))(params, batch)
        return {"loss": value, "gradients": gradients}

    state = matrices(*"abcd")
    return Built(step, state, batches(vector_data), options(2, 4, state={}), next_state=lambda _: state)


def no_gradient() -> Built:
    """One parameter is never read, one only behind ``stop_gradient``."""
    params = matrices("a", "b", "c", "frozen", "unused")

    def loss(params: Any, batch: Any) -> jax.Array:
        x = jnp.tanh(batch["x"] @ params["a"]) @ jax.lax.stop_gradient(params["frozen"])
        return squared_error(jnp.tanh(x @ params["b"]) @ params["c"], batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(2, 4))


def aux_outputs() -> Built:
    """Integer and floating aux with each of the four reductions, and a norm over all stages."""
    params = matrices(*"abcd")
    reductions = {"spread": "mean", "positive": "sum", "tail": "last", "each": "concat"}

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for name in "abcd":
            x = jnp.tanh(x @ params[name])
        best = x.argmax(-1).astype(jnp.int32)
        aux = {"spread": x.std(), "positive": (x > 0).sum(dtype=jnp.int32), "tail": x, "each": {"best": best, "x": x}}
        return squared_error(x, batch["y"]), aux

    def step(params: Any, batch: Any) -> Any:
        value_and_grad = bactrian.value_and_grad(loss, has_aux=True, aux_reduction=reductions)
        (value, aux), gradients = value_and_grad(params, batch)
        norm = optax.tree.norm(gradients)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value, aux, norm

    return Built(step, params, batches(vector_data), options(2, 4))


def result_is_input() -> Built:
    """A part of the state and a read-only argument come back as they are."""
    state = {"params": matrices(*"abcd"), "temperature": np.float32(2.0), "count": np.int32(0)}

    def step(state: Any, batch: Any, rate: Any) -> Any:
        params, value = sgd_step(chain_loss("abcd"))(state["params"], batch)
        new = {"params": params, "temperature": state["temperature"], "count": state["count"] + 1}
        return new, value, rate

    return Built(step, state, [(*b, np.float32(0.5)) for b in batches(vector_data)], options(2, 4))


def places_exchanged() -> Built:
    """Leaves of the state change places as they are, transposed, and through the auxiliary output; and spectral norms,
    whose vectors come back the same way."""
    others = {name: np.ascontiguousarray(matrix[:, : WIDTH // 2]) for name, matrix in matrices("e", "f").items()}
    vectors = {name: matrix[0] for name, matrix in matrices(*"abcd").items()}
    state = {"params": matrices(*"abcd"), "one": matrices("g")["g"], "other": matrices("h")["h"], "vectors": vectors}
    state |= {"tall": others["e"], "wide": others["f"].T.copy(), "loop": [np.float32(n) for n in range(3)]}

    def step(state: Any, batch: Any) -> Any:
        def loss(params: Any, batch: Any) -> Any:
            x, vectors = batch["x"], dict[str, jax.Array]()
            for name, matrix in params.items():
                left = jax.lax.stop_gradient(matrix.T @ state["vectors"][name])
                right = matrix @ (left / jnp.linalg.norm(left))
                vectors[name] = jax.lax.stop_gradient(right / jnp.linalg.norm(right))
                x = jnp.tanh(x @ (matrix / jnp.linalg.norm(right)))
            return squared_error(x, batch["y"]), (vectors, state["tall"])

        value_and_grad = bactrian.value_and_grad(loss, has_aux=True, aux_reduction="last")
        (value, (vectors, tall)), gradients = value_and_grad(state["params"], batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradients)
        new = {"params": params, "one": state["other"], "other": state["one"], "vectors": vectors}
        first, *rest = state["loop"]
        return new | {"wide": tall.T, "tall": state["wide"].T, "loop": [*rest, first]}, value

    return Built(step, state, batches(vector_data), options(2, 4))


def chain(names: str, stages: int, microbatches: int, reduction: str = "mean") -> Built:
    """A plain chain of layers with SGD."""
    rate = 0.1 if reduction == "mean" else 0.1 / microbatches
    step = sgd_step(chain_loss(names), reduction, rate)
    return Built(step, matrices(*names), batches(vector_data), options(stages, microbatches))


def weightless(stages: int) -> Built:
    """The middle stage has neither weights nor a result: with ``stages=2``, only a middle layer."""
    params = matrices("a", "d")
    rotation = np.linalg.qr(matrices("fixed")["fixed"])[0]

    def loss(params: Any, batch: Any) -> jax.Array:
        x = bactrian.stage_boundary(jnp.tanh(batch["x"] @ params["a"]))
        x = jnp.sin(3.0 * x @ rotation) * jax.nn.sigmoid(x)
        if stages == 3:
            x = bactrian.stage_boundary(x)
        return squared_error(x @ params["d"], batch["y"])

    return Built(sgd_step(loss), params, batches(vector_data), options(stages, 4))


def random_numbers(typed: bool) -> Built:
    """Dropout by the key of the state and the number of the microbatch; the key moves on each step."""
    key = jax.random.key(3) if typed else np.asarray(jax.random.PRNGKey(3))
    state = {"params": matrices(*"abcd"), "key": key}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        x, key = batch["x"], jax.random.fold_in(key, bactrian.microbatch_index())
        for number, name in enumerate("abcd"):
            keep = jax.random.bernoulli(jax.random.fold_in(key, number), 0.9, x.shape)
            x = jnp.where(keep, jnp.tanh(x @ params[name]) / 0.9, 0.0)
        return squared_error(x, batch["y"])

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state["params"], batch, state["key"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradients)
        return {"params": params, "key": jax.random.split(state["key"])[0]}, value

    return Built(step, state, batches(vector_data), options(2, 4))


def not_finite(transform: Callable[[optax.GradientTransformation], optax.GradientTransformation]) -> Built:
    """The second batch has an infinity: that step must change nothing."""
    # Adam makes a step of a gradient that is nothing but rounding noise: ``eps`` keeps it small.
    tx = transform(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-5)))
    params = matrices(*"abcd")
    data = batches(vector_data)
    data[1][0]["y"][3, 5] = np.inf

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(chain_loss("abcd"))(state["params"], batch)
        updates, opt = tx.update(gradients, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    return Built(step, on_host({"params": params, "opt": tx.init(params)}), data, options(2, 4))


def several_arguments() -> Built:
    """State, two batch arguments, a read-only rate; ``bactrian.grad`` with two differentiated arguments."""
    weights, biases = matrices(*"abcd"), {name: np.zeros(WIDTH, np.float32) for name in "abcd"}

    def loss(weights: Any, biases: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for name in "abcd":
            x = jnp.tanh(x @ weights[name] + biases[name])
        return squared_error(x, y)

    def step(state: Any, x: jax.Array, y: jax.Array, rate: Any) -> Any:
        gradients = bactrian.grad(loss, argnums=(0, 1))(state["weights"], state["biases"], x, y)
        old = (state["weights"], state["biases"])
        weights, biases = jax.tree.map(lambda p, g: p - rate * g, old, gradients)
        return {"weights": weights, "biases": biases}, rate * 2

    data = [(b["x"], b["y"], np.float32(0.1)) for (b,) in batches(vector_data)]
    return Built(step, {"weights": weights, "biases": biases}, data, options(2, 4, batch_argnums=(1, 2)))


TRAPS = tuple(
    Case(name, make)
    for name, make in {
        "tied-two-stages": functools.partial(tied, 2),
        "tied-three-stages": functools.partial(tied, 3),
        "value-read-by-three-layers": read_by_three,
        "empty-update": empty_update,
        "parameter-without-gradient": no_gradient,
        "aux-outputs": aux_outputs,
        "result-is-input": result_is_input,
        "places-exchanged": places_exchanged,
        "odd-layers-2-stages": functools.partial(chain, "abcde", 2, 4),
        "odd-layers-4-stages": functools.partial(chain, "abcde", 4, 4),
        "fewer-microbatches-than-stages": functools.partial(chain, "abcd", 4, 2),
        "one-microbatch": functools.partial(chain, "abcd", 4, 1),
        "sum-1": functools.partial(chain, "abcd", 2, 1, "sum"),
        "sum-2": functools.partial(chain, "abcd", 2, 2, "sum"),
        "sum-4": functools.partial(chain, "abcd", 2, 4, "sum"),
        "layer-without-weights": functools.partial(weightless, 2),
        "stage-without-output": functools.partial(weightless, 3),
        "random-numbers": functools.partial(random_numbers, False),
        "random-numbers-typed-key": functools.partial(random_numbers, True),
        "skip-not-finite": functools.partial(not_finite, skip_if_not_finite),
        "apply-if-finite": functools.partial(not_finite, lambda tx: optax.apply_if_finite(tx, 5)),
        "several-arguments": several_arguments,
    }.items()
)
