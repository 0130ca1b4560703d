"""Which dims of the values of layers grow with the microbatch, and the same layers for another number of rows.

A batch argument has one row for each example in dim 0. From there sharding rules say which dims of other values are that dim,
or have it as a part: ``[8, 1024, 64] -> [8192, 64]`` makes a dim of 8 rows by 1024. Dims are followed through all ops, from
operands to results and back: the zeros that a select reads have as many rows as the value that it takes the others from.
Nothing follows from constants, which ops may share that read them in different ways. What a program makes of the number of
rows while it is traced, and no value has as a dim of its rows, is taken to stay as it is.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from bactrian.passes.frame.errors import OtherSizeError
from bactrian.passes.pipelining.layers import LayerProgram
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.sharding_rules import Rule

_Parts = tuple[tuple[int, bool], ...]
"""What a dim is made of, the major part first: sizes, and whether they grow with the rows. 8 rows by 1024 are one part, which
grows; parts of one that don't are left out."""

Shape = tuple[int, ...]


class _InexactError(Exception):
    """Rows can't be followed."""


@dataclass
class BatchDims:
    """The dims of one layer.

    Attributes:
        program: of the layer.
        rules: of its ops, also of those that are free.
        parts: what dims are made of, as far as it is known, by value.
        constants: values that depend on nothing.
    """

    program: LayerProgram
    rules: tuple[Rule, ...]
    parts: dict[int, list[_Parts | None]] = field(default_factory=dict[int, "list[_Parts | None]"])
    constants: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        problem = self.program.problem
        self.constants = frozenset(value for op in problem.ops if op.rule is None for value in op.results)
        self.parts = {number: [None] * len(value.shape) for number, value in enumerate(problem.values)}
        for number, role in zip(problem.inputs, self.program.roles, strict=True):
            shape = problem.values[number].shape
            if role == "batch":
                self._set(number, 0, ((shape[0], True),))
            if role in ("state", "batch", "constant"):
                for dim in range(role == "batch", len(shape)):
                    self._set(number, dim, _fixed(shape[dim]))

    def follow(self) -> bool:
        """Follow dims through all ops until nothing new is found; whether anything was."""
        ops = list(zip(self.program.problem.ops, self.rules, strict=True))
        found = False
        while sum([self._follow_op((*op.operands, *op.results), rule) for op, rule in ops]):
            found = True
            if not sum([self._follow_op((*op.operands, *op.results), rule) for op, rule in reversed(ops)]):
                break
        return found

    def borders(self, *, inputs: bool) -> Iterator[tuple[int, Shape]]:
        """Border values that come in, or those that go out, with their shapes."""
        for border in self.program.borders:
            if border.is_input == inputs:
                yield border.value, self.program.problem.values[border.value].shape

    def take(self, value: int, dims: Sequence[_Parts | None]) -> bool:
        """Say what the dims of a value are made of; whether that is new."""
        return sum(parts is not None and self._set(value, dim, parts) for dim, parts in enumerate(dims)) > 0

    def scaled(self, rows: int, new_rows: int, seconds: Sequence[float]) -> LayerProgram:
        """The layer's program for another number of rows.

        Args:
            rows, new_rows: as they are, and as they will be.
            seconds: of its ops, with these shapes.

        Raises:
            OtherSizeError: an op reads rows in a way that can't be scaled.
        """
        problem = self.program.problem
        shapes = self.shapes(rows, new_rows)
        growth = [math.prod(new) / math.prod(old.shape) for new, old in zip(shapes, problem.values, strict=True)]
        values = tuple(
            replace(value, shape=shape, nbytes=round(value.nbytes * more))
            for value, shape, more in zip(problem.values, shapes, growth, strict=True)
        )
        ops = list(problem.ops)
        for number, (op, rule) in enumerate(zip(problem.ops, self.rules, strict=True)):
            with _telling(rows, new_rows):
                made = self._scaled_rule((*op.operands, *op.results), rule, rows, new_rows, shapes)
            ops[number] = replace(op, seconds=seconds[number], rule=None if op.rule is None else made)
        loads = tuple((value, took * growth[value]) for value, took in problem.loads)
        return replace(self.program, problem=replace(problem, values=values, ops=tuple(ops), loads=loads))

    def shapes(self, rows: int, new_rows: int) -> list[Shape]:
        """Of all values, for another number of rows."""
        values = self.program.problem.values
        return [
            tuple(
                _size(parts, rows, new_rows) if parts is not None else size
                for size, parts in zip(value.shape, self.parts[number], strict=True)
            )
            for number, value in enumerate(values)
        ]

    def _set(self, value: int, dim: int, parts: _Parts) -> bool:
        known, size = self.parts[value][dim], self.program.problem.values[value].shape[dim]
        if math.prod(part for part, _ in parts) != size:
            raise _InexactError(f"a dim of {size} is made of {parts}")
        if known is not None and value in self.constants:
            return False
        if known is not None and known != parts:
            raise _InexactError(f"a dim of {size} has rows of the batch in one op and not in another")
        self.parts[value][dim] = parts
        return known is None

    def _factors(self, values: Sequence[int], rule: Rule) -> dict[int, _Parts]:
        """What the factors of an op are made of, as far as it is known; of those that it takes a part of only that they have
        no rows of the batch."""
        found: dict[int, _Parts] = {}
        is_constant = self.constants.issuperset(values)
        for value, dim, factors in self._dims(values, rule):
            parts = self.parts[value][dim]
            if parts is None or (value in self.constants and not is_constant):
                continue
            sizes = [rule.sizes[factor] for factor in factors]
            if (
                math.prod(sizes) != self.program.problem.values[value].shape[dim]
            ):  # of a slice, a window, a concatenation
                if any(grows for _, grows in parts):
                    raise _InexactError(f"an op takes a part of a dim of {math.prod(sizes)} that has rows of the batch")
                split = [_fixed(size) for size in sizes]
            else:
                split = _split(parts, sizes)
            for factor, part in zip(factors, split, strict=True):
                if found.setdefault(factor, part) != part and not is_constant:
                    raise _InexactError(f"a factor of {rule.sizes[factor]} has rows of the batch in one operand alone")
        return found

    def _dims(self, values: Sequence[int], rule: Rule) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """The dims of an op's values, and the factors of each."""
        for value, dims in zip(values, (*rule.operands, *rule.results), strict=False):
            for dim, factors in enumerate(dims):
                yield value, dim, factors

    def _follow_op(self, values: Sequence[int], rule: Rule) -> int:
        """Say what is known of an op's factors of all its values; how many dims of them are new."""
        known, new = self._factors(values, rule), 0
        for value, dim, factors in self._dims(values, rule):
            if not all(factor in known for factor in factors):
                continue
            size, parts = self.program.problem.values[value].shape[dim], _joined([known[factor] for factor in factors])
            if math.prod(rule.sizes[factor] for factor in factors) == size:
                new += self._set(value, dim, parts)
            elif not any(grows for _, grows in parts):
                new += self._set(value, dim, _fixed(size))
        return new

    def _scaled_rule(
        self, values: Sequence[int], rule: Rule, rows: int, new_rows: int, shapes: Sequence[Shape]
    ) -> Rule:
        known = self._factors(values, rule)
        sizes = tuple(
            _size(known[factor], rows, new_rows) if factor in known else size for factor, size in enumerate(rule.sizes)
        )
        halos = tuple(_scaled_halo(halo, shapes[values[halo.operand]]) for halo in rule.halos)
        return replace(rule, sizes=sizes, halos=halos)


def follow_rows(layers: Sequence[BatchDims], rows: int, new_rows: int) -> None:
    """Find the dims that have rows of the batch in all layers of a program.

    Border values of one shape have them in the same dims.

    Args:
        layers: one of each kind.
        rows, new_rows: in a microbatch, as it is and as it will be.

    Raises:
        OtherSizeError: they can't be told, or the other number of rows does not fit.
    """
    with _telling(rows, new_rows):
        if rows == 1:
            raise _InexactError("dims of one row look like other dims of one")
        borders: dict[Shape, list[_Parts | None]] = {}
        more = True
        while more:
            more = False
            for layer in layers:
                for value, shape in layer.borders(inputs=True):
                    more |= shape in borders and layer.take(value, borders[shape])
                more |= layer.follow()
                for value, shape in layer.borders(inputs=False):
                    known = borders.setdefault(shape, [None] * len(shape))
                    borders[shape] = [
                        new if old is None else old for old, new in zip(known, layer.parts[value], strict=True)
                    ]
        if any(None in layer.parts[value] for layer in layers for value, _ in layer.borders(inputs=True)):
            raise _InexactError("some dims of what layers give each other are not known")
        for layer in layers:
            layer.shapes(rows, new_rows)


@contextmanager
def _telling(rows: int, new_rows: int) -> Generator[None]:
    """What can't be followed in the block is an error for the user."""
    try:
        yield
    except _InexactError as error:
        raise OtherSizeError(
            f"cannot tell what layers take with {new_rows} rows in a microbatch from what they take with {rows}",
            why=str(error),
            fix=f"trace the step with microbatches of {new_rows} rows",
        ) from None


def _scaled_halo(halo: Halo, shape: Shape) -> Halo:
    """How an operand of another shape is read along a dim: rows of the batch are read one by one."""
    old, size = halo.shape[halo.dim], shape[halo.dim]
    if size == old:
        return replace(halo, shape=shape)
    if (halo.advance, halo.overlap, halo.padding, halo.dilation) != (old, 0, 0, 1):
        raise _InexactError(f"a dim of {old} that has rows of the batch is read through windows")
    return replace(halo, shape=shape, advance=size)


def _fixed(size: int) -> _Parts:
    return ((size, False),) if size > 1 else ()


def _size(parts: _Parts, rows: int, new_rows: int) -> int:
    """The size of a dim with another number of rows."""
    size = 1
    for part, grows in parts:
        if grows and part * new_rows % rows:
            raise _InexactError(f"a dim of {part} for {rows} rows would be {part * new_rows / rows:g}")
        size *= part * new_rows // rows if grows else part
    return size


def _joined(factors: Sequence[_Parts]) -> _Parts:
    """One dim of several factors: what does not grow is one part with what is before it."""
    found = list[tuple[int, bool]]()
    for size, grows in (part for parts in factors for part in parts):
        if found and not grows:
            found[-1] = found[-1][0] * size, found[-1][1]
        else:
            found.append((size, grows))
    return tuple(found)


def _split(parts: _Parts, sizes: Sequence[int]) -> list[_Parts]:
    """What each factor of a dim is made of. A part that grows stays with the major factor: rows are grouped."""
    left, found = list(parts), list[_Parts]()
    for size in sizes:
        own, need = list[tuple[int, bool]](), size
        while need > 1:
            if not left:
                raise _InexactError(f"a dim of {parts} is split into {tuple(sizes)}")
            part, grows = left.pop(0)
            common = part if need % part == 0 else need
            if part % common:
                raise _InexactError(f"a dim of {parts} is split into {tuple(sizes)}")
            own.append((common, grows))
            need //= common
            if part > common:
                left.insert(0, (part // common, False))
        found.append(_joined([tuple(own)]))
    return found
