"""Ops of random programs that were missed at first: positions out of range, dims that nothing divides, linear algebra,
double gradients of convolutions, complex numbers and integers, and loops around all of it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Op = Callable[[np.random.Generator, jax.Array, jax.Array], jax.Array]


def _position(random: np.random.Generator, x: jax.Array, most: int) -> jax.Array:
    """A position that only the run knows, often out of range."""
    return (jnp.sign(x.reshape(-1)[0]) * int(random.integers(-2, most + 8))).astype(jnp.int32)


def _read_past(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    axis = int(random.integers(x.ndim))
    size = int(random.integers(1, x.shape[axis] + 1))
    made = lax.dynamic_slice_in_dim(x, _position(random, y, x.shape[axis]), size, axis)
    return lax.optimization_barrier(
        made
    )  # XLA merges a slice of a slice, also on one device, and does not clamp the first


def _written_past(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    axis = int(random.integers(x.ndim))
    size = int(random.integers(1, x.shape[axis] + 1))
    rows = jnp.cos(lax.slice_in_dim(x, 0, size, axis=axis))
    return lax.dynamic_update_slice_in_dim(x, rows, _position(random, y, x.shape[axis]), axis)


def _swapped(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """Two element sets one after another."""
    one, two = (_position(random, each, x.shape[0]) for each in (x, y))
    return x.at[one].set(x[two]).at[two].set(jnp.sin(x[one]))


def _looked_up_past(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    rows = (y.reshape(-1)[:6] * 40).astype(jnp.int32)
    return x.at[rows].add(0.5, mode=("drop", "clip")[random.integers(2)])[rows]


def _longer(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """Another number of rows, which often nothing divides."""
    rows = int(random.integers(1, 6))
    return jnp.concatenate([x, x[:rows]]) if random.integers(2) else x[: max(1, x.shape[0] - rows)]


def _solved(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    x = x if x.ndim > 1 else x[None]
    matrix = x @ jnp.swapaxes(x, -1, -2) / x.shape[-1] + 2 * jnp.eye(x.shape[-2])
    if random.integers(2):
        return lax.linalg.triangular_solve(lax.linalg.cholesky(matrix), x, left_side=True, lower=True)
    return jnp.linalg.solve(matrix, x)


def _transformed(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    made = jnp.fft.fft(x, axis=int(random.integers(x.ndim))) / x.shape[-1]
    return (made.real, made.imag, jnp.abs(made))[random.integers(3)]


def _complex(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    z = lax.complex(x, jnp.flip(x, 0))
    return (z * z.conj()).real + jnp.sum(z, axis=0).imag


def _integers(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    kind = (jnp.int32, jnp.int16, jnp.uint8)[random.integers(3)]
    whole = (jnp.abs(x) * 10).astype(jnp.int32).astype(kind)
    made = (whole + jnp.max(whole, axis=0), whole * 3 % 7, jnp.cumsum(whole, axis=0).astype(kind))[random.integers(3)]
    return made.astype(jnp.float32) / 16


def _image(x: jax.Array) -> jax.Array:
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def _kernel(x: jax.Array) -> jax.Array:
    return jnp.cos(jnp.arange(3.0 * x.shape[-1] * 4)).reshape(3, x.shape[-1], 4) / 8


def _twice_differentiated(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    image, kernel = _image(x), _kernel(x)

    def inner(image: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda k: jnp.sum(jnp.sin(_convolve(image, k))))(kernel)
        return jnp.sum(gradient**2) / gradient.size

    return jax.grad(inner)(image)


def _per_example(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """The kernel's gradient of every row of the batch: a convolution with as many groups."""
    image = _image(x)
    gradient = jax.grad(lambda k, row: jnp.sum(jnp.sin(_convolve(row[None], k))))
    return jax.vmap(gradient, in_axes=(None, 0))(_kernel(x), image).sum((1, 3)) / 8


PLAIN: tuple[Op, ...] = (
    _read_past, _written_past, _swapped, _looked_up_past, _longer, _solved, _transformed, _complex, _integers,
    _twice_differentiated, _per_example,
)  # fmt: skip
_SAME_SHAPE: tuple[Op, ...] = (_written_past, _swapped, _solved, _transformed, _complex, _integers)


def _looped(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """A loop around one of them, with the number of the turn in it."""
    op, seed = _SAME_SHAPE[random.integers(len(_SAME_SHAPE))], int(random.integers(1 << 30))
    return lax.fori_loop(0, 3, lambda i, z: op(np.random.default_rng(seed), z / 2 + i, y), x)


OPS: tuple[Op, ...] = (*PLAIN, _looped, _looped)
