"""Random cases of products and reductions."""

from __future__ import annotations

import math

import numpy as np
from op_cases import (
    BITS,
    COMPLEX,
    FLOATS,
    NUMBERS,
    Case,
    Generator,
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

_SIZES = (8, 4, 6, 12, 2, 3, 1, 5, 16)


def _summands(
    random: np.random.Generator, shapes: tuple[tuple[int, ...], ...], element: str, terms: int
) -> tuple[tuple[np.ndarray, ...], float]:
    """Operands of sums, and how far the sum may be off: whole numbers, whose sums are exact, or floats."""
    # Of 8 bits' precision sums up to 256 are exact.
    most = 2 if element != "bf16" or terms <= 60 else 1
    if element in ("f32", "f64", "complex<f32>") and random.integers(3) == 0:
        return tuple(plain_numbers(random, each, element) for each in shapes), 4 * max(terms, 4) * epsilon(element)
    return tuple(whole_numbers(random, each, element, most) for each in shapes), 0.0


def _dot_general(random: np.random.Generator) -> Case:
    """Batch, contracting and free dims, several of each, in any order."""
    element = pick(random, (*NUMBERS, "f32", "i1"))
    batch, contracting = ([int(random.choice(_SIZES)) for _ in range(random.integers(0, 3))] for _ in range(2))
    free = [[int(random.choice(_SIZES)) for _ in range(random.integers(0, 3))] for _ in range(2)]
    while math.prod(batch + contracting) * max(math.prod(free[0]), math.prod(free[1])) > 3000:
        longest = max((*free, batch, contracting), key=lambda dims: max(dims, default=0))
        longest[longest.index(max(longest))] = 2
    if random.integers(30) == 0 and contracting:
        contracting[0] = 0
    sides, numbers, kept = list[tuple[int, ...]](), list[tuple[list[int], list[int]]](), list[int]()
    for rest in free:
        dims = [*batch, *contracting, *rest]
        order = [int(each) for each in random.permutation(len(dims))]
        sides.append(tuple(dims[each] for each in order))
        places = [order.index(each) for each in range(len(dims))]
        used = len(batch) + len(contracting)
        numbers.append((places[: len(batch)], places[len(batch) : used]))
        kept += [dims[each] for each in order if each >= used]
    (left_batch, left_sum), (right_batch, right_sum) = numbers
    attributes = (
        f"dot_dimension_numbers = #stablehlo.dot<lhs_batching_dimensions = {left_batch}, "
        f"rhs_batching_dimensions = {right_batch}, lhs_contracting_dimensions = {left_sum}, "
        f"rhs_contracting_dimensions = {right_sum}>"
    )
    made = element
    if element in ("bf16", "f16") and random.integers(2):
        made = "f32"
    if element == "i8" and random.integers(2):
        made = "i32"
    operands, off = _summands(random, (sides[0], sides[1]), element, math.prod(contracting))
    result = Type((*batch, *kept), made)
    return Case("dot_general", operands, (result,), attributes, tolerance=off, adds=True, unreduced=True)


def _dot(random: np.random.Generator) -> Case:
    element, (rows, inner, columns) = pick(random, ("f32", "i32", "f64")), random.choice(_SIZES, 3).tolist()
    left, right = ((rows, inner), (inner, columns))
    if random.integers(2):
        left = left[1:]
    if random.integers(2):
        right = right[:1]
    operands, off = _summands(random, (left, right), element, inner)
    return Case("dot", operands, (Type((*left[:-1], *right[1:]), element),), tolerance=off, adds=True, unreduced=True)


_FOLDS = {
    "add": (*NUMBERS, "f32", "f32", "i1"),
    "multiply": ("f32", "f64", "i32", "ui8", "complex<f32>"),
    "maximum": (*FLOATS, *BITS),
    "minimum": (*FLOATS, *BITS),
    "and": BITS,
    "or": BITS,
    "xor": BITS,
}


def _reduced_dims(random: np.random.Generator, dims: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    count = int(random.integers(0 if random.integers(8) == 0 else 1, len(dims) + 1))
    reduced = sorted(int(dim) for dim in random.permutation(len(dims))[:count])
    return reduced, tuple(size for dim, size in enumerate(dims) if dim not in reduced)


def _reduce(random: np.random.Generator) -> Case:
    """One fold, or several values at once; the initial value is an identity or none."""
    if random.integers(3) == 0:
        return (_reduce_pairs, _reduce_unknown, _reduce_separately)[random.integers(3)](random)
    fold, dims = pick(random, tuple(_FOLDS)), shape(random, 1, 4)
    element = pick(random, _FOLDS[fold])
    reduced, made = _reduced_dims(random, dims)
    terms = math.prod(dims[dim] for dim in reduced)
    if fold == "add":
        (operand,), off = _summands(random, (dims,), element, terms)
        initial = whole_numbers(random, (), element) if random.integers(2) else whole_numbers(random, (), element, 0)
    elif fold == "multiply":
        operand, initial, off = whole_numbers(random, dims, element, 1), whole_numbers(random, (), element, 3), 0.0
        if element in FLOATS:
            operand = np.where(operand == 0, 2, operand).astype(operand.dtype)
    else:
        operand, initial, off = any_numbers(random, dims, element), any_numbers(random, (), element), 0.0
    return Case(
        "reduce", (operand, initial), (Type(made, element),), f"dimensions = {i64_array(reduced)}",
        (fold_region(fold, element),), off, adds=fold == "add" or element in COMPLEX,
        unreduced=fold == "add" and element in FLOATS,
    )  # fmt: skip


def _reduce_pairs(random: np.random.Generator) -> Case:
    """The largest or smallest value and its index, of equal ones the first."""
    dims, element, direction = shape(random, 1, 3), pick(random, ("f32", "i32", "bf16")), pick(random, ("GT", "LT"))
    reduced, made = _reduced_dims(random, dims)
    values = whole_numbers(random, dims, element, 3)
    numbers = np.asarray(random.permutation(max(1, values.size))[: values.size].reshape(dims)).astype(np.int32)
    scalar, index = f"tensor<{element}>", "tensor<i32>"
    kind = "SIGNED" if element == "i32" else "FLOAT"
    pair = f"{scalar}, {index}"
    body = f"""^bb0(%x: {scalar}, %i: {index}, %y: {scalar}, %j: {index}):
      %g = "stablehlo.compare"(%x, %y) <{{comparison_direction = #stablehlo<comparison_direction {direction}>, compare_type = #stablehlo<comparison_type {kind}>}}> : ({scalar}, {scalar}) -> tensor<i1>
      %e = "stablehlo.compare"(%x, %y) <{{comparison_direction = #stablehlo<comparison_direction EQ>, compare_type = #stablehlo<comparison_type {kind}>}}> : ({scalar}, {scalar}) -> tensor<i1>
      %l = "stablehlo.compare"(%i, %j) <{{comparison_direction = #stablehlo<comparison_direction LT>, compare_type = #stablehlo<comparison_type SIGNED>}}> : ({index}, {index}) -> tensor<i1>
      %t = "stablehlo.and"(%e, %l) : (tensor<i1>, tensor<i1>) -> tensor<i1>
      %o = "stablehlo.or"(%g, %t) : (tensor<i1>, tensor<i1>) -> tensor<i1>
      %v = "stablehlo.select"(%o, %x, %y) : (tensor<i1>, {scalar}, {scalar}) -> {scalar}
      %k = "stablehlo.select"(%o, %i, %j) : (tensor<i1>, {index}, {index}) -> {index}
      "stablehlo.return"(%v, %k) : ({pair}) -> ()"""
    initial = np.asarray(-9 if direction == "GT" else 9).astype(values.dtype), np.zeros((), np.int32)
    attributes = f"dimensions = {i64_array(reduced)}"
    return Case("reduce", (values, numbers, *initial), (Type(made, element), Type(made, "i32")), attributes, (body,))


def _reduce_separately(random: np.random.Generator) -> Case:
    """A sum and a maximum in one op."""
    dims = shape(random, 1, 3)
    reduced, made = _reduced_dims(random, dims)
    operands = whole_numbers(random, dims, "f32"), any_numbers(random, dims, "i32")
    one, two = "tensor<f32>", "tensor<i32>"
    body = f"""^bb0(%x: {one}, %i: {two}, %y: {one}, %j: {two}):
      %s = "stablehlo.add"(%x, %y) : ({one}, {one}) -> {one}
      %m = "stablehlo.maximum"(%i, %j) : ({two}, {two}) -> {two}
      "stablehlo.return"(%s, %m) : ({one}, {two}) -> ()"""
    initial = np.zeros((), np.float32), np.asarray(np.iinfo(np.int32).min, np.int32)
    return Case(
        "reduce", (*operands, *initial), (Type(made, "f32"), Type(made, "i32")),
        f"dimensions = {i64_array(reduced)}", (body,),
    )  # fmt: skip


def _reduce_unknown(random: np.random.Generator) -> Case:
    """A fold that is no single op: the larger of the absolute values, with its sign lost. Its identity is the initial value."""
    dims, element = shape(random, 1, 3), pick(random, ("f32", "i32"))
    reduced, made = _reduced_dims(random, dims)
    scalar = f"tensor<{element}>"
    body = f"""^bb0(%x: {scalar}, %y: {scalar}):
      %a = "stablehlo.abs"(%x) : ({scalar}) -> {scalar}
      %b = "stablehlo.abs"(%y) : ({scalar}) -> {scalar}
      %m = "stablehlo.maximum"(%a, %b) : ({scalar}, {scalar}) -> {scalar}
      "stablehlo.return"(%m) : ({scalar}) -> ()"""
    operands = whole_numbers(random, dims, element, 100), whole_numbers(random, (), element, 0)
    return Case("reduce", operands, (Type(made, element),), f"dimensions = {i64_array(reduced)}", (body,))


GENERATORS: dict[str, Generator] = {"dot": _dot, "dot_general": _dot_general, "reduce": _reduce}
