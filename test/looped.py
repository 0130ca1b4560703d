"""Loops for random programs: over stacked values, nested, with values from outside, of unknown length, differentiated."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _scanned(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """Over rows, from either end, with what each turn gives stacked."""

    def turn(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(carry + row)
        return carry, carry * row

    start = x[0] if y.shape != x.shape[1:] else y
    last, stacked = lax.scan(turn, start, x, reverse=bool(random.integers(2)))
    return stacked + last


def _layers(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """Products with stacked square matrices, and one that is always the same."""
    size = x.shape[-1]
    weights = jnp.stack([jnp.outer(x.reshape(-1)[:size], x.reshape(-1)[-size:])] * 3) / size
    fixed = jnp.cos(weights[0])

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ w + h @ fixed / size), None

    return lax.scan(layer, x, weights)[0]


def _graded(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of layers: a loop back over what the loop forth has kept."""
    return jax.grad(lambda z: jnp.sum(_layers(random, z, y) ** 2))(x) / 4


def _nested(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    def inner(j: int, z: jax.Array) -> jax.Array:
        return jnp.sin(z) + x * j

    axis = int(random.integers(x.ndim))
    return lax.fori_loop(0, 2, lambda i, z: lax.fori_loop(0, 3, inner, z) + jnp.sum(z, axis, keepdims=True) / 16, x)


def _until(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """For as long as the values say."""
    limit = jnp.mean(jnp.abs(x))
    return lax.while_loop(lambda z: jnp.max(jnp.abs(z)) > limit, lambda z: z * 0.7 - x * 0.01, x)


def _exchanged(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    one, other = lax.fori_loop(0, 3, lambda i, pair: (pair[1], pair[0] * 0.5 + pair[1]), (x, jnp.cos(x)))
    return one + other


def _written(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows, at places that the turn gives, and blocks of two rows."""

    def turn(i: jax.Array, z: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(z, i, 2)
        return lax.dynamic_update_slice_in_dim(z, jnp.sin(rows) + 1, 2 * i, 0)

    return lax.fori_loop(0, x.shape[0] // 2, turn, x)


def _chosen(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    def turn(i: jax.Array, z: jax.Array) -> jax.Array:
        return lax.cond(i % 2 == 0, lambda a: a + x, lambda a: jnp.sort(a, 0), z)

    return lax.fori_loop(0, 3, turn, x)


def _summed(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """What a loop only adds up, and what it never changes."""
    total, same, _ = lax.fori_loop(
        0, 4, lambda i, s: (s[0] + jnp.einsum("...i,...j->ij", s[2], s[1]), s[1], s[2] * 0.5), (0.0 * x[..., :1, :].sum(tuple(range(x.ndim - 1)))[:, None] * jnp.ones((1, x.shape[-1])), x, x)
    )  # fmt: skip
    return total / 32 + same.sum()


LOOPS: tuple[Callable[..., jax.Array], ...] = (
    _scanned, _layers, _graded, _nested, _until, _exchanged, _written, _chosen, _summed,
)  # fmt: skip
