"""One MLP, ``y = x + relu(x W + b)``, in four frameworks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from cases import (
    LAYERS,
    WIDTH,
    Model,
    squared_error,
    vector_data,
)
from flax import linen, nnx


def mlp_plain(layers: int = LAYERS) -> Model:
    """A list of dicts and a loop."""
    keys = jax.random.split(jax.random.PRNGKey(0), layers)
    params = [{"w": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, "b": jnp.zeros(WIDTH)} for key in keys]

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        x = batch["x"]
        for layer in params:
            x = x + jax.nn.relu(x @ layer["w"] + layer["b"])
        return squared_error(x, batch["y"]), extra

    return Model(params, {}, loss, vector_data)


def mlp_linen() -> Model:
    """A compact linen module."""

    class Mlp(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(LAYERS):
                x = x + linen.relu(linen.Dense(WIDTH)(x))
            return x

    model = Mlp()

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return squared_error(model.apply({"params": params}, batch["x"]), batch["y"]), extra

    params = model.init(jax.random.PRNGKey(0), jnp.zeros((1, WIDTH)))["params"]
    return Model(params, {}, loss, vector_data)


def mlp_nnx() -> Model:
    """An nnx module, split into a graph and a state."""

    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers:
                x = x + nnx.relu(layer(x))
            return x

    graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)

    def loss(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
        return squared_error(nnx.merge(graph, params)(batch["x"]), batch["y"]), extra

    return Model(params, {}, loss, vector_data)


class EquinoxMlp(eqx.Module):
    """Linear layers, and an activation as a static leaf of the tree."""

    layers: list[eqx.nn.Linear]
    activation: Callable[[jax.Array], jax.Array]

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.PRNGKey(0), LAYERS)
        self.layers = [eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in keys]
        self.activation = jax.nn.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + self.activation(layer(x))
        return x


def mlp_equinox() -> Model:
    """A whole equinox module, its activation included, as the state."""

    def loss(model: EquinoxMlp, extra: Any, batch: Any, key: jax.Array) -> Any:
        return squared_error(jax.vmap(model)(batch["x"]), batch["y"]), extra

    return Model(EquinoxMlp(), {}, loss, vector_data)
