"""Layouts of a tensor over a mesh, and the cheapest way from each to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bactrian.passes.sharding.mesh import Mesh

Layout = tuple[tuple[int, ...], ...]
"""For each dim of a tensor the axes of the mesh that cut it, the major one first."""

_EPSILON = 1e-12  # of a cost: two ways that differ by less are equal, and the one with fewer moves is taken


@dataclass(frozen=True)
class Move:
    """One collective, or none, that brings a tensor from one layout to another.

    Attributes:
        kind: ``slice`` (free), ``all_gather``, ``all_to_all`` or ``collective_permute``.
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


class LayoutTable:
    """The layouts of one tensor and what it costs to go from each to each.

    A way is a sequence of moves, each of which is one collective of Shardy's (``sdy.all_slice``, ``all_gather``,
    ``all_to_all``, ``collective_permute``) along one axis, or two in a permute; the cheapest way is taken, by Floyd and
    Warshall's algorithm.

    Args:
        shape: of the whole tensor.
        nbytes: of the whole tensor.
        mesh: the devices.
    """

    def __init__(self, shape: tuple[int, ...], nbytes: float, mesh: Mesh) -> None:
        self.shape, self.nbytes, self.mesh = shape, nbytes, mesh
        self.layouts = all_layouts(shape, mesh)
        self.number = {layout: index for index, layout in enumerate(self.layouts)}
        self.shares = np.array([local_bytes(1.0, layout, mesh) for layout in self.layouts])  # of the tensor, a device's
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
            yield Move("all_gather", (last,), fewer, mesh.axes[last].all_gather(held), (size - 1) * held)
            for other, present in enumerate(layout):
                if other != dim:
                    moved = _replaced(fewer, other, (*present, last))
                    sent = (size - 1) / size * held
                    yield Move("all_to_all", (last,), moved, mesh.axes[last].all_to_all(held), sent)
        yield from self._permutes(layout, held, free)

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
def table_of(shape: tuple[int, ...], nbytes: float, mesh: Mesh) -> LayoutTable:
    """The table of a tensor; equal tensors share one."""
    return LayoutTable(shape, nbytes, mesh)
