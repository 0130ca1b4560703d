"""Layouts of a tensor over a mesh, and the cheapest way from each to each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bactrian.passes.machine.mesh import Mesh

Layout = tuple[tuple[int, ...], ...]
"""For each dim of a tensor the axes of the mesh that cut it, the major one first.

A sum of which each device has a part of its own is the layout of a larger tensor: in front stands one dim for each axis
along which the parts differ, in the mesh's order, cut over it.
"""

_EPSILON = 1e-12  # of a cost: two ways that differ by less are equal, and the one with fewer moves is taken


@dataclass(frozen=True)
class Move:
    """One collective, or none, that brings a tensor from one layout to another.

    Attributes:
        kind: ``slice`` (free), ``all_gather``, ``all_to_all`` or ``collective_permute``; from parts of a sum
            ``all_reduce`` or ``reduce_scatter``, over all its axes.
        axes: of the mesh that take part.
        target: the layout afterwards.
        seconds: what it takes.
        nbytes: what each device sends.
    """

    kind: str
    axes: tuple[int, ...]
    target: Layout
    seconds: float
    nbytes: float


def replicated(rank: int) -> Layout:
    """The layout with the whole tensor on every device."""
    return ((),) * rank


def parts_of_sum(layout: Layout, rank: int) -> tuple[int, ...]:
    """The axes along which the devices have parts of a sum, for a tensor of ``rank`` dims."""
    return sum(layout[: len(layout) - rank], ())


def is_divisible(shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> bool:
    """Whether every dim is cut into equal pieces."""
    return all(size % mesh.parts(axes) == 0 for size, axes in zip(shape, layout, strict=True))


def local_bytes(nbytes: float, layout: Layout, mesh: Mesh) -> float:
    """What one device holds of a tensor of ``nbytes``."""
    parts = 1
    for axes in layout:
        parts *= mesh.parts(axes)
    return nbytes / parts


def all_layouts(shape: tuple[int, ...], mesh: Mesh) -> list[Layout]:
    """All layouts with equal pieces, in both orders of axes on one dim; axes of size 1 cut nothing. Sorted."""
    layouts = [replicated(len(shape))]
    for axis in range(len(mesh.axes)):
        if mesh.axes[axis].size > 1:
            layouts += [wider for layout in layouts for wider in _with_axis(layout, axis)]
    return sorted(layout for layout in set(layouts) if is_divisible(shape, layout, mesh))


def _with_axis(layout: Layout, axis: int) -> Iterator[Layout]:
    for dim, axes in enumerate(layout):
        for at in range(len(axes) + 1):
            yield _replaced(layout, dim, (*axes[:at], axis, *axes[at:]))


def _replaced(layout: Layout, dim: int, axes: tuple[int, ...]) -> Layout:
    return (*layout[:dim], axes, *layout[dim + 1 :])


def _sums(layout: Layout, mesh: Mesh) -> Iterator[Layout]:
    """A layout as that of parts of a sum, over each choice of the axes that are left."""
    used = {axis for axes in layout for axis in axes}
    free = [axis for axis in range(len(mesh.axes)) if axis not in used and mesh.axes[axis].size > 1]
    for count in range(1, len(free) + 1):
        for axes in itertools.combinations(free, count):
            yield (*((axis,) for axis in axes), *layout)


@dataclass(frozen=True)
class Reduction:
    """A collective that adds up an op's partial results, or folds them with another function.

    Attributes:
        kind: ``all_reduce`` or ``reduce_scatter``.
        axes: of the mesh: one with ``reduce_scatter``.
        dim: of the result that is cut, with ``reduce_scatter``.
        seconds: what it takes for all results.
        nbytes: what each device sends.
    """

    kind: str
    axes: tuple[int, ...]
    dim: int | None
    seconds: float
    nbytes: float


def scatters_over(
    shape: tuple[int, ...], layout: Layout, axes: Sequence[int], held: float, mesh: Mesh
) -> Iterator[tuple[Layout, tuple[Reduction, ...]]]:
    """The ways to reduce a tensor over ``axes`` with a scatter along each, which leaves less for the next.

    Args:
        shape: of the tensor, as far as it may be cut.
        layout: that its partial results have.
        axes: over which they are reduced.
        held: bytes that a device has.
        mesh: the devices.
    """
    for dims in itertools.product(range(len(layout)), repeat=len(axes)):
        target, left, made = layout, held, list[Reduction]()
        for axis, dim in zip(axes, dims, strict=True):
            target = _replaced(target, dim, (*target[dim], axis))
            size = mesh.axes[axis].size
            seconds = mesh.axes[axis].reduce_scatter(left)
            made.append(Reduction("reduce_scatter", (axis,), dim, seconds, (size - 1) / size * left))
            left /= size
        if is_divisible(shape, target, mesh):
            yield target, tuple(made)


def all_reduced(axes: Sequence[int], held: Sequence[float], mesh: Mesh) -> Reduction:
    """One all-reduce of tensors, of which a device has ``held`` bytes each."""
    parts = mesh.parts(axes)
    seconds = sum(mesh.all_reduce(axes, nbytes) for nbytes in held)
    return Reduction("all_reduce", tuple(axes), None, seconds, 2 * (parts - 1) / parts * sum(held))


class LayoutTable:
    """The layouts of one tensor and what it costs to go from each to each.

    A way is a sequence of moves, each of which is one collective of Shardy's (``sdy.all_slice``, ``all_gather``,
    ``all_to_all``, ``collective_permute``) along one axis, or two in a permute; the cheapest way is taken, by Floyd and
    Warshall's algorithm.

    Args:
        shape: of the whole tensor.
        nbytes: of the whole tensor.
        mesh: the devices.
        partial: whether it can be left in parts of a sum, too. Nothing leads to such a layout.
    """

    def __init__(self, shape: tuple[int, ...], nbytes: float, mesh: Mesh, partial: bool = False) -> None:
        self.shape, self.nbytes, self.mesh = shape, nbytes, mesh
        self.layouts = all_layouts(shape, mesh)
        if partial:
            self.layouts += [sum_ for layout in self.layouts for sum_ in _sums(layout, mesh)]
        self.number = {layout: index for index, layout in enumerate(self.layouts)}
        rank = len(shape)
        whole = [layout[len(layout) - rank :] for layout in self.layouts]
        self.shares = np.array([local_bytes(1.0, layout, mesh) for layout in whole])  # of the tensor, a device's
        self.local = nbytes * self.shares
        self._moves: dict[tuple[int, int], Move] = {}
        for index, layout in enumerate(self.layouts):
            for move in self._moves_from(layout):
                target = self.number.get(move.target)
                key = index, -1 if target is None else target
                if target is not None and (key not in self._moves or move.seconds < self._moves[key].seconds):
                    self._moves[key] = move

    @cached_property
    def _ways(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Seconds from each layout to each, and the number of the first layout on the way."""
        count = len(self.layouts)
        cost = np.full((count, count), np.inf)
        steps = np.full((count, count), np.inf)
        first = np.tile(np.arange(count), (count, 1))
        np.fill_diagonal(cost, 0.0)
        np.fill_diagonal(steps, 0.0)
        for (source, target), move in self._moves.items():
            cost[source, target], steps[source, target] = move.seconds, 1.0
        for middle in range(count):
            through = cost[:, middle, None] + cost[None, middle]
            length = steps[:, middle, None] + steps[None, middle]
            slack = _EPSILON * np.where(np.isfinite(cost), cost, 1.0)
            shorter = (through <= cost + slack) & (length < steps)
            better = (through < cost - slack) | shorter
            cost = np.where(better, through, cost)
            steps = np.where(better, length, steps)
            first = np.where(better, first[:, middle, None], first)
        return cost, first

    @property
    def seconds(self) -> np.ndarray[Any, Any]:
        """Seconds from each layout (row) to each (column)."""
        return self._ways[0]

    def way(self, source: Layout, target: Layout) -> list[Move]:
        """The moves of the cheapest way."""
        at, end = self.number[source], self.number[target]
        moves = list[Move]()
        while at != end:
            following = int(self._ways[1][at, end])
            moves.append(self._moves[at, following])
            at = following
        return moves

    def _moves_from(self, layout: Layout) -> Iterator[Move]:
        mesh = self.mesh
        summed = parts_of_sum(layout, len(self.shape))
        if summed:
            yield from self._reductions(layout[len(summed) :], summed)
            return
        held = local_bytes(self.nbytes, layout, mesh)
        used = {axis for axes in layout for axis in axes}
        free = [axis for axis in range(len(mesh.axes)) if axis not in used and mesh.axes[axis].size > 1]
        for dim, axes in enumerate(layout):
            for axis in free:
                yield Move("slice", (axis,), _replaced(layout, dim, (*axes, axis)), 0.0, 0.0)
            if not axes:
                continue
            last = axes[-1]
            fewer = _replaced(layout, dim, axes[:-1])
            size = mesh.axes[last].size
            seconds = mesh.axes[last].all_gather(held)
            if self._comes_in_parts(layout, dim):
                seconds += size * held * mesh.copy_seconds_per_byte
            yield Move("all_gather", (last,), fewer, seconds, (size - 1) * held)
            for other, present in enumerate(layout):
                if other != dim:
                    moved = _replaced(fewer, other, (*present, last))
                    sent = (size - 1) / size * held
                    yield Move("all_to_all", (last,), moved, mesh.axes[last].all_to_all(held), sent)
        yield from self._permutes(layout, held, free)

    def _comes_in_parts(self, layout: Layout, dim: int) -> bool:
        """Whether a piece is no single stretch of what is gathered along a dim, since there are several rows before that dim: a
        gather puts piece behind piece, and XLA copies what it gave into the right order."""
        return any(size > self.mesh.parts(axes) for size, axes in zip(self.shape[:dim], layout[:dim], strict=True))

    def _reductions(self, layout: Layout, axes: tuple[int, ...]) -> Iterator[Move]:
        held = local_bytes(self.nbytes, layout, self.mesh)
        whole = all_reduced(axes, (held,), self.mesh)
        yield Move(whole.kind, axes, layout, whole.seconds, whole.nbytes)
        for target, made in scatters_over(self.shape, layout, axes, held, self.mesh):
            yield Move("reduce_scatter", axes, target, sum(r.seconds for r in made), sum(r.nbytes for r in made))

    def _permutes(self, layout: Layout, held: float, free: list[int]) -> Iterator[Move]:
        """Another axis of the same size for one, or two axes that change places."""
        axes = self.mesh.axes
        places = [(dim, at) for dim, cut in enumerate(layout) for at in range(len(cut))]
        for dim, at in places:
            old = layout[dim][at]
            for new in free:
                if axes[new].size == axes[old].size:
                    yield self._permute((old, new), _put(layout, {(dim, at): new}), held)
        for number, one in enumerate(places):
            for two in places[number + 1 :]:
                first, second = layout[one[0]][one[1]], layout[two[0]][two[1]]
                if one[0] == two[0] or axes[first].size == axes[second].size:
                    yield self._permute((first, second), _put(layout, {one: second, two: first}), held)

    def _permute(self, axes: tuple[int, int], target: Layout, held: float) -> Move:
        seconds = max(self.mesh.axes[axis].permute(held) for axis in axes)
        return Move("collective_permute", axes, target, seconds, held)


def _put(layout: Layout, changes: dict[tuple[int, int], int]) -> Layout:
    return tuple(tuple(changes.get((dim, at), axis) for at, axis in enumerate(axes)) for dim, axes in enumerate(layout))


@lru_cache(maxsize=4096)
def table_of(shape: tuple[int, ...], nbytes: float, mesh: Mesh, partial: bool = False) -> LayoutTable:
    """The table of a tensor; equal tensors share one."""
    return LayoutTable(shape, nbytes, mesh, partial)
