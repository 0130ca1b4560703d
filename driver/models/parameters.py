"""Parameters of models as descriptions: shapes that need no device, and values drawn from a key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
"""Any pytree."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, float32.

    Attributes:
        shape: of the array.
        deviation: of the normal distribution that it is drawn from; with 0 it is ``mean``.
        mean: of it.
    """

    shape: tuple[int, ...]
    deviation: float = 0.0
    mean: float = 0.0

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, jnp.float32)


def matrix(*shape: int, inputs: int) -> Parameter:
    """A weight that keeps the variance of what it multiplies: each element of the product sums over ``inputs``."""
    return Parameter(shape, 1 / math.sqrt(inputs))


def abstract(tree: Tree) -> Tree:
    """Shapes and dtypes of a tree of parameters."""
    return jax.tree.map(lambda leaf: leaf.abstract, tree)


def draw(tree: Tree, key: jax.Array) -> Tree:
    """Values of a tree of parameters."""
    leaves, structure = jax.tree.flatten(tree)
    drawn = [
        leaf.mean + leaf.deviation * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
        if leaf.deviation
        else jnp.full(leaf.shape, leaf.mean, jnp.float32)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def count(tree: Tree) -> int:
    """Elements of all parameters of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
