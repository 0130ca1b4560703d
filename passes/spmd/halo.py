"""Halos: the rows of its neighbours' shards that a device needs, where an op has windows over a sharded dim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

HALO = "halo"
"""The kind of communication that a halo exchange is."""


@dataclass(frozen=True)
class Halo:
    """How an op reads a dim of an operand that is sharded like a dim of its result, or of its kernel.

    Of ``n`` shards, device *i* reads the rows from ``(i * advance / n - padding) / dilation`` up to ``((i + 1) *
    advance / n + overlap - padding) / dilation``, both rounded up; its own are ``i * size / n`` to ``(i + 1) * size /
    n``. A convolution of 32 rows with windows of 3 and one row of padding has ``advance = 32``, ``overlap = 2`` and
    ``padding = 1``: of 8 shards, device 2 has the rows 8 to 12, reads 7 to 13, and gets one from each neighbour.

    Attributes:
        operand, dim: what is read.
        partner, partner_dim: the tensor that is sharded with it: None for the result, else the number of an operand.
        shape: of the whole operand.
        element_bytes: of an element of it.
        advance: the windows of all shards together, times their stride; or the size of the kernel, with its dilation.
        overlap: rows that the last window of a shard reads beyond the beginning of the next shard's first.
        padding: rows in front of the dim, negative where some of the dim are left out.
        dilation: of the dim.
    """

    operand: int
    dim: int
    partner: int | None
    partner_dim: int
    shape: tuple[int, ...]
    element_bytes: int
    advance: int
    overlap: int
    padding: int
    dilation: int = 1

    @property
    def is_padded(self) -> bool:
        """Whether windows reach beyond the dim."""
        first, last = self._reads(0, 1)
        return first < 0 or last > self.shape[self.dim]

    def rows(self, parts: int) -> tuple[int, int]:
        """The most rows that a device gets of the shards before and after its own.

        XLA sends as many to all that have a neighbour there.
        """
        held = self.shape[self.dim] // parts
        reads = [self._reads(i, parts) for i in range(parts)]
        before = max((i * held - reads[i][0] for i in range(1, parts)), default=0)
        after = max((reads[i][1] - (i + 1) * held for i in range(parts - 1)), default=0)
        return max(0, before), max(0, after)

    def is_near(self, parts: int) -> bool:
        """Whether devices get rows of the adjacent shards only, each side in one collective."""
        held, reads = self.shape[self.dim] // parts, [self._reads(i, parts) for i in range(parts)]
        # For wide halos, padding included, XLA makes other collectives.
        widest = max(max(i * held - reads[i][0], reads[i][1] - (i + 1) * held) for i in range(parts))
        return max(self.rows(parts)) <= held and widest <= 2 * self.span(parts)

    def span(self, parts: int) -> int:
        """The most rows that a device reads, padding with them."""
        return max(last - first for first, last in (self._reads(i, parts) for i in range(parts)))

    def _reads(self, index: int, parts: int) -> tuple[int, int]:
        step = self.advance // parts
        first, last = index * step - self.padding, (index + 1) * step + self.overlap - self.padding
        return -(-first // self.dilation), -(-last // self.dilation)


def halo_sends(halos: Sequence[Halo], parts: Callable[[int, int], int]) -> Iterator[tuple[Halo, int, float]]:
    """What each device sends to one neighbour: the halo, its rows, and bytes; one collective each.

    XLA exchanges dim after dim: the halos of the second one are as wide as what the first one has made.

    Args:
        halos: of one op, operand by operand and dim by dim.
        parts: into how many shards a dim of an operand is split.
    """
    shape = list[int]()
    operand: int | None = None
    for halo in halos:
        if halo.operand != operand:
            operand = halo.operand
            shape = [size // parts(operand, dim) for dim, size in enumerate(halo.shape)]
        count = parts(halo.operand, halo.dim)
        if count == 1:
            continue
        row = math.prod(size for dim, size in enumerate(shape) if dim != halo.dim) * halo.element_bytes
        for rows in halo.rows(count):
            if rows:
                yield halo, rows, float(rows * row)
        shape[halo.dim] = halo.span(count)
