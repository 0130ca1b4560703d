"""Ops that index, sort or solve, on shards: every strategy gives what one device gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from op_strategies import Compare, check, nearly, same_bits

from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.sharding.strategies import Strategy

MESHES: tuple[MeshAxes, ...] = (
    (("x", 2),),
    (("x", 3),),
    (("x", 4),),
    (("x", 2), ("y", 2)),
    (("x", 3), ("y", 2)),
    (("x", 8),),
    (("x", 2), ("y", 4)),
    (("x", 2), ("y", 2), ("z", 2)),
)
MOST = 12
"""Strategies in one program."""

INDICES = (np.int32, np.int32, np.int8, np.uint8, np.uint32, np.int16)
WIDE_INDICES = (np.int64, np.uint64)
NUMBERS = (np.float32, np.float32, np.float32, np.float16, jnp.bfloat16, np.int32, np.int8, np.uint8, np.uint32, np.bool_, np.complex64)  # fmt: skip
WIDE_NUMBERS = (np.float64, np.int64, np.complex128)


@dataclass(frozen=True)
class Case:
    """A function with one op."""

    name: str
    function: Callable[..., Any]
    arguments: list[np.ndarray[Any, Any]]
    compare: Compare = same_bits


class Draw:
    """Random shapes and values.

    Args:
        seed: of everything.
        wide: whether types of 64 bits are drawn too.
    """

    def __init__(self, seed: int, wide: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.numbers = NUMBERS + WIDE_NUMBERS * 2 if wide else NUMBERS
        self.indices = INDICES + WIDE_INDICES * 2 if wide else INDICES

    def one_of(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def dims(self, rank: int) -> list[int]:
        return [int(self.one_of((1, 2, 3, 4, 5, 6, 8, 8, 12, 12))) for _ in range(rank)]

    def array(self, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        if dtype == np.bool_:
            return self.random.integers(2, size=shape).astype(bool)
        if np.issubdtype(dtype, np.integer):
            info = np.iinfo(dtype)
            return self.random.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
        values = self.random.normal(size=shape)
        values = np.where(self.random.random(shape) < 0.1, -0.0, values)
        if np.issubdtype(dtype, np.complexfloating):
            return (values + 1j * self.random.normal(size=shape)).astype(dtype)
        return values.astype(dtype)

    def index(self, shape: Any, around: int, dtype: Any) -> np.ndarray[Any, Any]:
        """Mostly inside of a dim, some beside it, some far away."""
        info = np.iinfo(dtype)
        near = self.random.integers(max(-3, info.min), around + 4, size=shape)
        far = self.random.choice(np.array([info.min, info.max], dtype), size=shape)
        return np.where(self.random.random(shape) < 0.15, far, near.astype(dtype)).astype(dtype)


def window(draw: Draw, shape: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Batching dims (in front), sizes of windows, and the dims that are collapsed."""
    rank = len(shape)
    batching = [0] if rank > 1 and draw.random.integers(3) == 0 else []
    sizes, collapsed = list[int](), list[int]()
    for dim, size in enumerate(shape):
        kind = draw.random.integers(4)
        if dim in batching:
            sizes.append(1)
        elif kind == 0:
            sizes.append(size)
        elif kind == 1 and size > 2:
            sizes.append(int(draw.random.integers(2, size)))
        else:
            sizes.append(1)
            if draw.random.integers(3):
                collapsed.append(dim)
    return batching, sizes, collapsed


def indices(draw: Draw, shape: list[int], batching: list[int]) -> tuple[np.ndarray[Any, Any], list[int], int]:
    """Indices, which dim each component is of, and the dim of components."""
    free = [dim for dim in range(len(shape)) if dim not in batching]
    count = int(draw.random.integers(1, len(free) + 1))
    dims = [int(dim) for dim in draw.random.permutation(free)[:count]]
    around = max(shape[dim] for dim in dims)
    batch = [shape[0]] * len(batching) + draw.dims(int(draw.random.integers(3)))
    return draw.index((*batch, count), around, draw.one_of(draw.indices)), dims, len(batch)


def gather(draw: Draw) -> Case:
    shape = draw.dims(int(draw.random.integers(1, 4)))
    batching, sizes, collapsed = window(draw, shape)
    rows, dims, batch = indices(draw, shape, batching)
    offset = len(shape) - len(batching) - len(collapsed)
    places = sorted(draw.random.permutation(offset + batch)[:offset].tolist())
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(places),
        collapsed_slice_dims=tuple(collapsed),
        start_index_map=tuple(dims),
        operand_batching_dims=tuple(batching),
        start_indices_batching_dims=tuple(batching),
    )

    def function(x: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.gather(x, rows, numbers, tuple(sizes), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    return Case("stablehlo.gather", function, [draw.array(shape, draw.one_of(draw.numbers)), rows])


def scatter(draw: Draw) -> Case:
    shape = draw.dims(int(draw.random.integers(1, 4)))
    batching, sizes, inserted = window(draw, shape)
    rows, dims, batch = indices(draw, shape, batching)
    kept = [size for dim, size in enumerate(sizes) if dim not in (*batching, *inserted)]
    places = sorted(draw.random.permutation(len(kept) + batch)[: len(kept)].tolist())
    update = list[int]()
    windows, batches = iter(kept), iter(rows.shape)
    for dim in range(len(kept) + batch):
        update.append(next(windows) if dim in places else next(batches))
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(places),
        inserted_window_dims=tuple(inserted),
        scatter_dims_to_operand_dims=tuple(dims),
        operand_batching_dims=tuple(batching),
        scatter_indices_batching_dims=tuple(batching),
    )
    dtype = draw.one_of(draw.numbers)
    kinds = [lax.scatter] if dtype == np.bool_ else [lax.scatter, lax.scatter_add]
    if dtype != np.bool_ and not np.issubdtype(dtype, np.complexfloating):
        kinds += [lax.scatter_max, lax.scatter_min, lax.scatter_mul]
    kind = draw.one_of(kinds)

    def function(x: jax.Array, rows: jax.Array, update: jax.Array) -> jax.Array:
        return kind(x, rows, update, numbers, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)

    adds = kind in (lax.scatter_add, lax.scatter_mul) and jnp.issubdtype(dtype, jnp.inexact)
    arguments = [draw.array(shape, dtype), rows, draw.array(update, dtype)]
    return Case("stablehlo.scatter", function, arguments, nearly if adds else same_bits)


def starts(draw: Draw, shape: list[int]) -> list[np.ndarray[Any, Any]]:
    dtype = draw.one_of(draw.indices)
    return [draw.index((), size, dtype) for size in shape]


def parts(draw: Draw, shape: list[int]) -> list[int]:
    return [draw.one_of((size, 1, int(draw.random.integers(1, size + 1)))) for size in shape]


def dynamic_slice(draw: Draw) -> Case:
    shape = draw.dims(int(draw.random.integers(1, 4)))
    sizes = tuple(parts(draw, shape))

    def function(x: jax.Array, *starts: jax.Array) -> jax.Array:
        return lax.dynamic_slice_p.bind(x, *starts, slice_sizes=sizes)

    arguments = [draw.array(shape, draw.one_of(draw.numbers)), *starts(draw, shape)]
    return Case("stablehlo.dynamic_slice", function, arguments)


def dynamic_update_slice(draw: Draw) -> Case:
    shape = draw.dims(int(draw.random.integers(1, 4)))

    def function(x: jax.Array, update: jax.Array, *starts: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_p.bind(x, update, *starts)

    dtype = draw.one_of(draw.numbers)
    arguments = [draw.array(shape, dtype), draw.array(parts(draw, shape), dtype), *starts(draw, shape)]
    return Case("stablehlo.dynamic_update_slice", function, arguments)


KINDS: dict[str, Callable[[Draw], Case]] = {
    each.__name__: each for each in (gather, scatter, dynamic_slice, dynamic_update_slice)
}


def run(kind: str, seed: int, wide: bool = False) -> int:
    """One op on one mesh, under some of its strategies; returns how many."""
    draw = Draw(seed, wide)
    case, axes = KINDS[kind](draw), MESHES[seed % len(MESHES)]

    def pick(all_: list[Strategy]) -> list[Strategy]:
        cut = all_[1:]
        return [cut[number] for number in sorted(draw.random.permutation(len(cut))[:MOST])]

    with jax.enable_x64(wide):
        return len(check(case.function, case.arguments, case.name, axes, case.compare, pick))


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_gives_what_one_device_gives(kind: str) -> None:
    assert sum(run(kind, seed) for seed in range(8)) > 20


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", range(10))
def test_many_more(kind: str, block: int) -> None:
    total = sum(run(kind, 1000 + 50 * block + each, wide=bool(each % 2)) for each in range(50))
    print(f"{kind}: {total} cases")
    assert total > 100
