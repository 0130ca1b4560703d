"""Sharding rules: how the dims of an op's operands and results belong together. A copy of Shardy's without MLIR."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from bactrian.passes.spmd.halo import Halo

Dims = tuple[tuple[int, ...], ...]
"""For each dim of a tensor the factors that it is made of, the major one first."""


class Combining(enum.Enum):
    """How devices combine what each has reduced of its shard."""

    SUM = "sum"  # by an all-reduce, or by reduce-scatters
    FOLD = "fold"  # by an all-reduce
    GATHER = "gather"  # by an all-gather of each result, which every device reduces again


@dataclass(frozen=True)
class Rule:
    """The factors of an op (``sdy.op_sharding_rule``).

    For a matrix product: ``Rule((8, 16, 4), operands=(((0,), (1,)), ((1,), (2,))), results=(((0,), (2,)),),
    reduction=frozenset({1}))``.

    Attributes:
        sizes: of each factor.
        operands, results: of each tensor the factors of its dims.
        reduction: factors that the op sums over: they are in operands only.
        replicated: factors that every device needs all of.
        permuted: factors of which a device needs some of its neighbours' part, nobody knows how much.
        combining: how devices combine what they have reduced.
        halos: how operands are read along factors with windows, of which a device needs its neighbours' rows.
        mirrored: factors of which a device makes the part that lies as far from the other end as its own.
    """

    sizes: tuple[int, ...]
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    reduction: frozenset[int] = frozenset()
    replicated: frozenset[int] = frozenset()
    permuted: frozenset[int] = frozenset()
    combining: Combining = Combining.SUM
    halos: tuple[Halo, ...] = ()
    mirrored: frozenset[int] = frozenset()

    def factor_of(self, halo: Halo) -> int:
        """The factor of the dim that a halo is read along."""
        return self.operands[halo.operand][halo.dim][0]


def elementwise(shape: tuple[int, ...], num_operands: int) -> Rule:
    """The rule of an op that treats each position on its own."""
    dims: Dims = tuple((factor,) for factor in range(len(shape)))
    return Rule(shape, (dims,) * num_operands, (dims,))


def replicated_rule(operands: tuple[tuple[int, ...], ...], results: tuple[tuple[int, ...], ...]) -> Rule:
    """The rule of an op without one: every device does all of it."""
    sizes = list[int]()

    def dims(shape: tuple[int, ...]) -> Dims:
        first = len(sizes)
        sizes.extend(shape)
        return tuple((first + dim,) for dim in range(len(shape)))

    ins, outs = tuple(dims(shape) for shape in operands), tuple(dims(shape) for shape in results)
    return Rule(tuple(sizes), ins, outs, replicated=frozenset(range(len(sizes))))
