"""Ops with windows and offsets: whatever strategy is offered for one, its shards are those of what one device gives.

Numbers are small integers, so that sums are exact in any order, and everything must be equal bit by bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jax import lax

from bactrian.passes.machine.spec import MeshAxes

MESHES: tuple[MeshAxes, ...] = (
    (("x", 2),), (("x", 3),), (("x", 4),), (("x", 2), ("y", 2)), (("x", 2), ("y", 3)), (("x", 3), ("y", 2)),
    (("x", 8),), (("x", 2), ("y", 4)), (("x", 2), ("y", 2), ("z", 2)),
)  # fmt: skip
SIZES = (1, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True)
class Case:
    """A function of one op, and its arguments.

    Attributes:
        function, arguments: these.
        flipped: what it is where windows are reversed.
        reverses: for each spatial dim of a convolution whether its windows are to be reversed.
    """

    function: Callable[..., Any]
    arguments: tuple[np.ndarray[Any, Any], ...]
    flipped: Callable[..., Any] | None = None
    reverses: tuple[bool, ...] = ()

    @property
    def reference(self) -> Callable[..., Any]:
        return self.flipped or self.function


def numbers(random: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return random.integers(-3, 4, shape).astype(dtype)


def picked(random: np.random.Generator, *choices: Any) -> Any:
    return choices[random.integers(len(choices))]


def _shape(random: np.random.Generator, most: int = 3) -> list[int]:
    return [int(random.choice(SIZES)) for _ in range(random.integers(1, most + 1))]


def _slice(random: np.random.Generator) -> Case:
    made = _shape(random)
    strides = [int(random.choice((1, 1, 2, 3))) for _ in made]
    starts = [int(random.integers(4)) for _ in made]
    limits = [start + (size - 1) * stride + 1 for start, size, stride in zip(starts, made, strides, strict=True)]
    shape = [-(-(limit + int(random.integers(5))) // 6) * 6 for limit in limits]
    x = numbers(random, *shape, dtype=picked(random, np.float32, np.int8, np.complex64, np.bool_))
    return Case(lambda x: lax.slice(x, starts, limits, strides), (x,))


def _pad(random: np.random.Generator) -> Case:
    shape = _shape(random)
    gaps = [int(random.choice((0, 0, 1, 2))) for _ in shape]
    lows = [int(random.integers(-min(3, size - 1), 5)) for size in shape]
    highs = list[int]()
    for size, low, gap in zip(shape, lows, gaps, strict=True):
        rows = low + (size - 1) * (gap + 1) + 1
        highs.append(-(-max(rows, 1) // 12) * 12 - rows if random.integers(3) else max(0, -rows))
    x = numbers(random, *shape, dtype=picked(random, np.float32, np.int32, np.complex64, np.bool_))
    config = list(zip(lows, highs, gaps, strict=True))
    return Case(lambda x, fill: lax.pad(x, fill, config), (x, np.asarray(7, x.dtype)))


def _concatenate(random: np.random.Generator) -> Case:
    shape = _shape(random)
    dim = int(random.integers(len(shape)))
    pieces = [numbers(random, *shape[:dim], int(random.choice(SIZES)), *shape[dim + 1 :]) for _ in range(3)]
    return Case(lambda *pieces: lax.concatenate(pieces, dim), tuple(pieces))


def _reverse(random: np.random.Generator) -> Case:
    shape = _shape(random)
    dims = [dim for dim in range(len(shape)) if random.integers(2)]
    return Case(lambda x: lax.rev(x, dims), (numbers(random, *shape),))


def _windows(random: np.random.Generator, shape: list[int]) -> tuple[Any, ...]:
    """Sizes, strides, padding, and dilations of the dims and of the windows."""
    sizes, strides, padding, base, window = (list[Any]() for _ in range(5))
    for rows in shape:
        size, stride, gap, step = (
            int(random.choice(each)) for each in ((1, 2, 3), (1, 1, 2, 3), (1, 1, 1, 2), (1, 1, 2))
        )
        reach, low = (size - 1) * step + 1, int(random.integers(0, 4))
        positions = (rows - 1) * gap + 1
        made = max(1, -(-(positions + low - reach + 1) // stride))
        made = -(-made // 4) * 4 if random.integers(4) else made
        high = (made - 1) * stride + reach - positions - low
        if high < 0:
            low, high = low - high, 0
        for numbers_, number in zip(
            (sizes, strides, padding, base, window), (size, stride, (low, high), gap, step), strict=True
        ):
            numbers_.append(number)
    return sizes, strides, padding, base, window


def _reduce_window(random: np.random.Generator) -> Case:
    shape = _shape(random, 2)
    windows = _windows(random, shape)
    fold = picked(random, lax.add, lax.max, lax.min, lax.mul, lambda a, b: a + 2 * b - b)
    x = numbers(random, *shape, dtype=picked(random, np.float32, np.int32))
    return Case(lambda x, start: lax.reduce_window(x, start, fold, *windows), (x, np.asarray(2, x.dtype)))


def _reduce_pairs(random: np.random.Generator) -> Case:
    """The largest number of a window, and where it is."""
    shape = [24, int(random.choice(SIZES))]
    sizes, strides, *_ = _windows(random, shape)
    padding = picked(random, "VALID", "SAME")
    x = numbers(random, *shape)

    def larger(a: Any, b: Any) -> Any:
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    def function(x: jax.Array) -> Any:
        places = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)
        return lax.reduce_window((x, places), (jnp.float32(-9), jnp.int32(99)), larger, sizes, strides, padding)

    return Case(function, (x,))


def _pool_gradient(random: np.random.Generator) -> Case:
    """Many equal numbers, and some that are the least there is."""
    shape = [int(random.choice((1, 4, 6, 8, 12, 24))) for _ in range(2)]
    kinds = (
        (2, 2, (0, 0)),
        (1, 2, (0, 0)),
        (3, 1, (1, 1)),
        (3, 2, (0, 1)),
        (3, 2, (1, 0)),
        (5, 2, (2, 1)),
        (2, 1, (1, 0)),
    )
    sizes, strides, padding = zip(*(picked(random, *kinds) for _ in shape), strict=True)

    def pool(x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (*sizes, 1), (*strides, 1), (*padding, (0, 0)))

    x = numbers(random, *shape, 2)
    x[random.random(x.shape) < 0.3] = -np.inf
    ct = numbers(random, *jax.eval_shape(pool, x).shape)
    return Case(lambda x, ct: jax.vjp(pool, x)[1](ct)[0], (x, ct))


def _convolution(random: np.random.Generator) -> Case:
    """With groups of one kind, dims in any order, windows of any kind."""
    count = int(random.integers(1, 3))
    groups, batches = picked(random, (1, 1), (1, 1), (2, 1), (4, 1), (6, 1), (1, 2), (1, 4), (1, 6))
    batch, inputs, outputs = (int(random.choice((1, 2, 4, 6))) for _ in range(3))
    space = [int(random.choice((4, 6, 8, 12, 16))) for _ in range(count)]
    sizes, strides, padding, base, window = _windows(random, space)
    if random.integers(2) and count == 1:  # as in a kernel's gradient: a large kernel
        sizes, strides = [int(random.choice((4, 6, 8, 12)))], [1]
        made, base = picked(random, 1, 2, 3), [1]
        low = int(random.integers(0, 3))
        padding = [(low, made + (sizes[0] - 1) * window[0] - space[0] - low)]
    turned = tuple(bool(random.integers(4) == 0) for _ in space)
    order = [tuple(int(dim) for dim in random.permutation(count + 2)) for _ in range(3)]
    shapes = [batch * batches, inputs * groups, *space], [outputs * groups * batches, inputs, *sizes]
    x, kernel = (numbers(random, *np.take(shape, np.argsort(dims))) for shape, dims in zip(shapes, order, strict=False))

    def function(x: jax.Array, kernel: jax.Array) -> jax.Array:
        dims = lax.ConvDimensionNumbers(*order)
        return lax.conv_general_dilated(
            x, kernel, strides, padding, base, window, dims, feature_group_count=groups, batch_group_count=batches
        )

    def flipped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return function(x, lax.rev(kernel, [order[1][2 + at] for at, each in enumerate(turned) if each]))

    return Case(function, (x, kernel), flipped, turned)


OPS: dict[str, Callable[[np.random.Generator], Case]] = {
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "reverse": _reverse,
    "reduce_window": _reduce_window,
    "reduce_window of pairs": _reduce_pairs,
    "select_and_scatter": _pool_gradient,
    "convolution": _convolution,
}


def lowered(case: Case, axes: MeshAxes) -> Any:
    """jax itself never reverses windows."""
    text = jax.jit(case.function, keep_unused=True).lower(*case.arguments).as_text()
    flags = ", ".join(str(each).lower() for each in case.reverses)
    return sharded.prepared(re.sub(r"reverse = \[[^\]]*\]", f"reverse = [{flags}]", text), axes)


def chosen(case: Case, name: str, axes: MeshAxes, pick: Callable[[int], list[int]]) -> int:
    """Run some of the strategies that are offered; how many.

    Args:
        case: one op.
        name: of the op.
        axes: of the mesh.
        pick: of so many strategies some.
    """
    expected = [np.asarray(each) for each in jax.tree.leaves(jax.jit(case.reference)(*case.arguments))]
    module = lowered(case, axes)
    reading, model = sharded.read(module, axes)  # the reading's ops live as long as the module
    ((node, choices),) = [
        (node, choices)
        for node, number, choices in model.op_nodes()
        if reading.flow.ops[reading.ops[number].index].name == f"stablehlo.{name}"
    ]
    picks = pick(len(choices))
    for at in picks:
        module = lowered(case, axes)
        reading, model = sharded.read(module, axes)
        choice = [0] * len(model.network.costs)
        choice[node] = at
        sharded.write(module, reading, model, choice)
        predicted = sum(exchange.send.nbytes for exchange in choices[at].exchanges)
        assert sharded.counted_bytes(module, axes).get("collective_permute", 0) == predicted
        for got, right in zip(sharded.run(module, axes, case.arguments), expected, strict=True):
            np.testing.assert_array_equal(got, right, err_msg=f"{choices[at]}")
    return len(picks)


def sweep(name: str, seeds: range, most: int) -> int:
    """Drawn cases of an op on drawn meshes; how many strategies have run.

    Args:
        name: of `OPS`.
        seeds: one for each case.
        most: strategies of a case; the first, which does everything on every device, only where it is the only one.
    """
    count = 0
    for seed in seeds:
        random = np.random.default_rng(seed)
        case, axes = OPS[name](random), MESHES[random.integers(len(MESHES))]

        def pick(count: int, random: np.random.Generator = random) -> list[int]:
            return sorted(int(each) for each in 1 + random.permutation(count - 1)[:most])

        try:
            count += chosen(case, name.split()[0], axes, pick)
        except Exception as error:
            error.add_note(f"{name}, seed {seed}, {axes}")
            raise
    return count


@pytest.mark.parametrize("name", OPS)
def test_strategies_equal_one_device(name: str) -> None:
    """A few drawn cases of each op."""
    assert sweep(name, range(6), 2) >= 4


@pytest.mark.long
@pytest.mark.parametrize(("name", "block"), [(name, block) for name in OPS for block in range(10)])
def test_strategies_of_many_cases_equal_one_device(name: str, block: int) -> None:
    assert sweep(name, range(50 * block, 50 * (block + 1)), 6) >= 40
