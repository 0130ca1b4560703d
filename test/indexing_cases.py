"""Random cases of gathers, scatters and slices whose place is a value, with indices out of range; of sorts, transforms,
decompositions and random bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from op_cases import (
    DTYPES,
    NUMBERS,
    Array,
    Case,
    Generator,
    Shape,
    Type,
    any_numbers,
    epsilon,
    fold_region,
    i64_array,
    pick,
    plain_numbers,
    shape,
    whole_numbers,
)

_EVERY = (*NUMBERS, "i1")
_INDEX = ("i32", "i32", "i64", "ui32", "i8", "ui8")
_SIZES = (8, 4, 6, 12, 2, 3, 1, 16)


def _places(random: np.random.Generator, dims: Shape, element: str, most: int) -> Array:
    """Indices, of which some are out of range on either side."""
    low = 0 if element.startswith("ui") else -3
    made = random.integers(low, most + 4, dims)
    info = np.iinfo(DTYPES[element])
    if random.integers(4) == 0:
        far = np.where(random.integers(0, 2, dims) == 0, info.min, info.max)
        made = np.where(random.random(dims) < 0.1, far.astype(made.dtype) if info.max < 2**62 else made, made)
    return np.clip(made, info.min, info.max).astype(DTYPES[element])


def _dynamic_slice(random: np.random.Generator) -> Case:
    """Most dims are whole."""
    element, dims, index = pick(random, _EVERY), shape(random, 1), pick(random, _INDEX)
    sizes = [size if random.integers(2) else int(random.integers(0 if size == 0 else 1, size + 1)) for size in dims]
    starts = tuple(_places(random, (), index, size) for size in dims)
    operands = any_numbers(random, dims, element), *starts
    return Case("dynamic_slice", operands, (Type(tuple(sizes), element),), f"slice_sizes = {i64_array(sizes)}")


def _dynamic_update_slice(random: np.random.Generator) -> Case:
    element, dims, index = pick(random, _EVERY), shape(random, 1), pick(random, _INDEX)
    sizes = tuple(
        size if random.integers(2) else int(random.integers(0 if size == 0 else 1, size + 1)) for size in dims
    )
    starts = tuple(_places(random, (), index, size) for size in dims)
    operands = any_numbers(random, dims, element), any_numbers(random, sizes, element), *starts
    return Case("dynamic_update_slice", operands, (Type(dims, element),))


def _put(count: int, places: Sequence[int], ones: Sequence[int], others: Sequence[int]) -> Shape:
    """A shape with ``ones`` at some places, in order, and ``others`` at the rest."""
    first, second = iter(ones), iter(others)
    return tuple(next(first) if dim in places else next(second) for dim in range(count))


class _Indexing:
    """Dimension numbers of a gather or scatter: batch dims, indexed dims, and of these some that are left out.

    Args:
        random: draws them.
        scatters: whether windows may stick out, and are left out then.
    """

    def __init__(self, random: np.random.Generator) -> None:
        rank = int(random.integers(1, 4))
        self.dims = tuple(int(random.choice(_SIZES)) for _ in range(rank))
        kinds = random.integers(0, 5, rank)
        self.batching = [dim for dim in range(rank) if kinds[dim] == 4]
        indexed = [dim for dim in range(rank) if kinds[dim] <= 1]
        self.index_map = [int(dim) for dim in random.permutation(indexed)] if indexed else []
        self.sizes = [1 if dim in self.batching else size for dim, size in enumerate(self.dims)]
        for dim in range(rank):
            if dim in indexed and random.integers(3):
                self.sizes[dim] = int(random.integers(1, self.dims[dim] + 1)) if random.integers(3) == 0 else 1
            elif dim not in indexed and kinds[dim] == 3 and self.dims[dim] > 1 and random.integers(2):
                self.sizes[dim] = int(random.integers(1, self.dims[dim] + 1))  # only the first rows are read
        self.collapsed = [dim for dim in indexed if self.sizes[dim] == 1 and random.integers(4)]
        window = [size for dim, size in enumerate(self.sizes) if dim not in (*self.collapsed, *self.batching)]
        self.loose = [int(random.choice((8, 4, 6, 3, 1))) for _ in range(random.integers(0, 3))]
        batch = [self.dims[dim] for dim in self.batching] + self.loose
        order = [int(each) for each in random.permutation(len(batch))]
        batch_dims = [batch[each] for each in order]
        self.vector = int(random.integers(0, len(batch) + 1))
        if len(self.index_map) == 1 and random.integers(3) == 0:
            self.vector = len(batch)
            self.index_shape = tuple(batch_dims)
        else:
            self.index_shape = (*batch_dims[: self.vector], len(self.index_map), *batch_dims[self.vector :])
        at = [order.index(each) for each in range(len(self.batching))]
        has_vector = len(self.index_shape) > len(batch)
        self.index_batching = [each + (has_vector and each >= self.vector) for each in at]
        total = len(window) + len(batch)
        self.offsets = sorted(int(dim) for dim in random.permutation(total)[: len(window)])
        self.made = _put(total, self.offsets, window, batch_dims)

    def indices(self, random: np.random.Generator) -> Array:
        """Some of them out of range."""
        most = max((self.dims[dim] for dim in self.index_map), default=1)
        index = pick(random, _INDEX)
        return _places(random, self.index_shape, index, most)

    def unique_indices(self, random: np.random.Generator) -> Array | None:
        """Each place once, where one dim is indexed and each of its rows is a window."""
        if len(self.index_map) != 1 or self.sizes[self.index_map[0]] != 1 or self.batching:
            return None
        size, count = self.dims[self.index_map[0]], math.prod(self.index_shape)
        rows = random.permutation(max(size + 4, count))[:count] - 2
        return rows.reshape(self.index_shape).astype(np.int32)


def _gather(random: np.random.Generator) -> Case:
    numbers, element = _Indexing(random), pick(random, _EVERY)
    attributes = (
        f"dimension_numbers = #stablehlo.gather<offset_dims = {numbers.offsets}, "
        f"collapsed_slice_dims = {numbers.collapsed}, operand_batching_dims = {numbers.batching}, "
        f"start_indices_batching_dims = {numbers.index_batching}, start_index_map = {numbers.index_map}, "
        f"index_vector_dim = {numbers.vector}>, slice_sizes = {i64_array(numbers.sizes)}, indices_are_sorted = false"
    )
    operands = any_numbers(random, numbers.dims, element), numbers.indices(random)
    return Case("gather", operands, (Type(numbers.made, element),), attributes)


def _scatter(random: np.random.Generator) -> Case:
    """Sums of whole numbers, maxima, or, at places that differ, new values."""
    numbers = _Indexing(random)
    if random.integers(6) == 0:
        return _scatter_of_two(random, numbers)
    indices, kind = numbers.indices(random), int(random.integers(4))
    folds = {"add": (*NUMBERS,), "maximum": ("f32", "i32", "bf16"), "minimum": ("f32", "i32"), "multiply": ("i32",), "or": ("i1", "i32")}  # fmt: skip
    fold = pick(random, ("add", "add", *folds))
    element = pick(random, folds[fold])
    body = fold_region(fold, element)
    attributes = "indices_are_sorted = false, unique_indices = false"
    if kind == 0:
        unique = numbers.unique_indices(random)
        if unique is not None:
            indices, element = unique, pick(random, _EVERY)
            scalar = f"tensor<{element}>"
            body = f'^bb0(%x: {scalar}, %y: {scalar}): "stablehlo.return"(%y) : ({scalar}) -> ()'
            attributes = f"indices_are_sorted = false, unique_indices = {pick(random, ('true', 'false'))}"
    attributes += f", {_scatter_numbers(numbers)}"
    if fold in ("maximum", "minimum"):
        inputs, updates = (any_numbers(random, dims, element) for dims in (numbers.dims, numbers.made))
    else:
        inputs, updates = (whole_numbers(random, dims, element, 1) for dims in (numbers.dims, numbers.made))
    operands = inputs, indices, updates
    adds = "stablehlo.add" in body
    return Case("scatter", operands, (Type(numbers.dims, element),), attributes, (body,), adds=adds)


def _scatter_numbers(numbers: _Indexing) -> str:
    return (
        f"scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = {numbers.offsets}, "
        f"inserted_window_dims = {numbers.collapsed}, input_batching_dims = {numbers.batching}, "
        f"scatter_indices_batching_dims = {numbers.index_batching}, "
        f"scatter_dims_to_operand_dims = {numbers.index_map}, index_vector_dim = {numbers.vector}>"
    )


def _scatter_of_two(random: np.random.Generator, numbers: _Indexing) -> Case:
    """Two operands whose updates go to the same places: a maximum, and a sum with it."""
    one, two = "tensor<f32>", "tensor<i32>"
    body = f"""^bb0(%x: {one}, %i: {two}, %y: {one}, %j: {two}):
      %m = "stablehlo.maximum"(%x, %y) : ({one}, {one}) -> {one}
      %c = "stablehlo.convert"(%m) : ({one}) -> {two}
      %s = "stablehlo.add"(%i, %j) : ({two}, {two}) -> {two}
      %t = "stablehlo.add"(%s, %c) : ({two}, {two}) -> {two}
      "stablehlo.return"(%m, %t) : ({one}, {two}) -> ()"""
    inputs, updates = (
        [whole_numbers(random, dims, each, 9) for each in ("f32", "i32")] for dims in (numbers.dims, numbers.made)
    )
    attributes = f"indices_are_sorted = false, unique_indices = false, {_scatter_numbers(numbers)}"
    results = tuple(Type(numbers.dims, each) for each in ("f32", "i32"))
    return Case("scatter", (*inputs, numbers.indices(random), *updates), results, attributes, (body,))


def _torch_index_select(random: np.random.Generator) -> Case:
    element, dims = pick(random, ("f32", "i32", "i1")), tuple(int(each) for each in random.choice(_SIZES, 2))
    dim, count = int(random.integers(2)), int(random.choice(_SIZES))
    indices = random.integers(0, dims[dim], (count,)).astype(np.int32)
    made = (*dims[:dim], count, *dims[dim + 1 :])
    operands = any_numbers(random, dims, element), indices
    attributes = f"dim = {dim} : i64, batch_dims = 0 : i64"
    return Case("torch_index_select", operands, (Type(made, element),), attributes)


def _sort(random: np.random.Generator) -> Case:
    """One value, or another sorted with it; stable, since values repeat."""
    element, dims, count = pick(random, ("f32", "i32", "bf16", "ui8")), shape(random, 1), int(random.integers(1, 3))
    dim, others = int(random.integers(len(dims))), ["i32"] * (count - 1)
    first = any_numbers(random, dims, element)
    if first.dtype.kind not in "iu":
        first = np.where(np.isnan(first), 0, first).astype(first.dtype)
    types = [element, *others]
    scalars = [f"%{side}{at}: tensor<{each}>" for at, each in enumerate(types) for side in "xy"]
    kind = {"i32": "SIGNED", "ui8": "UNSIGNED"}.get(element, "FLOAT")
    body = (
        f'^bb0({", ".join(scalars)}): %g = "stablehlo.compare"(%x0, %y0) <{{comparison_direction = '
        f"#stablehlo<comparison_direction {pick(random, ('LT', 'GT'))}>, compare_type = "
        f"#stablehlo<comparison_type {kind}>}}> : (tensor<{element}>, tensor<{element}>) -> tensor<i1> "
        f'"stablehlo.return"(%g) : (tensor<i1>) -> ()'
    )
    operands = first, *(any_numbers(random, dims, each) for each in others)
    results = tuple(Type(dims, each) for each in types)
    return Case("sort", operands, results, f"dimension = {dim} : i64, is_stable = true", (body,))


def _fft(random: np.random.Generator) -> Case:
    kind, count = pick(random, ("FFT", "IFFT", "RFFT", "IRFFT")), int(random.integers(1, 3))
    batch = tuple(int(each) for each in random.choice(_SIZES, random.integers(0, 3)))
    length = tuple(int(each) for each in random.choice((8, 4, 6), count))
    half = (*length[:-1], length[-1] // 2 + 1)
    before, after = {"RFFT": (length, half), "IRFFT": (half, length)}.get(kind, (length, length))
    read, made = ("f32" if kind == "RFFT" else "complex<f32>"), ("f32" if kind == "IRFFT" else "complex<f32>")
    operand = plain_numbers(random, (*batch, *before), read)
    attributes = f"fft_type = #stablehlo<fft_type {kind}>, fft_length = {i64_array(length)}"
    off = 64 * epsilon("f32")
    return Case("fft", (operand,), (Type((*batch, *after), made),), attributes, tolerance=off)


def _positive(random: np.random.Generator, batch: Shape, size: int, element: str) -> Array:
    """Positive definite matrices."""
    root = plain_numbers(random, (*batch, size, size), element)
    return (root @ np.swapaxes(root, -1, -2) / size + 2 * np.eye(size, dtype=root.dtype)).astype(root.dtype)


def _cholesky(random: np.random.Generator) -> Case:
    element, size = pick(random, ("f32", "f64")), int(random.choice((1, 4, 6, 8)))
    batch = tuple(int(each) for each in random.choice((8, 4, 6, 3, 1), random.integers(0, 3)))
    operand = _positive(random, batch, size, element)
    attributes = f"lower = {pick(random, ('true', 'false'))}"
    return Case("cholesky", (operand,), (Type(operand.shape, element),), attributes, tolerance=256 * epsilon(element))


def _triangular_solve(random: np.random.Generator) -> Case:
    element, size, columns = pick(random, ("f32", "f64")), int(random.choice((1, 4, 6, 8))), int(random.choice(_SIZES))
    batch = tuple(int(each) for each in random.choice((8, 4, 6, 3, 1), random.integers(0, 3)))
    left = bool(random.integers(2))
    matrix = _positive(random, batch, size, element)
    right = plain_numbers(random, (*batch, size, columns) if left else (*batch, columns, size), element)
    attributes = (
        f"left_side = {str(left).lower()}, lower = {pick(random, ('true', 'false'))}, unit_diagonal = false, "
        f"transpose_a = #stablehlo<transpose {pick(random, ('NO_TRANSPOSE', 'TRANSPOSE', 'ADJOINT'))}>"
    )
    off = 1024 * epsilon(element)
    return Case("triangular_solve", (matrix, right), (Type(right.shape, element),), attributes, tolerance=off)


def _rng_bit_generator(random: np.random.Generator) -> Case:
    """Threefry, whose bits the seed alone decides."""
    dims, element = shape(random, 1), pick(random, ("ui32", "i32"))
    seed = random.integers(0, 1 << 62, (2,)).astype(np.uint64)
    attributes = "rng_algorithm = #stablehlo<rng_algorithm THREE_FRY>"
    return Case("rng_bit_generator", (seed,), (Type((2,), "ui64"), Type(dims, element)), attributes)


GENERATORS: dict[str, Generator] = {
    "cholesky": _cholesky,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "rng_bit_generator": _rng_bit_generator,
    "scatter": _scatter,
    "sort": _sort,
    "torch_index_select": _torch_index_select,
    "triangular_solve": _triangular_solve,
}
