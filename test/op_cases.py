"""One StableHLO op with random shapes, attributes and values: what the cases of all kinds of ops are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray  # of any element type
Shape = tuple[int, ...]

DTYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i8": np.dtype(np.int8),
    "i16": np.dtype(np.int16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "ui8": np.dtype(np.uint8),
    "ui32": np.dtype(np.uint32),
    "ui64": np.dtype(np.uint64),
    "i1": np.dtype(np.bool_),
    "complex<f32>": np.dtype(np.complex64),
    "complex<f64>": np.dtype(np.complex128),
}
"""NumPy's element types by MLIR's names."""

FLOATS = ("f32", "f32", "bf16", "f16", "f64")
INTEGERS = ("i32", "i8", "ui8", "ui32", "i64", "i16")
COMPLEX = ("complex<f32>", "complex<f64>")
NUMBERS = (*FLOATS, *INTEGERS, *COMPLEX)
BITS = (*INTEGERS, "i1")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DIMS = (8, 8, 12, 6, 4, 4, 2, 3, 1, 5, 24, 16)
_MOST_ELEMENTS = 3000


@dataclass(frozen=True)
class Type:
    """Of a tensor: its shape, and MLIR's name of its elements' type."""

    shape: Shape
    element: str

    def __str__(self) -> str:
        return f"tensor<{''.join(f'{size}x' for size in self.shape)}{self.element}>"


@dataclass(frozen=True)
class Case:
    """One op.

    Attributes:
        name: of the op, without dialect.
        operands: what the op reads.
        results: the types of what it makes.
        attributes: in MLIR's generic form, without braces.
        regions: the text between the braces of each; ``$2`` is the operand number 2.
        captured: how many of the last operands only regions read.
        tolerance: 0 where shards give the same bits as the whole; else how far a result may be off, relative to its
            largest element.
        adds: whether results are sums: over devices these may lose the sign of a zero.
        unreduced: whether the result may stay unreduced.
    """

    name: str
    operands: tuple[Array, ...]
    results: tuple[Type, ...]
    attributes: str = ""
    regions: tuple[str, ...] = ()
    tolerance: float = 0.0
    adds: bool = False
    unreduced: bool = False
    captured: int = 0

    @property
    def reads(self) -> list[Type]:
        """The types of the operands."""
        return [type_of(value) for value in self.operands]

    def line(self, result: str, operands: Sequence[str], more: str = "") -> str:
        """The op in MLIR's generic form.

        Args:
            result: its name; several results are ``result#0`` and so on.
            operands: their names.
            more: further attributes.
        """
        count = f":{len(self.results)}" if len(self.results) > 1 else ""
        regions = ", ".join(f"{{{text}}}" for text in self.regions)
        for number, name in enumerate(operands):
            regions = regions.replace(f"${number}", name)
        direct = len(operands) - self.captured
        return (
            f'{result}{count} = "stablehlo.{self.name}"({", ".join(operands[:direct])})'
            + (f" <{{{self.attributes}}}>" if self.attributes else "")
            + (f" ({regions})" if regions else "")
            + (f" {{{more}}}" if more else "")
            + f" : ({', '.join(map(str, self.reads[:direct]))}) -> ({', '.join(map(str, self.results))})"
        )

    def names(self, result: str) -> list[str]:
        """The names of its results."""
        return [result] if len(self.results) == 1 else [f"{result}#{at}" for at in range(len(self.results))]

    def module(self) -> str:
        """A module with this op alone."""
        return one_device_module([self])


def one_device_module(cases: Sequence[Case]) -> str:
    """A module whose ``@main`` has all these ops, each on arguments of its own."""
    arguments, lines, results, types = list[str](), list[str](), list[str](), list[str]()
    for number, case in enumerate(cases):
        mine = [f"%a{number}_{at}" for at in range(len(case.operands))]
        arguments += [f"{name}: {type_}" for name, type_ in zip(mine, case.reads, strict=True)]
        lines.append("  " + case.line(f"%r{number}", mine))
        results += case.names(f"%r{number}")
        types += map(str, case.results)
    body = "\n".join(lines)
    every = ", ".join(types)
    signature = f"func.func @main({', '.join(arguments)}) -> ({every})"
    return f"module @ops {{\n{signature} {{\n{body}\n  return {', '.join(results)} : {every}\n}}\n}}"


def type_of(value: Array) -> Type:
    """Of an operand."""
    return Type(tuple(value.shape), _NAMES[value.dtype])


def shape(random: np.random.Generator, least: int = 0, most: int = 3) -> Shape:
    """A shape of ``least`` to ``most`` dims; a few have a dim of size 0."""
    rank = int(random.integers(least, most + 1))
    dims = [int(random.choice(_DIMS)) for _ in range(rank)]
    while math.prod(dims) > _MOST_ELEMENTS:
        dims[int(random.integers(rank))] = int(random.choice((1, 2, 3, 4)))
    if rank and random.integers(40) == 0:
        dims[int(random.integers(rank))] = 0
    return tuple(dims)


def pick(random: np.random.Generator, names: Sequence[str]) -> str:
    """One of these."""
    return names[int(random.integers(len(names)))]


def whole_numbers(random: np.random.Generator, shape: Shape, element: str, most: int = 2) -> Array:
    """Small whole numbers, of which all sums of some hundred products are exact in every type."""
    if element == "i1":
        return random.integers(0, 2, shape).astype(np.bool_)
    low = 0 if element.startswith("ui") else -most
    numbers = random.integers(low, most + 1, shape)
    if element in COMPLEX:
        return (numbers + 1j * random.integers(low, most + 1, shape)).astype(DTYPES[element])
    made = np.asarray(numbers).astype(DTYPES[element])
    if element in FLOATS:
        made = np.where((made == 0) & (random.random() < 0.5), np.asarray(-0.0, made.dtype), made)
    return made


def any_numbers(random: np.random.Generator, shape: Shape, element: str) -> Array:
    """Numbers of all sizes; of floats also NaN, infinities and minus zero."""
    dtype = DTYPES[element]
    if element in COMPLEX:
        part = "f32" if element == "complex<f32>" else "f64"
        return np.asarray(plain_numbers(random, shape, part) + 1j * plain_numbers(random, shape, part)).astype(dtype)
    if element in FLOATS:
        made = np.asarray(random.normal(size=shape) * 10.0 ** random.integers(-3, 3, shape))
        odd = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, -1.0])[random.integers(7, size=shape)]
        return np.where(random.random(shape) < 0.2, odd, made).astype(dtype)
    if element == "i1":
        return random.integers(0, 2, shape).astype(np.bool_)
    info = np.iinfo(dtype)
    wide = random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    return np.where(random.random(shape) < 0.5, wide, whole_numbers(random, shape, element, 9)).astype(dtype)


def plain_numbers(random: np.random.Generator, shape: Shape, element: str) -> Array:
    """Floats between -2 and 2."""
    if element in COMPLEX:
        return np.asarray(random.uniform(-2, 2, shape) + 1j * random.uniform(-2, 2, shape)).astype(DTYPES[element])
    return np.asarray(random.uniform(-2, 2, shape)).astype(DTYPES[element])


def epsilon(element: str) -> float:
    """The distance from 1 to the next number of the type; 0 of integers."""
    if element in COMPLEX:
        return float(np.finfo(DTYPES[element]).eps)
    return float(ml_dtypes.finfo(DTYPES[element]).eps) if element in FLOATS else 0.0


def i64_array(numbers: Sequence[int]) -> str:
    """The text of an attribute.

    >>> i64_array([1, 2])
    'array<i64: 1, 2>'
    """
    return f"array<i64: {', '.join(map(str, numbers))}>" if numbers else "array<i64>"


def dense(numbers: np.ndarray) -> str:
    """The text of a dense attribute of ``i64``."""
    return f"dense<{numbers.tolist()}> : tensor<{'x'.join(map(str, numbers.shape))}xi64>"


def fold_region(fold: str, element: str) -> str:
    """A region that folds two scalars with an op."""
    scalar = f"tensor<{element}>"
    return (
        f'^bb0(%x: {scalar}, %y: {scalar}): %z = "stablehlo.{fold}"(%x, %y) : ({scalar}, {scalar}) -> {scalar} '
        f'"stablehlo.return"(%z) : ({scalar}) -> ()'
    )


Generator = Callable[[np.random.Generator], Case]
