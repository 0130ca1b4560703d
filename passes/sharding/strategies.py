"""The choices of an op: which axes of the mesh go over which factors of its rule, and what becomes of partial sums."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.spmd.halo import RowsSent, halo_sends
from bactrian.passes.spmd.reshard_paths import Reduction, all_gathered, all_reduced, local_bytes, scatters_over
from bactrian.passes.spmd.sharding_rules import Combining, Dims, Rule


class Defers(enum.Enum):
    """What an op does with partial sums that are reduced later."""

    NOT = "not"
    STARTS = "starts"  # it sums, and can leave its result unreduced
    PASSES = "passes"  # it makes partial sums of partial sums


@dataclass(frozen=True)
class Exchange:
    """What devices send each other for an op besides its reductions: one collective permute.

    Attributes:
        send: the rows and bytes.
        axes: of the mesh along which they are sent.
        seconds: what it takes.
    """

    send: RowsSent
    axes: tuple[str, ...]
    seconds: float
    kind: ClassVar[str] = "collective_permute"


@dataclass(frozen=True)
class Strategy:
    """One way to carry out an op.

    Attributes:
        factors: for each axis of the mesh the factor that it shards, or None: the work is done along it again.
        operands: how the operands must be sharded.
        partial: how the results are sharded before ``reductions``. Where they are left unreduced, no reduction follows.
        results: how they are sharded in the end.
        reductions: in their order.
        num_shards: how many devices share the work.
        exchanges: of halos before the work, or of shards after it.
    """

    factors: tuple[int | None, ...]
    operands: tuple[Spec, ...]
    partial: tuple[Spec, ...]
    results: tuple[Spec, ...]
    reductions: tuple[Reduction, ...]
    num_shards: int
    exchanges: tuple[Exchange, ...] = ()

    @property
    def reduction_seconds(self) -> float:
        """Of all reductions."""
        return sum(each.seconds for each in self.reductions)

    @property
    def sending_seconds(self) -> float:
        """Of all that devices exchange for the op."""
        return self.reduction_seconds + sum(each.seconds for each in self.exchanges)


@lru_cache(maxsize=4096)
def strategies(
    rule: Rule,
    result_bytes: tuple[float, ...],
    mesh: Mesh,
    shapes: tuple[tuple[int, ...] | None, ...] | None = None,
    defers: Defers = Defers.NOT,
) -> tuple[Strategy, ...]:
    """All strategies of an op; the first does everything on every device.

    Axes of one factor cut it in the mesh's order. A factor inside of a dim is cut only if those before it are cut to
    shards of one: no spec has strides.

    Args:
        rule: of the op.
        result_bytes: bytes of each whole result.
        mesh: the devices.
        shapes: of the results, where they may be scattered along all their dims, and None for one that is not to be
            scattered. By default each is, along the dims that the op itself can cut.
        defers: whether results may be left unreduced, to be added up later.
    """
    cuttable = [None, *(f for f in range(len(rule.sizes)) if f not in rule.replicated | rule.permuted)]
    choices = [cuttable if axis.size > 1 else [None] for axis in mesh.axes]
    found = list[Strategy]()
    if shapes is None:
        shapes = tuple(_cut_shape(rule, dims) for dims in rule.results)
    for factors in itertools.product(*choices):
        axes_of: dict[int, tuple[str, ...]] = {}
        for axis, factor in zip(mesh.axes, factors, strict=True):
            if factor is not None:
                axes_of[factor] = (*axes_of.get(factor, ()), axis.name)
        if any(rule.sizes[factor] % mesh.group_size(axes) for factor, axes in axes_of.items()):
            continue
        operands = _specs(rule.operands, rule, axes_of, mesh)
        partial = _specs(rule.results, rule, axes_of, mesh)
        if operands is None or partial is None:
            continue
        exchanges = _exchanges(rule, operands, axes_of, result_bytes, mesh)
        if exchanges is None:
            continue
        num_shards = mesh.group_size(axis for axes in axes_of.values() for axis in axes)
        named = list(zip(mesh.axes, factors, strict=True))
        reduced = [axis.name for axis, factor in named if factor in rule.reduction]
        for results, reductions in _reductions(rule.combining, reduced, partial, result_bytes, mesh, shapes):
            found.append(Strategy(factors, operands, partial, results, reductions, num_shards, exchanges))
        if reduced and defers is Defers.STARTS:
            left = (Spec(partial[0].dims, tuple(reduced)),)
            found.append(Strategy(factors, operands, left, left, (), num_shards, exchanges))
        if defers is Defers.PASSES:
            free = [axis.name for axis, factor in named if factor is None and axis.size > 1]
            for count in range(1, len(free) + 1):
                for axes in itertools.combinations(free, count):
                    read = tuple(Spec(spec.dims, axes) for spec in operands)
                    left = (Spec(partial[0].dims, axes),)
                    found.append(Strategy(factors, read, left, left, (), num_shards))
    return tuple(found)


def _specs(
    tensors: Sequence[Dims], rule: Rule, axes_of: dict[int, tuple[str, ...]], mesh: Mesh
) -> tuple[Spec, ...] | None:
    """The tensors' specs; None where a shard would have strides."""
    specs = list[Spec]()
    for dims in tensors:
        made = list[tuple[str, ...]]()
        for dim in dims:
            axes = tuple[str, ...]()
            open_ = True  # every factor so far is split into shards of one
            for factor in dim:
                mine = axes_of.get(factor, ())
                if mine and not open_:
                    return None
                axes += mine
                open_ = open_ and mesh.group_size(mine) == rule.sizes[factor]
            made.append(axes)
        specs.append(Spec(tuple(made)))
    return tuple(specs)


def _exchanges(
    rule: Rule,
    operands: tuple[Spec, ...],
    axes_of: dict[int, tuple[str, ...]],
    result_bytes: tuple[float, ...],
    mesh: Mesh,
) -> tuple[Exchange, ...] | None:
    """What devices exchange; None where they would need rows of shards that are no neighbours."""
    cut = [halo for halo in rule.halos if rule.factor_of(halo) in axes_of]
    if not all(halo.is_near(mesh.group_size(axes_of[rule.factor_of(halo)])) for halo in cut):
        return None
    found = list[Exchange]()
    for send in halo_sends(cut, lambda operand, dim: mesh.group_size(operands[operand].dims[dim])):
        axes = operands[send.operand].dims[send.dim]
        found.append(Exchange(send, axes, _permute_seconds(send.nbytes, axes, mesh)))
    mirrored = [axes_of[factor] for factor in sorted(rule.mirrored) if factor in axes_of]
    if mirrored:
        axes = tuple(axis for each in mirrored for axis in each)
        dim = next(at for at, each in enumerate(operands[0].dims) if each == mirrored[0])
        nbytes = local_bytes(result_bytes[0], operands[0], mesh)
        send = RowsSent(0, dim, rule.sizes[dim] // mesh.group_size(mirrored[0]), nbytes, key=None)
        found.append(Exchange(send, axes, _permute_seconds(nbytes, axes, mesh)))
    return tuple(found)


def _permute_seconds(nbytes: float, axes: Sequence[str], mesh: Mesh) -> float:
    return max(mesh.by_name[axis].permute(nbytes) for axis in axes)


def _reductions(
    combining: Combining,
    axes: list[str],
    partial: tuple[Spec, ...],
    result_bytes: tuple[float, ...],
    mesh: Mesh,
    shapes: Sequence[tuple[int, ...] | None],
) -> Iterator[tuple[tuple[Spec, ...], tuple[Reduction, ...]]]:
    """The ways to reduce over ``axes``: one all-reduce, or of a result a scatter along each, which leaves less for the
    next. All axes of one result are reduced in the same way."""
    if not axes:
        yield partial, ()
        return
    held = [local_bytes(nbytes, spec, mesh) for nbytes, spec in zip(result_bytes, partial, strict=True)]
    if combining is Combining.GATHER:
        yield partial, (all_gathered(axes, held, mesh),)
        return
    yield partial, (all_reduced(axes, held, mesh),)
    if combining is Combining.FOLD:
        return
    ways = [
        [] if shape is None else list(scatters_over(shape, spec, axes, nbytes, mesh))
        for spec, nbytes, shape in zip(partial, held, shapes, strict=True)
    ]
    # Of more than two results, all in the same way.
    picked = itertools.product(*([None, *each] for each in ways)) if len(ways) <= 2 else zip(*ways, strict=False)
    for each in picked:
        if any(one is not None for one in each):
            rest = [nbytes for nbytes, one in zip(held, each, strict=True) if one is None]
            specs = tuple(spec if one is None else one[0] for spec, one in zip(partial, each, strict=True))
            made = [reduction for one in each if one is not None for reduction in one[1]]
            yield specs, tuple([all_reduced(axes, rest, mesh), *made] if rest else made)


def _cut_shape(rule: Rule, dims: Dims) -> tuple[int, ...]:
    """A result's shape as far as the op can shard it; dims that it needs replicated count as of size 1."""
    whole = rule.replicated | rule.permuted
    return tuple(math.prod(rule.sizes[f] for f in dim) if whole.isdisjoint(dim) else 1 for dim in dims)
