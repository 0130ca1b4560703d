"""Random cases of ops with windows, and of those that move rows: convolutions, poolings, pads, slices, concatenations."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from op_cases import (
    FLOATS,
    NUMBERS,
    Array,
    Case,
    Generator,
    Type,
    any_numbers,
    dense,
    epsilon,
    fold_region,
    i64_array,
    pick,
    plain_numbers,
    shape,
    whole_numbers,
)

_EVERY = (*NUMBERS, "i1")
_ROWS = (8, 12, 16, 6, 4, 24, 9, 5)


def _slice(random: np.random.Generator) -> Case:
    """Most dims are whole."""
    element, dims = pick(random, _EVERY), shape(random)
    starts, limits, strides = list[int](), list[int](), list[int]()
    for size in dims:
        start, limit, stride = 0, size, 1
        if size and random.integers(2):
            start, limit = sorted(int(each) for each in random.integers(0, size + 1, 2))
            stride = int(random.choice((1, 1, 2, 3)))
        starts.append(start)
        limits.append(limit)
        strides.append(stride)
    made = tuple(-(-(limit - start) // stride) for start, limit, stride in zip(starts, limits, strides, strict=True))
    attributes = (
        f"start_indices = {i64_array(starts)}, limit_indices = {i64_array(limits)}, strides = {i64_array(strides)}"
    )
    return Case("slice", (any_numbers(random, dims, element),), (Type(made, element),), attributes)


def _pad(random: np.random.Generator) -> Case:
    """Rows in front, behind and between; negative ones take rows away."""
    element, dims = pick(random, _EVERY), shape(random)
    low, high, inner, made = list[int](), list[int](), list[int](), list[int]()
    for size in dims:
        before, after, between = (int(each) for each in random.integers((-2, -2, 0), (4, 4, 3)))
        if random.integers(2):
            before = after = between = 0
        stretched = size + max(size - 1, 0) * between
        if random.integers(3) == 0:  # sizes that divide again
            after += -(stretched + before + after) % 4
        if stretched + before + after < 0 or stretched + min(before, 0) + min(after, 0) < 0:
            before = after = between = 0
            stretched = size
        low.append(before)
        high.append(after)
        inner.append(between)
        made.append(stretched + before + after)
    attributes = (
        f"edge_padding_low = {i64_array(low)}, edge_padding_high = {i64_array(high)}, "
        f"interior_padding = {i64_array(inner)}"
    )
    operands = any_numbers(random, dims, element), any_numbers(random, (), element)
    return Case("pad", operands, (Type(tuple(made), element),), attributes)


def _concatenate(random: np.random.Generator) -> Case:
    element, dims = pick(random, _EVERY), shape(random, 1)
    dim, count = int(random.integers(len(dims))), int(random.integers(1, 4))
    sizes = [int(random.choice((dims[dim], dims[dim], 1, 3, 8, 0))) for _ in range(count)]
    shapes = [(*dims[:dim], size, *dims[dim + 1 :]) for size in sizes]
    made = (*dims[:dim], sum(sizes), *dims[dim + 1 :])
    operands = tuple(any_numbers(random, each, element) for each in shapes)
    return Case("concatenate", operands, (Type(made, element),), f"dimension = {dim} : i64")


def _windows(random: np.random.Generator, count: int, is_plain: bool) -> tuple[list[int], ...]:
    """Sizes, strides, dilations of the base and of the window, and padding before and after."""
    sizes = random.choice((1, 2, 3, 3, 5), count)
    strides = random.choice((1, 1, 2, 3), count)
    base, window = random.choice((1, 1, 1, 2), count), random.choice((1, 1, 1, 2), count)
    low, high = random.integers(0, 3, count), random.integers(0, 3, count)
    if is_plain:
        base, window = np.ones_like(base), np.ones_like(window)
    if random.integers(4) == 0:  # as large as their strides, without gaps
        strides, low, high = sizes, low * 0, high * 0
    if random.integers(6) == 0:
        low = low - 1
    return tuple([int(number) for number in each] for each in (sizes, strides, base, window, low, high))


def _number_of_windows(size: int, window: int, stride: int, base: int, dilation: int, low: int, high: int) -> int:
    """How many windows fit (StableHLO's definition)."""
    stretched = (size - 1) * base + 1 + low + high if size else low + high
    reach = (window - 1) * dilation + 1
    return 0 if stretched < reach or stretched == 0 else (stretched - reach) // stride + 1


def _reduce_window(random: np.random.Generator) -> Case:
    """Poolings of one to three dims, of which most have windows of one row; some have no identity as initial value."""
    rank = int(random.integers(1, 4))
    dims = tuple(int(random.choice(_ROWS if rank < 3 else (8, 4, 6, 5))) for _ in range(rank))
    sizes, strides, base, window, low, high = _windows(random, rank, bool(random.integers(2)))
    for dim in range(rank):
        if rank > 1 and random.integers(2):
            sizes[dim] = strides[dim] = base[dim] = window[dim] = 1
            low[dim] = high[dim] = 0
    made = tuple(map(_number_of_windows, dims, sizes, strides, base, window, low, high))
    fold = pick(random, ("add", "add", "maximum", "minimum", "multiply", "or"))
    element = pick(random, {"or": ("i1", "i32"), "multiply": ("f32", "i32")}.get(fold, (*FLOATS, "i32", "ui8")))
    neutral = {"add": 0, "or": 0, "multiply": 1, "maximum": -1000, "minimum": 1000}[fold]
    operand = whole_numbers(random, dims, element, 1 if fold == "multiply" else 2)
    if fold in ("maximum", "minimum"):
        operand = any_numbers(random, dims, element)
    initial = whole_numbers(random, (), element, 3)
    if random.integers(3):
        initial = np.asarray(max(neutral, 0) if element == "ui8" else neutral).astype(initial.dtype)
        if element == "ui8" and fold == "minimum":
            initial = np.asarray(255, np.uint8)
    attributes = (
        f"window_dimensions = {i64_array(sizes)}, window_strides = {i64_array(strides)}, "
        f"base_dilations = {i64_array(base)}, window_dilations = {i64_array(window)}, "
        f"padding = {dense(np.array([low, high]).T)}"
    )
    body = fold_region(fold, element)
    return Case("reduce_window", (operand, initial), (Type(made, element),), attributes, (body,))


def _select_and_scatter(random: np.random.Generator) -> Case:
    """The gradient of a maximum over windows; it has no dilations."""
    rank = int(random.integers(1, 4))
    dims = tuple(int(random.choice(_ROWS if rank < 3 else (8, 4, 6, 5))) for _ in range(rank))
    sizes, strides, _, _, low, high = _windows(random, rank, True)
    for dim in range(rank):
        low[dim], high[dim] = max(0, min(low[dim], sizes[dim] - 1)), min(high[dim], sizes[dim] - 1)
        if rank > 1 and random.integers(2):
            sizes[dim] = strides[dim] = 1
            low[dim] = high[dim] = 0
    made = tuple(map(_number_of_windows, dims, sizes, strides, [1] * rank, [1] * rank, low, high))
    element, direction = pick(random, ("f32", "f64", "i32")), pick(random, ("GE", "GE", "LE"))
    scalar = f"tensor<{element}>"
    kind = "SIGNED" if element == "i32" else "FLOAT"
    select = (
        f'^bb0(%x: {scalar}, %y: {scalar}): %g = "stablehlo.compare"(%x, %y) <{{comparison_direction = '
        f"#stablehlo<comparison_direction {direction}>, compare_type = #stablehlo<comparison_type {kind}>}}> : "
        f'({scalar}, {scalar}) -> tensor<i1> "stablehlo.return"(%g) : (tensor<i1>) -> ()'
    )
    operand = whole_numbers(random, dims, element, 50)  # equal ones, of which one is picked
    sources, initial = whole_numbers(random, made, element), whole_numbers(random, (), element, 0)
    attributes = (
        f"window_dimensions = {i64_array(sizes)}, window_strides = {i64_array(strides)}, "
        f"padding = {dense(np.array([low, high]).T)}"
    )
    return Case(
        "select_and_scatter", (operand, sources, initial), (Type(dims, element),), attributes,
        (select, fold_region("add", element)),
    )  # fmt: skip


def _convolution(random: np.random.Generator) -> Case:
    """One or two spatial dims, groups of features or of the batch, everything in any order."""
    count = int(random.integers(1, 3))
    rows = tuple(int(random.choice(_ROWS if count == 1 else (8, 6, 4, 9))) for _ in range(count))
    features, batch = int(random.choice((1, 2, 4))), int(random.choice((1, 2, 4, 8)))
    groups, batch_groups, out = 1, 1, int(random.choice((1, 2, 4, 8)))
    kind = int(random.integers(6))
    if kind == 0:
        groups = int(random.choice((2, 4)))
        out *= groups
    elif kind == 1:
        batch_groups = int(random.choice((2, 4)))
        batch, out = batch * batch_groups, out * batch_groups
    sizes, strides, base, window, low, high = _windows(random, count, kind > 3)
    sizes = [min(size, row) for size, row in zip(sizes, rows, strict=True)]
    if random.integers(8) == 0:  # a window of all rows, as in the gradient of a kernel
        sizes = list(rows)
    made = tuple(map(_number_of_windows, rows, sizes, strides, base, window, low, high))
    orders = [[int(each) for each in random.permutation(count + 2)] for _ in range(3)]
    full = (
        (batch, features * groups, *rows),
        (features, out, *sizes),
        (batch // batch_groups, out, *made),
    )
    shapes = [tuple(dims[each] for each in order) for dims, order in zip(full, orders, strict=True)]
    names = [
        ["bf01"[each] for each in orders[0]],
        ["io01"[each] for each in orders[1]],
        ["bf01"[each] for each in orders[2]],
    ]
    text = "x".join(f"[{', '.join(each)}]" for each in names[:2]) + f"->[{', '.join(names[2])}]"
    reversal = [bool(each) for each in random.integers(0, 2, count)] if random.integers(6) == 0 else [False] * count
    attributes = (
        f"batch_group_count = {batch_groups} : i64, feature_group_count = {groups} : i64, "
        f"dimension_numbers = #stablehlo.conv<{text}>, window_strides = {i64_array(strides)}, "
        f"padding = {dense(np.array([low, high]).T)}, lhs_dilation = {i64_array(base)}, "
        f"rhs_dilation = {i64_array(window)}, "
        f"window_reversal = array<i1: {', '.join(str(each).lower() for each in reversal)}>"
    )
    element = pick(random, ("f32", "f32", "f32", "f64", "f16", "i32"))
    terms, operands, off = features * math.prod(sizes), tuple[Array, ...](), 0.0
    if element in ("f32", "f64") and random.integers(3) == 0:
        operands, off = tuple(plain_numbers(random, each, element) for each in shapes[:2]), 8 * terms * epsilon(element)
    else:
        operands = tuple(whole_numbers(random, each, element) for each in shapes[:2])
    return Case(
        "convolution", operands, (Type(shapes[2], element),), attributes, tolerance=off, adds=True, unreduced=True
    )


def _batch_norm(name: str, random: np.random.Generator) -> Case:
    """Over one feature dim."""
    element, dims = pick(random, ("f32", "f64")), shape(random, 2, 4)
    while 0 in dims or math.prod(dims) == 1:
        dims = shape(random, 2, 4)
    feature = int(random.integers(len(dims)))
    row = (dims[feature],)
    operand = plain_numbers(random, dims, element)
    scale, offset, mean = (plain_numbers(random, row, element) for _ in range(3))
    variance = np.abs(plain_numbers(random, row, element)) + np.asarray(0.5, operand.dtype)
    whole, rows = Type(dims, element), Type(row, element)
    attributes = f"epsilon = 1.000000e-03 : f32, feature_index = {feature} : i64"
    operands, results = {
        "batch_norm_grad": (
            (operand, scale, mean, variance, plain_numbers(random, dims, element)),
            (whole, rows, rows),
        ),
        "batch_norm_inference": ((operand, scale, offset, mean, variance), (whole,)),
        "batch_norm_training": ((operand, scale, offset), (whole, rows, rows)),
    }[name]
    return Case(name, operands, results, attributes, tolerance=max(math.prod(dims), 32) * epsilon(element))


_BATCH_NORMS = ("batch_norm_grad", "batch_norm_inference", "batch_norm_training")

GENERATORS: dict[str, Generator] = {
    **{name: partial(_batch_norm, name) for name in _BATCH_NORMS},
    "concatenate": _concatenate,
    "convolution": _convolution,
    "pad": _pad,
    "reduce_window": _reduce_window,
    "select_and_scatter": _select_and_scatter,
    "slice": _slice,
}
