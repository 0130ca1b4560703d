"""The arithmetic of the exact reductions, as functions of arrays alone, and the queue of what is to be looked at.

Being functions of arrays alone, they are computed once for equal arrays (``hash_consing.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np

from bactrian.passes.network.hash_consing import Array

ROUNDING = 1e-13  # of the largest of the numbers that were added, where these are no integers
_T = TypeVar("_T")


class Queue(Generic[_T]):
    """A queue in which each thing waits once, in the order in which it came.

    A dict that is emptied from its front would take time for all that was in it before.
    """

    def __init__(self, things: Iterable[_T]) -> None:
        self._waiting = deque(things)
        self._known = set(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> _T:
        """The first one, which is taken out."""
        thing = self._waiting.popleft()
        self._known.remove(thing)
        return thing

    def add(self, things: Iterable[_T]) -> None:
        """At the end, those that are not waiting already."""
        for thing in things:
            if thing not in self._known:
                self._known.add(thing)
                self._waiting.append(thing)


def least(values: Array) -> float:
    """The smallest."""
    return float(values.min())


def above_least(values: Array) -> Array:
    """What is above the smallest."""
    return values - values.min()


def rows(values: Array, keep: Array) -> Array:
    """Some rows."""
    return values[keep]


def row(matrix: Array, number: int) -> Array:
    """One row."""
    return matrix[number]


def along(matrix: Array, partner: Array) -> Array:
    """One entry of each row."""
    return matrix[np.arange(len(partner)), partner]


def possible(costs: Array, *around: Array) -> Array | None:
    """The strategies with a finite partner on every edge; None if all have one."""
    keep = np.isfinite(costs)
    for matrix in around:
        keep &= np.isfinite(matrix).any(axis=1)
    return None if keep.all() else np.flatnonzero(keep)


def partners(matrix: Array) -> Array | None:
    """For each row its one finite column, if there is one for each."""
    finite = np.isfinite(matrix)
    if finite.shape[0] != finite.shape[1] or (finite.sum(0) != 1).any() or (finite.sum(1) != 1).any():
        return None
    return finite.argmax(1)


def separated(matrix: Array, whole: int) -> tuple[Array, Array] | None:
    """A column and a row that a matrix is the sum of, if it is one."""
    if not np.isfinite(matrix).all():
        return None
    row = matrix[:1] - matrix[0, 0]
    rest = np.abs(matrix - matrix[:, :1] - row).max()
    return (matrix[:, 0], row[0]) if rest <= (0.0 if whole else ROUNDING * np.abs(matrix).max()) else None


def undominated(num_usages: int, costs: Array, *rest: Array) -> Array | None:
    """The strategies that no other one can always replace; None if these are all.

    Args:
        num_usages: how many of ``rest`` are usages of memory; the others are matrices to neighbours.
        costs: of the strategies.
    """
    count = len(costs)
    better = np.ones((count, count), bool)  # [p, q]: q can replace p
    np.fill_diagonal(better, False)
    for usage in rest[:num_usages]:
        better &= usage[None, :] <= usage[:, None]
        if not better.any():
            return None
    extra = costs[None, :] - costs[:, None]
    for matrix in rest[num_usages:]:
        with np.errstate(invalid="ignore"):
            worst = matrix[None, :, :] - matrix[:, None, :]  # [p, q, k]: what q costs more than p beside k
        extra = extra + np.where(np.isnan(worst), -np.inf, worst).max(axis=2)
        better &= ~(extra == np.inf)
        if not better.any():
            return None
    better &= extra <= 0
    alive = np.ones(count, bool)
    for p in range(count):
        if (better[p] & alive).any():
            alive[p] = False
    return None if alive.all() else np.flatnonzero(alive)
