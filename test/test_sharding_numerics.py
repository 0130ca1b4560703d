"""Random programs with random shardings on 8 virtual devices give what one device gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import missed_ops
import numpy as np
import pytest
import sharded
from jax import lax
from looped import LOOPS

from bactrian.passes.machine.spec import MeshAxes

MESHES = ((("x", 8),), (("x", 2), ("y", 4)), (("x", 2), ("y", 2), ("z", 2)))


def _dot(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    if x.ndim == 3 and y.ndim == 3:
        return jnp.einsum("bik,bjk->bij", x, y)
    return jnp.tensordot(x, y, axes=([x.ndim - 1], [y.ndim - 1]))


def _fold(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    fold = (jnp.sum, jnp.max, jnp.min, jnp.prod)[random.integers(4)]
    return fold(x / 4, axis=int(random.integers(x.ndim)))


def _flags(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    fold = (jnp.any, jnp.all)[random.integers(2)]
    return fold(x > 0.5, axis=int(random.integers(x.ndim))).astype(jnp.float32)


def _best(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    fold = (jnp.argmax, jnp.argmin)[random.integers(2)]
    return fold(x, axis=int(random.integers(x.ndim))).astype(jnp.float32) / 16


def _elementwise(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    other = y if y.shape == x.shape else jnp.sin(x)
    return (x + other, x * other, jnp.where(x > 0, x, other))[random.integers(3)]


def _transposed(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.transpose(x, [int(dim) for dim in random.permutation(x.ndim)])


def _reshaped(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    if x.ndim == 3:
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    return x.reshape(-1, 8, x.shape[-1]) if x.ndim == 2 and x.shape[0] % 8 == 0 else x


def _broadcast(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x[None], (8, *x.shape)) if x.ndim < 3 else x + x[0]


def _sliced(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.concatenate([x[x.shape[0] // 2 :], x[: x.shape[0] // 2]])


def _looked_up(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    rows = (jnp.abs(y).reshape(-1)[:16] * 7).astype(jnp.int32) % x.shape[0]
    return jnp.take(x, rows, axis=0)


def _added_at(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    rows = (jnp.abs(x).reshape(-1)[:8] * 7).astype(jnp.int32) % x.shape[0]
    return x.at[rows].add(x[:8])


def _sorted(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sort(x, axis=int(random.integers(x.ndim)))


def _cumulated(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.cumsum(x, axis=0) / 8


def _looped(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, z: jnp.sin(z) + x, x)


def _image(x: jax.Array) -> jax.Array:
    """A batch of rows with features."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _convolution(random: np.random.Generator, x: jax.Array) -> tuple[Callable[..., jax.Array], jax.Array]:
    size, stride, step = (int(random.choice(each)) for each in ((1, 2, 3, 5), (1, 1, 2), (1, 1, 2)))
    padding = ("SAME", ((size * step - step, 0),))[random.integers(2)]
    kernel = jnp.cos(jnp.arange(size * x.shape[-1] * 8.0)).reshape(size, x.shape[-1], 8) / 8

    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, kernel, (stride,), padding, rhs_dilation=(step,), dimension_numbers=numbers)

    return function, kernel


def _convolved(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    function, kernel = _convolution(random, _image(x))
    return function(_image(x), kernel)


def _convolved_back(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """The gradient of the image or of the kernel."""
    function, kernel = _convolution(random, _image(x))
    made, back = jax.vjp(function, _image(x), kernel)
    return back(jnp.sin(made))[random.integers(2)] / 8


def _pooled(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    x, (size, stride) = _image(x), ((2, 2), (3, 1), (3, 2))[random.integers(3)]
    window, strides = (1, size, 1), (1, stride, 1)
    if random.integers(2):
        return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / size
    made, back = jax.vjp(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "SAME"), x)
    return made if random.integers(2) else back(jnp.cos(made))[0]


def _moved(random: np.random.Generator, x: jax.Array, y: jax.Array) -> jax.Array:
    """A few rows more, or fewer; or zeros in between."""
    x, zero = _image(x), jnp.float32(0)
    if random.integers(2):
        return lax.pad(x, zero, ((0, 0, 0), ((2, 6, 0), (3, -3, 0), (0, 1, 1))[random.integers(3)], (0, 0, 0)))
    return x[:, 2:-6] if x.shape[1] > 8 else x[:, ::2]


OPS: tuple[Callable[..., jax.Array], ...] = (
    _dot, _dot, _fold, _flags, _best, _elementwise, _elementwise, _transposed, _reshaped, _broadcast, _sliced, _looked_up,
    _added_at, _sorted, _cumulated, _looped,
)  # fmt: skip
WITH_WINDOWS = (_convolved, _convolved, _convolved_back, _convolved_back, _pooled, _moved, _fold, _elementwise)
WITH_LOOPS = LOOPS * 3 + (_dot, _fold, _elementwise, _transposed, _reshaped, _broadcast)


def program(
    seed: int, ops: tuple[Callable[..., jax.Array], ...] = OPS, most: int = 8
) -> tuple[Callable[..., Any], list[np.ndarray[Any, Any]]]:
    """A function of two to three arrays with at least two, at most ``most`` of these ops, and its arguments."""
    random = np.random.default_rng(seed)
    shapes = [tuple(int(n) for n in random.choice([8, 16], size=random.integers(2, 4))) for _ in range(3)]
    arguments = [random.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]
    picks = [
        (ops[random.integers(len(ops))], int(random.integers(1 << 30))) for _ in range(random.integers(2, most + 1))
    ]

    def function(*leaves: jax.Array) -> Any:
        values = list(leaves)
        for op, own in picks:
            inner = np.random.default_rng(own)
            x, y = (values[inner.integers(len(values))] for _ in range(2))
            if x.ndim == 0 or x.size > 4096:
                continue
            if op is _dot and (y.ndim == 0 or x.shape[-1] != y.shape[-1] or (x.ndim == 3) != (y.ndim == 3)):
                continue
            if op is _dot and x.ndim == 3 and x.shape[0] != y.shape[0]:
                continue
            if op is _added_at and x.shape[0] < 8:
                continue
            values.append(op(inner, x, y))
        return values[len(leaves) :] or [values[0] + 1]

    return function, arguments


KINDS: dict[str, tuple[tuple[Callable[..., jax.Array], ...], int]] = {
    "plain": (OPS, 8),
    "loops": (WITH_LOOPS, 2),
    "windows": (WITH_WINDOWS, 4),
    "missed": ((*missed_ops.OPS, _dot, _fold, _elementwise, _transposed), 4),
}
"""The ops of random programs, and how many of them there are at most."""

SHORT = {
    "plain": range(24),
    "loops": (0, 2, 3, 5, 14),
    "windows": range(8),
    "missed": range(12),
}  # of loops every one but the long ones


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, seeds in SHORT.items() for seed in seeds])
def test_random_shardings_change_nothing(kind: str, seed: int) -> None:
    check_numbers(seed, *KINDS[kind])


def test_collectives_that_do_not_depend_on_each_other_meet_their_own() -> None:
    """All-to-alls in a loop, without an order between them: compiled for replicas they ended the process."""
    check_numbers(711, *KINDS["loops"])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "block"), [(kind, block) for kind in KINDS for block in range(40)])
def test_random_shardings_of_many_programs_change_nothing(kind: str, block: int) -> None:
    each = 50 if kind == "plain" else 25
    for seed in range(each * block, each * (block + 1)):
        check_numbers(seed, *KINDS[kind])


def check_numbers(seed: int, ops: tuple[Callable[..., jax.Array], ...], most: int) -> None:
    """One program, one choice of shardings."""
    check_program(*program(seed, ops, most), MESHES[seed % len(MESHES)], seed)


def check_program(function: Callable[..., Any], arguments: Sequence[Any], axes: MeshAxes, seed: int) -> None:
    """A random choice of shardings gives what one device gives.

    Some programs lose digits, and lose others when they add up in another order. There the same choice with twice as many
    digits is what counts, and what is off with the usual digits is bounded by what one device is off, tenfold at most for
    a long sum.
    """
    got, expected = _sharded(function, arguments, axes, seed), _alone(function, arguments)
    assert [each.shape for each in got] == [each.shape for each in expected]
    if all(_close(one, other, 1e-5) for one, other in zip(got, expected, strict=True)):
        return
    with jax.enable_x64(True):
        wide = [each.astype(np.float64) if each.dtype == np.float32 else each for each in arguments]
        exact = _alone(function, wide)
        for one, other in zip(_sharded(function, wide, axes, seed), exact, strict=True):
            assert _close(one, other, 1e-10), "more than rounding"
    for one, alone, other in zip(got, expected, exact, strict=True):
        most = 1e-5 * max(1.0, float(np.abs(other).max(initial=0))) + 10 * _farthest(alone, other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=most)


def _sharded(function: Callable[..., Any], arguments: Sequence[Any], axes: MeshAxes, seed: int) -> list[Any]:
    """What the devices give with shardings that are chosen at random; where windows can be cut, they are."""
    module = sharded.lowered(function, arguments, axes)
    reading, model = sharded.read(module, axes)
    random = np.random.default_rng(seed)
    choice = [int(random.integers(len(costs))) for costs in model.network.costs]
    node = len(model.problem.inputs)
    for choices in model.strategies:
        cut = [number for number, strategy in enumerate(choices or ()) if strategy.exchanges]
        if cut:
            choice[node] = cut[choice[node] % len(cut)]
        node += choices is not None
    sharded.write(module, reading, model, choice)
    return sharded.run(module, axes, arguments)


def _close(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], rate: float) -> bool:
    return bool(np.allclose(one, other, rtol=rate, atol=rate * max(1.0, float(np.abs(other).max(initial=0)))))


def _alone(function: Callable[..., Any], arguments: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """What one device gives; op by op where XLA for CPUs gives a Fourier transform a layout that it can't run."""
    try:
        return [np.asarray(each) for each in jax.tree.leaves(jax.jit(function)(*arguments))]
    except jax.errors.JaxRuntimeError as error:
        if "fft_thunk" not in str(error):
            raise
    with jax.disable_jit():
        return [np.asarray(each) for each in jax.tree.leaves(function(*arguments))]


def _farthest(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0))
