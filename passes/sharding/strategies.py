"""The choices of an op: which axes of the mesh go over which factors of its rule, and what becomes of partial sums."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.sharding.halo import Border, borders_sent
from bactrian.passes.sharding.reshard_paths import Layout, Reduction, all_reduced, local_bytes, scatters_over
from bactrian.passes.sharding.sharding_rules import Dims, Rule


class Defers(enum.Enum):
    """What an op has to do with sums whose parts are added up later."""

    NOT = "not"
    STARTS = "starts"  # it sums, and can leave the parts
    PASSES = "passes"  # of parts of a sum it makes parts of one


@dataclass(frozen=True)
class Exchange:
    """Borders of pieces that all devices send to a neighbour, before the work: one collective permute.

    Attributes:
        border: how they are read.
        rows: of the dim.
        axes: of the mesh that cut it.
        seconds: what it takes.
        nbytes: what each device sends.
    """

    border: Border
    rows: int
    axes: tuple[int, ...]
    seconds: float
    nbytes: float


@dataclass(frozen=True)
class Strategy:
    """One way to carry out an op.

    Attributes:
        factors: for each axis of the mesh the factor that it cuts, or None: the work is done along it again.
        operands: the layouts that the operands are needed in.
        partial: the layouts that the results come in before ``reductions``. Where the parts of a sum are left, no
            reduction follows.
        results: the layouts that they have in the end.
        reductions: in their order.
        parts: how many devices share the work.
        exchanges: of borders, before the work.
    """

    factors: tuple[int | None, ...]
    operands: tuple[Layout, ...]
    partial: tuple[Layout, ...]
    results: tuple[Layout, ...]
    reductions: tuple[Reduction, ...]
    parts: int
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
    pieces of one: there are no layouts with strides.

    Args:
        rule: of the op.
        result_bytes: bytes of each whole result.
        mesh: the devices.
        shapes: of the results, where they may be scattered along all their dims, and None for one that is not to be
            scattered. By default each is, along the dims that the op itself can cut.
        defers: whether the parts of a sum may be left to be added up later.
    """
    cuttable = [None, *(f for f in range(len(rule.sizes)) if f not in rule.replicated | rule.permuted)]
    choices = [cuttable if axis.size > 1 else [None] for axis in mesh.axes]
    found = list[Strategy]()
    if shapes is None:
        shapes = tuple(_cut_shape(rule, dims) for dims in rule.results)
    for factors in itertools.product(*choices):
        axes_of: dict[int, tuple[int, ...]] = {}
        for axis, factor in enumerate(factors):
            if factor is not None:
                axes_of[factor] = (*axes_of.get(factor, ()), axis)
        if any(rule.sizes[factor] % mesh.parts(axes) for factor, axes in axes_of.items()):
            continue
        operands = _layouts(rule.operands, rule, axes_of, mesh)
        partial = _layouts(rule.results, rule, axes_of, mesh)
        if operands is None or partial is None:
            continue
        exchanges = _exchanges(rule, operands, axes_of, mesh)
        if exchanges is None:
            continue
        parts = mesh.parts([axis for axes in axes_of.values() for axis in axes])
        reduced = [axis for axis, factor in enumerate(factors) if factor in rule.reduction]
        for results, reductions in _reductions(reduced, partial, result_bytes, mesh, shapes):
            found.append(Strategy(factors, operands, partial, results, reductions, parts, exchanges))
        if reduced and defers is Defers.STARTS:
            left = (_in_parts(reduced, partial[0]),)
            found.append(Strategy(factors, operands, left, left, (), parts, exchanges))
        if defers is Defers.PASSES:
            free = [axis for axis, factor in enumerate(factors) if factor is None and mesh.axes[axis].size > 1]
            for count in range(1, len(free) + 1):
                for axes in itertools.combinations(free, count):
                    read = tuple(_in_parts(axes, layout) for layout in operands)
                    left = (_in_parts(axes, partial[0]),)
                    found.append(Strategy(factors, read, left, left, (), parts))
    return tuple(found)


def _in_parts(axes: Sequence[int], layout: Layout) -> Layout:
    return (*((axis,) for axis in axes), *layout)


def _layouts(
    tensors: Sequence[Dims], rule: Rule, axes_of: dict[int, tuple[int, ...]], mesh: Mesh
) -> tuple[Layout, ...] | None:
    """The tensors' layouts; None where one would have strides."""
    layouts = list[Layout]()
    for dims in tensors:
        layout = list[tuple[int, ...]]()
        for dim in dims:
            axes = tuple[int, ...]()
            open_ = True  # every factor so far is cut to pieces of one
            for factor in dim:
                mine = axes_of.get(factor, ())
                if mine and not open_:
                    return None
                axes += mine
                open_ = open_ and mesh.parts(mine) == rule.sizes[factor]
            layout.append(axes)
        layouts.append(tuple(layout))
    return tuple(layouts)


def _exchanges(
    rule: Rule, operands: tuple[Layout, ...], axes_of: dict[int, tuple[int, ...]], mesh: Mesh
) -> tuple[Exchange, ...] | None:
    """The borders that devices exchange; None where XLA does something else, or something wrong.

    Seen of the partitioner in jaxlib 0.10.2, on 8 devices: with the image of a convolution cut, and the kernel cut too
    (over features), results are wrong for some combinations of axes, right for others, and partly gathered. A sum over
    windows whose image and kernel are both cut (a weight's gradient) is added up over all devices, also over those that have
    the same part: it is wrong unless each axis cuts what is summed over.
    """
    cut = [border for border in rule.borders if rule.factor_of(border) in axes_of]
    if not cut:
        return ()
    summed = {axis for factor, axes in axes_of.items() if factor in rule.reduction for axis in axes}
    for border in cut:
        if border.partner is None:
            if any(any(layout) for number, layout in enumerate(operands) if number not in {b.operand for b in cut}):
                return None
        elif any(axis.size > 1 and number not in summed for number, axis in enumerate(mesh.axes)):
            return None
        if not border.is_near(mesh.parts(axes_of[rule.factor_of(border)])):
            return None
    found = list[Exchange]()
    for border, rows, nbytes in borders_sent(cut, lambda operand, dim: mesh.parts(operands[operand][dim])):
        axes = operands[border.operand][border.dim]
        found.append(Exchange(border, rows, axes, max(mesh.axes[axis].permute(nbytes) for axis in axes), nbytes))
    return tuple(found)


def _reductions(
    axes: list[int],
    partial: tuple[Layout, ...],
    result_bytes: tuple[float, ...],
    mesh: Mesh,
    shapes: Sequence[tuple[int, ...] | None],
) -> Iterator[tuple[tuple[Layout, ...], tuple[Reduction, ...]]]:
    """The ways to reduce over ``axes``: one all-reduce, or of a result a scatter along each, which leaves less for the next.

    Of one result not some of each: partitioners make one all-reduce of that, and cut its result.
    """
    if not axes:
        yield partial, ()
        return
    held = [local_bytes(nbytes, layout, mesh) for nbytes, layout in zip(result_bytes, partial, strict=True)]

    yield partial, (all_reduced(axes, held, mesh),)
    ways = [
        [] if shape is None else list(scatters_over(shape, layout, axes, nbytes, mesh))
        for layout, nbytes, shape in zip(partial, held, shapes, strict=True)
    ]
    # Of more than two results, all in the same way.
    picked = itertools.product(*([None, *each] for each in ways)) if len(ways) <= 2 else zip(*ways, strict=False)
    for each in picked:
        if any(one is not None for one in each):
            rest = [nbytes for nbytes, one in zip(held, each, strict=True) if one is None]
            layouts = tuple(layout if one is None else one[0] for layout, one in zip(partial, each, strict=True))
            made = [reduction for one in each if one is not None for reduction in one[1]]
            yield layouts, tuple([all_reduced(axes, rest, mesh), *made] if rest else made)


def _cut_shape(rule: Rule, dims: Dims) -> tuple[int, ...]:
    """A result's shape as far as the op can cut it; dims that it needs whole count as of size 1."""
    whole = rule.replicated | rule.permuted
    return tuple(math.prod(rule.sizes[f] for f in dim) if whole.isdisjoint(dim) else 1 for dim in dims)
