"""Two optimizers, as pairs of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bactrian.driver.models.parameters import Tree


@dataclass(frozen=True)
class Optimizer:
    """How parameters follow gradients.

    Attributes:
        init: the optimizer's state from the parameters (or, under ``jax.eval_shape``, from their shapes).
        update: new parameters and state from gradients, state and parameters.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def adamw(rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, decay: float = 1e-4) -> Optimizer:
    """Adam with weight decay of everything but vectors (Loshchilov and Hutter, "Decoupled weight decay regularization",
    2019)."""

    def init(params: Tree) -> Tree:
        return {
            "mean": jax.tree.map(jnp.zeros_like, params),
            "square": jax.tree.map(jnp.zeros_like, params),
            "steps": jnp.zeros((), jnp.int32),
        }

    def update(gradients: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        steps = state["steps"] + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state["mean"], gradients)
        square = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * g * g, state["square"], gradients)
        of_mean, of_square = 1 / (1 - b1**steps), 1 / (1 - b2**steps)

        def moved(param: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
            change = m * of_mean / (jnp.sqrt(s * of_square) + 1e-8)
            return param - rate * (change + decay * param if param.ndim > 1 else change)

        return jax.tree.map(moved, params, mean, square), {"mean": mean, "square": square, "steps": steps}

    return Optimizer(init, update)


def momentum(rate: float = 0.1, decay: float = 0.9) -> Optimizer:
    """Gradient descent with Nesterov's momentum (Sutskever et al., "On the importance of initialization and momentum in
    deep learning", 2013)."""

    def init(params: Tree) -> Tree:
        return jax.tree.map(jnp.zeros_like, params)

    def update(gradients: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        speed = jax.tree.map(lambda v, g: decay * v + g, state, gradients)
        return jax.tree.map(lambda p, v, g: p - rate * (decay * v + g), params, speed, gradients), speed

    return Optimizer(init, update)
