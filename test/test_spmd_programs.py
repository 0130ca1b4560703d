"""Programs with places that are computed, loops and transforms, under random shardings: as on one device.

Each stands for a kind of program that went wrong while XLA's partitioner executed shardings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jax import lax

import bactrian
from bactrian.driver.xla.compile_stage import compile_functions, signature_shardings
from bactrian.passes.machine.spec import MeshAxes

MESHES: tuple[MeshAxes, ...] = ((("x", 4),), (("x", 2), ("y", 2)), (("x", 8),), (("x", 2), ("y", 4)))
Program = tuple[Callable[..., Any], list[np.ndarray[Any, Any]]]
N = 8


def _floats(*shape: int) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape))
    return np.sin(np.arange(count) * 1.7 + count).reshape(shape).astype(np.float32)


def _complex(*shape: int) -> np.ndarray[Any, Any]:
    return (_floats(*shape) + 1j * _floats(*shape, 1)[..., 0] ** 2).astype(np.complex64)


def history(at: int, rows: int) -> Program:
    """A log into which each step writes behind what is there, until it is full."""

    def step(log: jax.Array, x: jax.Array, at: jax.Array) -> Any:
        for _ in range(3):
            log = lax.dynamic_update_slice(log, jnp.tanh(x[:rows]) + jnp.sum(log), (at, 0))
            at += rows
        return log, at

    return step, [_floats(16, N), _floats(N, N), np.array(at, np.int32)]


def position(size: int) -> Program:
    """Rows of a table from a place on that may lie past its end, and the table's gradient."""

    def loss(table: jax.Array, x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.sum((jnp.tanh(x[:size]) * lax.dynamic_slice(table, (at, 0), (size, N))) ** 2)

    return jax.value_and_grad(loss), [_floats(16, N), _floats(N, N), np.array(14, np.int32)]


def full_cache(more: int) -> Program:
    """A cache that is written row by row, for more turns than it has rows."""

    def step(x: jax.Array, w: jax.Array) -> Any:
        def turn(carry: Any, i: jax.Array) -> tuple[Any, None]:
            cache, y = carry
            y = jnp.tanh(y @ w)
            return (lax.dynamic_update_slice(cache, y[:1], (i, jnp.int32(0))), y), None

        return lax.scan(turn, (jnp.zeros((N, N)), x), jnp.arange(N + more))[0]

    return step, [_floats(N, N), _floats(N, N) / 2]


_TURNS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "swaps": lambda p, i, j: (lambda a, b: p.at[i].set(b).at[j].set(a))(p[i], p[j]),
    "two sets": lambda p, i, j: p.at[i].set(1.0 * i).at[j].set(-1.0 * i),
    "set of what is read": lambda p, i, j: p.at[i].set(p[j] + 1),
    "add, then maximum": lambda p, i, j: p.at[j].add(1.0).at[i].max(p[j] / 2),
    "past the end": lambda p, i, j: p.at[i + j].set(2.0 * i).at[j - i].add(p[i + 3]),
}


def elements(turn: str, unrolled: bool) -> Program:
    """Single elements that are read and set one after another."""

    def step(vector: jax.Array, places: jax.Array) -> jax.Array:
        vector = jnp.tanh(vector)
        if unrolled:
            for i in range(3):
                vector = _TURNS[turn](vector, i, places[i])
            return vector
        return lax.fori_loop(0, N, lambda i, p: _TURNS[turn](p, i, places[i]), vector)

    return step, [_floats(N), np.array([5, 2, 7, 3, 0, 2, 6, 1], np.int32)]


def solved(kind: str) -> Program:
    """Permutations from pivots, triangular solves, and their gradients."""
    kinds: dict[str, Callable[[jax.Array], jax.Array]] = {
        "inverse": jnp.linalg.inv,
        "determinant": lambda m: jnp.linalg.slogdet(m)[1],
        "solution": lambda m: jnp.linalg.solve(m, m[:, :4] + 1),
        "root": lambda m: jnp.linalg.cholesky(m @ m.mT),
    }

    def loss(m: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(kinds[kind](m + 3 * jnp.eye(4))))

    return jax.value_and_grad(loss), [_floats(N, 4, 4)]


def recurrent(kind: str, layers: int, turns: int) -> Program:
    """Recurrent layers one upon another, each a scan over time, with the gradient of their weights."""
    gates = {"rnn": 1, "gru": 2, "lstm": 3}[kind]

    def cell(p: Any, carry: Any, row: jax.Array) -> tuple[Any, jax.Array]:
        h, c = carry
        parts = jnp.split(row @ p["x"] + h @ p["h"], gates, -1)
        if kind == "rnn":
            h = jnp.tanh(parts[0])
        elif kind == "gru":
            z = jax.nn.sigmoid(parts[0])
            h = z * h + (1 - z) * jnp.tanh(parts[1])
        else:
            c = c * jax.nn.sigmoid(parts[0]) + jnp.tanh(parts[1])
            h = jax.nn.sigmoid(parts[2]) * jnp.tanh(c)
        return (h, c), h

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        y = jnp.swapaxes(x, 0, 1)
        for p in weights:
            zero = jnp.zeros((x.shape[0], N))
            y = lax.scan(lambda carry, row, p=p: cell(p, carry, row), (zero, zero), y)[1]
        return jnp.mean(jnp.swapaxes(y, 0, 1) ** 2)

    def step(x: jax.Array, *leaves: jax.Array) -> Any:
        weights = [{"x": leaves[2 * at], "h": leaves[2 * at + 1]} for at in range(layers)]
        return jax.value_and_grad(loss)(weights, x)

    return step, [_floats(N, turns, N), *([_floats(N, N * gates) / 2, _floats(N, N * gates) / 3] * layers)]


def rolled(shifts: tuple[int, ...]) -> Program:
    """A stencil on a ring and its transpose."""

    def stencil(u: jax.Array) -> jax.Array:
        return sum((jnp.roll(u, s, 0) for s in shifts), -2 * u)

    def step(u: jax.Array) -> Any:
        made = stencil(u)
        return made + jax.linear_transpose(stencil, u)(made)[0] ** 2

    return step, [_floats(N, 4)]


def fourier() -> Program:
    """Complex weights for each frequency, and the gradient."""

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        z = jnp.einsum("bmc,mcd->bmd", jnp.fft.rfft(x, axis=1)[:, :4], weights)
        return jnp.mean(jnp.tanh(jnp.fft.irfft(z, n=16, axis=1)) ** 2)

    return jax.value_and_grad(loss), [_complex(4, 4, 4), _floats(N, 16, 4)]


def turned() -> Program:
    """A branch that values choose, and a loop that ends when an array says so."""

    def step(x: jax.Array, y: jax.Array) -> Any:
        made = lax.cond(jnp.sum(x) > 0, lambda a: jnp.sort(a, 0) + y, lambda a: a @ y, x)
        picked = lax.switch(jnp.int32(jnp.abs(made[0, 0]) * 7) % 3, [jnp.sin, lambda a: a * 2, lambda a: a - y], made)
        return lax.while_loop(lambda z: jnp.any(jnp.abs(z) > 0.5), lambda z: z * 0.6 - y * 0.01, picked)

    return step, [_floats(N, N), _floats(N, N)]


def drawn() -> Program:
    """Random bits, cut like what they are added to."""

    def step(x: jax.Array, seed: jax.Array) -> Any:
        signs = jax.random.bernoulli(jax.random.key(seed[0]), 0.5, x.shape)
        return jnp.where(signs, x, -x), lax.rng_bit_generator(seed, x.shape)

    return step, [_floats(N, N), np.array([1, 2, 3, 4], np.uint32)]


PROGRAMS: dict[str, Program] = {
    "history inside": history(3, 1),
    "history past the end": history(15, 1),
    "history far": history(100, 2),
    "history before the beginning": history(-3, 4),
    "position": position(1),
    "positions": position(6),
    "full cache": full_cache(3),
    **{f"{turn}, {'unrolled' if u else 'loop'}": elements(turn, u) for turn in _TURNS for u in (False, True)},
    **{kind: solved(kind) for kind in ("inverse", "determinant", "solution", "root")},
    "two rnn": recurrent("rnn", 2, 4),
    "two gru": recurrent("gru", 2, 4),
    "two lstm": recurrent("lstm", 2, 4),
    "long lstm": recurrent("lstm", 1, 64),
    "rolls": rolled((1, -1)),
    "far rolls": rolled((3, -5, 2)),
    "fourier": fourier(),
    "turns": turned(),
    "random bits": drawn(),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_shardings_change_nothing(name: str) -> None:
    check(name, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", PROGRAMS)
def test_many_shardings_change_nothing(name: str) -> None:
    for seed in range(1, 17):
        check(name, seed)


def test_complex_weights_train_on_a_mesh(slow: Path) -> None:
    """From the trace to numbers, with the prediction of memory."""
    loss = fourier()[0]

    def step(weights: jax.Array, x: jax.Array) -> Any:
        value, gradient = bactrian.value_and_grad(lambda w: loss(w, x)[0])(weights)
        return weights - 0.1 * jnp.conj(gradient), value

    arguments = fourier()[1]
    planned = bactrian.parallelize(step, num_stages=1, num_microbatches=1, mesh="a=4", cluster=slow)
    got = bactrian.gather(planned(*arguments))
    for one, other in zip(got, planned.reference(*arguments), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_all_devices_have_the_numbers_that_one_has_drawn() -> None:
    def step(x: jax.Array) -> jax.Array:
        return x + lax.rng_uniform(jnp.float32(1), jnp.float32(2), (N, N))

    axes = (("x", 2), ("y", 4))
    module = sharded.lowered(step, [_floats(N, N)], axes)
    reading, model = sharded.read(module, axes)
    sharded.write(module, reading, model, [0] * len(model.network.costs))  # all of it on every device
    text = str(sharded.partitioned(module, axes))
    (where,), _ = signature_shardings(text, jax.devices())
    function = compile_functions({"main": text}, {"main": jax.devices()})["main"]
    (made,) = function([jax.device_put(_floats(N, N), where)])
    first, *others = (np.asarray(shard.data) for shard in made.addressable_shards)
    assert len(others) == 7 and len(np.unique(first)) > N
    for other in others:
        np.testing.assert_array_equal(first, other)


def check(name: str, seed: int) -> None:
    """One program under one choice of shardings."""
    (function, arguments), axes = PROGRAMS[name], MESHES[seed % len(MESHES)]
    module = sharded.lowered(function, arguments, axes)
    reading, model = sharded.read(module, axes)
    random = np.random.default_rng(seed)
    choice = [int(random.integers(len(costs))) for costs in model.network.costs]
    sharded.write(module, reading, model, choice)
    got = sharded.run(module, axes, arguments)
    expected = [np.asarray(each) for each in jax.tree.leaves(jax.jit(function)(*arguments))]
    for one, other in zip(got, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(other).max())))
