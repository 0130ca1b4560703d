"""Random cases of ops that treat each position on its own, and of those that only move or make elements."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from op_cases import (
    BITS,
    COMPLEX,
    DTYPES,
    FLOATS,
    INTEGERS,
    NUMBERS,
    Case,
    Generator,
    Type,
    any_numbers,
    epsilon,
    i64_array,
    pick,
    shape,
    type_of,
    whole_numbers,
)

_EVERY = (*NUMBERS, "i1")
_UNARY = {
    "abs": (*FLOATS, "i32", "i8", "i64", "complex<f32>"),
    "cbrt": FLOATS,
    "ceil": FLOATS,
    "cosine": (*FLOATS, "complex<f32>"),
    "count_leading_zeros": INTEGERS,
    "exponential": (*FLOATS, "complex<f32>"),
    "exponential_minus_one": (*FLOATS, "complex<f32>"),
    "floor": FLOATS,
    "imag": (*FLOATS, *COMPLEX),
    "is_finite": FLOATS,
    "log": (*FLOATS, "complex<f32>"),
    "log_plus_one": (*FLOATS, "complex<f32>"),
    "logistic": (*FLOATS, "complex<f32>"),
    "negate": NUMBERS,
    "not": BITS,
    "popcnt": INTEGERS,
    "real": (*FLOATS, *COMPLEX),
    "round_nearest_afz": FLOATS,
    "round_nearest_even": FLOATS,
    "rsqrt": (*FLOATS, "complex<f32>"),
    "sign": (*FLOATS, "i32", "i8", "complex<f32>"),
    "sine": (*FLOATS, "complex<f32>"),
    "sqrt": (*FLOATS, "complex<f32>"),
    "tan": (*FLOATS, "complex<f32>"),
    "tanh": (*FLOATS, "complex<f32>"),
}
_BINARY = {
    "add": _EVERY,
    "and": BITS,
    "atan2": FLOATS,
    "divide": NUMBERS,
    "maximum": (*FLOATS, *BITS),
    "minimum": (*FLOATS, *BITS),
    "multiply": _EVERY,
    "or": BITS,
    "power": (*FLOATS, "i32", "ui32"),
    "remainder": (*FLOATS, *INTEGERS),
    "shift_left": INTEGERS,
    "shift_right_arithmetic": INTEGERS,
    "shift_right_logical": INTEGERS,
    "subtract": NUMBERS,
    "xor": BITS,
}
_NO_COMPLEX_RESULT = {"abs", "imag", "real"}
_SLOW = {
    "atan2", "cbrt", "cosine", "exponential", "exponential_minus_one", "log", "log_plus_one", "logistic", "power",
    "rsqrt", "sine", "sqrt", "tan", "tanh", "divide", "multiply", "sign", "abs", "remainder",
}  # fmt: skip


def _tolerance(name: str, element: str) -> float:
    """XLA rounds slow functions and complex numbers otherwise where a loop over a shard is vectorized otherwise."""
    return 8 * epsilon(element) if name in _SLOW and (element in COMPLEX or name not in ("abs", "sign")) else 0.0


def _unary(name: str, random: np.random.Generator) -> Case:
    element, dims = pick(random, _UNARY[name]), shape(random)
    made = element
    if name == "is_finite":
        made = "i1"
    elif name in _NO_COMPLEX_RESULT:
        made = {"complex<f32>": "f32", "complex<f64>": "f64"}.get(element, element)
    operand = any_numbers(random, dims, element)
    return Case(name, (operand,), (Type(dims, made),), tolerance=_tolerance(name, element))


def _binary(name: str, random: np.random.Generator) -> Case:
    element, dims = pick(random, _BINARY[name]), shape(random)
    left, right = any_numbers(random, dims, element), any_numbers(random, dims, element)
    if name.startswith("shift"):
        right = np.abs(whole_numbers(random, dims, element, 7)).astype(DTYPES[element])
    if name == "power" and element in INTEGERS:
        right = np.abs(whole_numbers(random, dims, element, 5)).astype(DTYPES[element])
    if name in ("divide", "remainder") and element in INTEGERS:
        right = np.where(right == 0, 1, np.where(right == -1, 3, right) if right.dtype.kind == "i" else right)
        right = np.asarray(right).astype(DTYPES[element])
    return Case(name, (left, right), (Type(dims, element),), tolerance=_tolerance(name, element))


def _compare(random: np.random.Generator) -> Case:
    element, dims = pick(random, _EVERY), shape(random)
    left, right = any_numbers(random, dims, element), any_numbers(random, dims, element)
    right = np.asarray(np.where(random.random(dims) < 0.3, left, right)).astype(left.dtype)
    directions = ("EQ", "NE") if element in COMPLEX else ("EQ", "NE", "LT", "LE", "GT", "GE")
    attributes = f"comparison_direction = #stablehlo<comparison_direction {pick(random, directions)}>"
    if element in FLOATS:
        attributes += f", compare_type = #stablehlo<comparison_type {pick(random, ('FLOAT', 'TOTALORDER'))}>"
    return Case("compare", (left, right), (Type(dims, "i1"),), attributes)


def _complex(random: np.random.Generator) -> Case:
    element, dims = pick(random, ("f32", "f64")), shape(random)
    parts = any_numbers(random, dims, element), any_numbers(random, dims, element)
    return Case("complex", parts, (Type(dims, f"complex<{element}>"),))


def _convert(random: np.random.Generator) -> Case:
    """Values that both types have: what becomes of others, StableHLO leaves open."""
    source, target, dims = pick(random, _EVERY), pick(random, _EVERY), shape(random)
    operand = whole_numbers(random, dims, source, 9)
    if source in FLOATS and target in (*FLOATS, *COMPLEX):
        operand = any_numbers(random, dims, source)
    elif operand.dtype.kind not in "ub" and target.startswith("ui"):
        operand = np.abs(operand).astype(operand.dtype)
    return Case("convert", (operand,), (Type(dims, target),))


def _clamp(random: np.random.Generator) -> Case:
    """The limits may be scalars."""
    element, dims = pick(random, (*FLOATS, *INTEGERS)), shape(random)
    low, high = (any_numbers(random, dims if random.integers(2) else (), element) for _ in range(2))
    return Case("clamp", (low, any_numbers(random, dims, element), high), (Type(dims, element),))


def _select(random: np.random.Generator) -> Case:
    """The predicate may be a scalar."""
    element, dims = pick(random, _EVERY), shape(random)
    flags = any_numbers(random, dims if random.integers(2) else (), "i1")
    return Case(
        "select",
        (flags, any_numbers(random, dims, element), any_numbers(random, dims, element)),
        (Type(dims, element),),
    )


def _reduce_precision(random: np.random.Generator) -> Case:
    element, dims = pick(random, FLOATS), shape(random)
    attributes = f"exponent_bits = {random.integers(2, 9)} : i32, mantissa_bits = {random.integers(0, 11)} : i32"
    return Case("reduce_precision", (any_numbers(random, dims, element),), (Type(dims, element),), attributes)


def _map(random: np.random.Generator) -> Case:
    element, dims, count = pick(random, ("f32", "i32", "f64")), shape(random, 1), int(random.integers(1, 3))
    scalar = f"tensor<{element}>"
    names = ("%x", "%y")[:count]
    body = (
        f"^bb0({', '.join(f'{name}: {scalar}' for name in names)}): "
        f'%z = "stablehlo.subtract"(%x, {names[-1]}) : ({scalar}, {scalar}) -> {scalar} '
        f'%n = "stablehlo.maximum"(%z, %x) : ({scalar}, {scalar}) -> {scalar} "stablehlo.return"(%n) : ({scalar}) -> ()'
    )
    operands = tuple(any_numbers(random, dims, element) for _ in range(count))
    attributes = f"dimensions = {i64_array(range(len(dims)))}"
    return Case("map", operands, (Type(dims, element),), attributes, (body,))


def _bitcast_convert(random: np.random.Generator) -> Case:
    """Types of equal size, or a last dim that is made or taken away."""
    dims = shape(random)
    source, target, ratio = [
        ("f32", "i32", 1), ("f32", "ui32", 1), ("i8", "ui8", 1), ("bf16", "f16", 1), ("f64", "i64", 1),
        ("f32", "ui8", 4), ("i64", "i32", 2), ("i32", "i16", 2), ("i8", "i32", -4), ("f32", "f64", -2),
    ][int(random.integers(10))]  # fmt: skip
    before = (*dims, -ratio) if ratio < 0 else dims
    after = (*dims, ratio) if ratio > 1 else dims
    operand = any_numbers(random, before, source)
    if operand.dtype.kind not in "iu":  # NaN has many bits
        operand = np.where(np.isnan(operand), 1, operand).astype(operand.dtype)
    return Case("bitcast_convert", (operand,), (Type(after, target),))


def _broadcast_in_dim(random: np.random.Generator) -> Case:
    """Dims of size 1 are spread or kept; others are put anywhere, in any order."""
    element, made = pick(random, _EVERY), shape(random, 0, 4)
    count = int(random.integers(0, len(made) + 1))
    dims = [int(dim) for dim in random.permutation(len(made))[:count]]
    if random.integers(2):
        dims.sort()
    source = tuple(1 if random.integers(4) == 0 else made[dim] for dim in dims)
    return Case(
        "broadcast_in_dim",
        (any_numbers(random, source, element),),
        (Type(made, element),),
        f"broadcast_dimensions = {i64_array(dims)}",
    )


def _broadcast(random: np.random.Generator) -> Case:
    element, source, front = pick(random, _EVERY), shape(random, 0, 2), shape(random, 0, 2)
    operand = any_numbers(random, source, element)
    return Case("broadcast", (operand,), (Type((*front, *source), element),), f"broadcast_sizes = {i64_array(front)}")


def _factors(random: np.random.Generator, size: int) -> list[int]:
    """A size as a product of one to four factors, some of them 1."""
    found = list[int]()
    for _ in range(int(random.integers(0, 4))):
        divisors = [each for each in range(1, size + 1) if size % each == 0] or [1]
        factor = int(random.choice(divisors))
        found.append(factor)
        size //= factor
    return [*found, size]


def _reshape(random: np.random.Generator) -> Case:
    """Dims are split, merged and made of parts of others; ones and zeros come and go."""
    element, before = pick(random, _EVERY), shape(random, 0, 4)
    operand = any_numbers(random, before, element)
    size = math.prod(before)
    if random.integers(2) and size:
        return Case("reshape", (operand,), (Type(tuple(_factors(random, size)) if before else (1, 1), element),))
    made = list[int]()
    for dim in before:
        if made and random.integers(3) == 0:
            made[-1] *= dim
        else:
            made += _factors(random, dim) if dim and random.integers(2) else [dim]
    if size == 0 and random.integers(2):
        made = [0, *(int(random.choice((1, 2, 8))) for _ in range(2))]
    return Case("reshape", (operand,), (Type(tuple(made), element),))


def _transpose(random: np.random.Generator) -> Case:
    element, dims = pick(random, _EVERY), shape(random, 0, 4)
    order = [int(dim) for dim in random.permutation(len(dims))]
    made = tuple(dims[dim] for dim in order)
    operand = any_numbers(random, dims, element)
    return Case("transpose", (operand,), (Type(made, element),), f"permutation = {i64_array(order)}")


def _reverse(random: np.random.Generator) -> Case:
    element, dims = pick(random, _EVERY), shape(random, 0, 4)
    back = sorted(int(dim) for dim in random.permutation(len(dims))[: int(random.integers(0, len(dims) + 1))])
    operand = any_numbers(random, dims, element)
    return Case("reverse", (operand,), (Type(dims, element),), f"dimensions = {i64_array(back)}")


def _iota(random: np.random.Generator) -> Case:
    element, dims = pick(random, NUMBERS), shape(random, 1, 3)
    dim = int(random.integers(len(dims)))
    return Case("iota", (), (Type(dims, element),), f"iota_dimension = {dim} : i64")


def _constant(random: np.random.Generator) -> Case:
    """One number in all elements, or many."""
    element, dims = pick(random, ("f32", "bf16", "f64", "i32", "i8", "ui8", "i1", "complex<f32>")), shape(random)
    if element in COMPLEX:
        numbers = whole_numbers(random, () if random.integers(2) else dims, element)
        text = str(numbers.tolist()).replace("(", "").replace(")", "")
        text = _complex_text(numbers)
    else:
        numbers = whole_numbers(random, () if random.integers(2) else dims, element, 9)
        text = str(numbers.tolist()).replace("True", "true").replace("False", "false")
    type_ = Type(dims, element)
    if numbers.size == 0:
        text = ""
    return Case("constant", (), (type_,), f"value = dense<{text}> : {type_}")


def _complex_text(numbers: np.ndarray) -> str:
    if numbers.ndim == 0:
        return f"({float(np.real(numbers))}, {float(np.imag(numbers))})"
    return f"[{', '.join(_complex_text(each) for each in numbers)}]"


def _optimization_barrier(random: np.random.Generator) -> Case:
    operands = tuple(any_numbers(random, shape(random), pick(random, _EVERY)) for _ in range(random.integers(1, 4)))
    return Case("optimization_barrier", operands, tuple(type_of(value) for value in operands))


GENERATORS: dict[str, Generator] = {
    **{name: partial(_unary, name) for name in _UNARY},
    **{name: partial(_binary, name) for name in _BINARY},
    "bitcast_convert": _bitcast_convert,
    "broadcast": _broadcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "compare": _compare,
    "complex": _complex,
    "constant": _constant,
    "convert": _convert,
    "iota": _iota,
    "map": _map,
    "optimization_barrier": _optimization_barrier,
    "reduce_precision": _reduce_precision,
    "reshape": _reshape,
    "reverse": _reverse,
    "select": _select,
    "transpose": _transpose,
}
