"""Specs of a tensor over a mesh, and the cheapest path of collectives from each to each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec

_EPSILON = 1e-12  # of a cost: two paths that differ by less are equal, and the one with fewer steps is taken


@dataclass(frozen=True)
class ReshardStep:
    """One collective, or none, that brings a tensor from one spec to another.

    Attributes:
        kind: ``slice`` (free), ``all_gather``, ``all_to_all`` or ``collective_permute``; from an unreduced spec
            ``all_reduce`` or ``reduce_scatter``, over all its unreduced axes.
        axes: of the mesh that take part.
        target: the spec afterwards.
        seconds: what it takes.
        nbytes: what each device sends.
    """

    kind: str
    axes: tuple[str, ...]
    target: Spec
    seconds: float
    nbytes: float


def is_divisible(shape: tuple[int, ...], spec: Spec, mesh: Mesh) -> bool:
    """Whether every dim is split into equal shards."""
    return all(size % mesh.group_size(axes) == 0 for size, axes in zip(shape, spec.dims, strict=True))


def local_bytes(nbytes: float, spec: Spec, mesh: Mesh) -> float:
    """What one device holds of a tensor of ``nbytes``."""
    return nbytes / spec.num_shards(mesh.sizes)


def all_specs(shape: tuple[int, ...], mesh: Mesh) -> list[Spec]:
    """All specs with equal shards, with the axes of a dim in every order; axes of size 1 are left out.

    In the order of the axes' positions in the mesh.
    """
    specs = [Spec.replicated(len(shape))]
    for axis in mesh.wide:
        specs += [wider for spec in specs for wider in _with_axis(spec, axis)]

    def positions(spec: Spec) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(mesh.position[axis] for axis in axes) for axes in spec.dims)

    return sorted((spec for spec in set(specs) if is_divisible(shape, spec, mesh)), key=positions)


def _with_axis(spec: Spec, axis: str) -> Iterator[Spec]:
    for dim, axes in enumerate(spec.dims):
        for at in range(len(axes) + 1):
            yield spec.with_dim(dim, (*axes[:at], axis, *axes[at:]))


def _unreduced(spec: Spec, mesh: Mesh) -> Iterator[Spec]:
    """A spec with each choice of the axes that it leaves as unreduced ones."""
    free = [axis for axis in mesh.wide if axis not in spec.axes]
    for count in range(1, len(free) + 1):
        for axes in itertools.combinations(free, count):
            yield Spec(spec.dims, axes)


@dataclass(frozen=True)
class Reduction:
    """A collective that adds up an op's partial results, or folds them with another function.

    Attributes:
        kind: ``all_reduce``, ``reduce_scatter`` or ``all_gather``.
        axes: of the mesh: one with ``reduce_scatter``.
        dim: of the result that is sharded, with ``reduce_scatter``.
        seconds: what it takes for all results.
        nbytes: what each device sends.
    """

    kind: str
    axes: tuple[str, ...]
    dim: int | None
    seconds: float
    nbytes: float


def scatters_over(
    shape: tuple[int, ...], spec: Spec, axes: Sequence[str], held: float, mesh: Mesh
) -> Iterator[tuple[Spec, tuple[Reduction, ...]]]:
    """The ways to reduce a tensor over ``axes`` with a scatter along each, which leaves less for the next.

    Args:
        shape: of the tensor, as far as it may be sharded.
        spec: of its partial results.
        axes: over which they are reduced.
        held: bytes that a device has.
        mesh: the devices.
    """
    for dims in itertools.product(range(len(spec.dims)), repeat=len(axes)):
        target, left, made = spec, held, list[Reduction]()
        for axis, dim in zip(axes, dims, strict=True):
            target = target.with_dim(dim, (*target.dims[dim], axis))
            size = mesh.sizes[axis]
            seconds = mesh.by_name[axis].reduce_scatter(left)
            made.append(Reduction("reduce_scatter", (axis,), dim, seconds, (size - 1) / size * left))
            left /= size
        if is_divisible(shape, target, mesh):
            yield target, tuple(made)


def all_reduced(axes: Sequence[str], held: Sequence[float], mesh: Mesh) -> Reduction:
    """One all-reduce of tensors, of which a device has ``held`` bytes each."""
    group = mesh.group_size(axes)
    seconds = sum(mesh.all_reduce(axes, nbytes) for nbytes in held)
    return Reduction("all_reduce", tuple(axes), None, seconds, 2 * (group - 1) / group * sum(held))


def all_gathered(axes: Sequence[str], held: Sequence[float], mesh: Mesh) -> Reduction:
    """All-gathers of tensors, of which a device has ``held`` bytes each: along one axis after the other, the last first."""
    group, seconds = mesh.group_size(axes), 0.0
    for nbytes in held:
        for axis in reversed(axes):
            seconds += mesh.by_name[axis].all_gather(nbytes)
            nbytes *= mesh.sizes[axis]
    return Reduction("all_gather", tuple(axes), None, seconds, (group - 1) * sum(held))


class ReshardTable:
    """The specs of one tensor and what it costs to go from each to each.

    A path is a sequence of steps, each of which is one collective of Shardy's (``sdy.all_slice``, ``all_gather``,
    ``all_to_all``, ``collective_permute``) along one axis, or two in a permute; the cheapest path is taken, by Floyd
    and Warshall's algorithm.

    Args:
        shape: of the whole tensor.
        nbytes: of the whole tensor.
        mesh: the devices.
        partial: whether it may be unreduced, too. Nothing leads to such a spec.
    """

    def __init__(self, shape: tuple[int, ...], nbytes: float, mesh: Mesh, partial: bool = False) -> None:
        self.shape, self.nbytes, self.mesh = shape, nbytes, mesh
        self.specs = all_specs(shape, mesh)
        if partial:
            self.specs += [each for spec in self.specs for each in _unreduced(spec, mesh)]
        self.number = {spec: index for index, spec in enumerate(self.specs)}
        self.shares = np.array([local_bytes(1.0, spec, mesh) for spec in self.specs])  # of the tensor, a device's
        self.local = nbytes * self.shares
        self._steps: dict[tuple[int, int], ReshardStep] = {}
        for index, spec in enumerate(self.specs):
            for step in self._steps_from(spec):
                target = self.number.get(step.target)
                key = index, -1 if target is None else target
                if target is not None and (key not in self._steps or step.seconds < self._steps[key].seconds):
                    self._steps[key] = step

    @cached_property
    def _paths(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Seconds from each spec to each, and the number of the first spec on the path."""
        count = len(self.specs)
        cost = np.full((count, count), np.inf)
        steps = np.full((count, count), np.inf)
        first = np.tile(np.arange(count), (count, 1))
        np.fill_diagonal(cost, 0.0)
        np.fill_diagonal(steps, 0.0)
        for (source, target), step in self._steps.items():
            cost[source, target], steps[source, target] = step.seconds, 1.0
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
        """Seconds from each spec (row) to each (column)."""
        return self._paths[0]

    def path(self, source: Spec, target: Spec) -> list[ReshardStep]:
        """The steps of the cheapest path."""
        at, end = self.number[source], self.number[target]
        steps = list[ReshardStep]()
        while at != end:
            following = int(self._paths[1][at, end])
            steps.append(self._steps[at, following])
            at = following
        return steps

    def _steps_from(self, spec: Spec) -> Iterator[ReshardStep]:
        mesh = self.mesh
        if spec.unreduced:
            yield from self._reductions(Spec(spec.dims), spec.unreduced)
            return
        held = local_bytes(self.nbytes, spec, mesh)
        free = [axis for axis in mesh.wide if axis not in spec.axes]
        for dim, axes in enumerate(spec.dims):
            for axis in free:
                yield ReshardStep("slice", (axis,), spec.with_dim(dim, (*axes, axis)), 0.0, 0.0)
            if not axes:
                continue
            last = mesh.by_name[axes[-1]]
            fewer, size = spec.with_dim(dim, axes[:-1]), last.size
            seconds = last.all_gather(held)
            if self._is_scattered(spec, dim):
                seconds += size * held * mesh.copy_seconds_per_byte
            yield ReshardStep("all_gather", (last.name,), fewer, seconds, (size - 1) * held)
            for other, present in enumerate(spec.dims):
                if other != dim:
                    moved = fewer.with_dim(other, (*present, last.name))
                    sent = (size - 1) / size * held
                    yield ReshardStep("all_to_all", (last.name,), moved, last.all_to_all(held), sent)
        yield from self._permutes(spec, held, free)

    def _is_scattered(self, spec: Spec, dim: int) -> bool:
        """Whether a shard is no single stretch of what is gathered along a dim, since there are several rows before
        that
        dim: a gather puts shard behind shard, and XLA copies what it gave into the right order."""
        before = zip(self.shape[:dim], spec.dims[:dim], strict=True)
        return any(size > self.mesh.group_size(axes) for size, axes in before)

    def _reductions(self, spec: Spec, axes: tuple[str, ...]) -> Iterator[ReshardStep]:
        held = local_bytes(self.nbytes, spec, self.mesh)
        whole = all_reduced(axes, (held,), self.mesh)
        yield ReshardStep(whole.kind, axes, spec, whole.seconds, whole.nbytes)
        for target, made in scatters_over(self.shape, spec, axes, held, self.mesh):
            yield ReshardStep("reduce_scatter", axes, target, sum(r.seconds for r in made), sum(r.nbytes for r in made))

    def _permutes(self, spec: Spec, held: float, free: list[str]) -> Iterator[ReshardStep]:
        """Another axis of the same size for one, or two axes that change places."""
        sizes = self.mesh.sizes
        places = [(dim, at) for dim, axes in enumerate(spec.dims) for at in range(len(axes))]
        for dim, at in places:
            old = spec.dims[dim][at]
            for new in free:
                if sizes[new] == sizes[old]:
                    yield self._permute((old, new), _put(spec, {(dim, at): new}), held)
        for number, one in enumerate(places):
            for two in places[number + 1 :]:
                first, second = spec.dims[one[0]][one[1]], spec.dims[two[0]][two[1]]
                if one[0] == two[0] or sizes[first] == sizes[second]:
                    yield self._permute((first, second), _put(spec, {one: second, two: first}), held)

    def _permute(self, axes: tuple[str, str], target: Spec, held: float) -> ReshardStep:
        seconds = max(self.mesh.by_name[axis].permute(held) for axis in axes)
        return ReshardStep("collective_permute", axes, target, seconds, held)


def _put(spec: Spec, changes: dict[tuple[int, int], str]) -> Spec:
    dims = enumerate(spec.dims)
    return Spec(tuple(tuple(changes.get((dim, at), axis) for at, axis in enumerate(axes)) for dim, axes in dims))


@lru_cache(maxsize=4096)
def reshard_table(shape: tuple[int, ...], nbytes: float, mesh: Mesh, partial: bool = False) -> ReshardTable:
    """The table of a tensor; equal tensors share one."""
    return ReshardTable(shape, nbytes, mesh, partial)
