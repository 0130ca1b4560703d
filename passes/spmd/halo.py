"""Halos: the rows of its neighbours' shards that a device needs, where an op has windows over a sharded dim."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Halo:
    """How an op reads a dim of an operand that is sharded like a dim of its result, or of its kernel.

    Windows move over the positions of a dim: its rows, ``dilation`` apart, with padding in front, behind and in between.
    Of ``n`` shards, device *i* reads the positions from ``i * advance / n - padding`` up to ``(i + 1) * advance / n +
    overlap - padding``; its own rows are ``i * size / n`` to ``(i + 1) * size / n``. A convolution of 32 rows with windows
    of 3 and one row of padding has ``advance = 32``, ``overlap = 2`` and ``padding = 1``: of 8 shards, device 2 has the
    rows 8 to 12, reads 7 to 13, and gets one from each neighbour.

    Attributes:
        operand, dim: what is read.
        shape: of the whole operand.
        element_bytes: of an element of it.
        advance: the windows of all shards together, times their stride; or the size of the kernel, with its dilation.
        overlap: positions that the last window of a shard reads beyond the beginning of the next shard's first.
        padding: positions in front of the dim, negative where some of the dim are left out.
        dilation: of the dim.
        fill: a word for what is beyond the ends of the dim; None where no other op has the same there.
    """

    operand: int
    dim: int
    shape: tuple[int, ...]
    element_bytes: int
    advance: int
    overlap: int
    padding: int
    dilation: int = 1
    fill: str | None = "zeros"

    def rows(self, parts: int) -> tuple[int, int]:
        """The rows that a device gets of the shards before and after its own: as many as the device that needs most."""
        before, after = self.before(parts), self.after(parts)
        return max(0, *before[1:]), max(0, *after[:-1])

    def is_near(self, parts: int) -> bool:
        """Whether the halo can be exchanged: devices read something, need rows of the adjacent shards only, and their
        windows begin at the same distance from a row."""
        same = self.advance // parts % self.dilation == 0
        return same and self.span(parts) > 0 and max(self.rows(parts)) <= self.shape[self.dim] // parts

    def span(self, parts: int) -> int:
        """The rows that a device reads, those beyond the dim with them."""
        first, last = self._reads(0, parts)
        return last - first

    def before(self, parts: int) -> list[int]:
        """For each shard the rows that are read in front of it; negative where its first ones are not read."""
        held = self.shape[self.dim] // parts
        return [index * held - self._reads(index, parts)[0] for index in range(parts)]

    def after(self, parts: int) -> list[int]:
        """For each shard the rows that are read behind it; negative where its last ones are not read."""
        held = self.shape[self.dim] // parts
        return [self._reads(index, parts)[1] - (index + 1) * held for index in range(parts)]

    def read_key(self, parts: int) -> tuple[Hashable, ...]:
        """Equal for two halos of one value for which devices read the same; no two have it without a `fill`."""
        return self.dim, tuple(self.before(parts)), tuple(self.after(parts)), self.fill

    def local_padding(self, parts: int) -> tuple[int, int]:
        """The positions without a row in front of the first row that a device reads, and behind the last."""
        low = self._reads(0, parts)[0] * self.dilation + self.padding
        rows = (self.span(parts) - 1) * self.dilation + 1
        return low, self.advance // parts + self.overlap - low - rows

    def _reads(self, index: int, parts: int) -> tuple[int, int]:
        """The rows of a shard's positions, both rounded up."""
        step = self.advance // parts
        first, last = index * step - self.padding, (index + 1) * step + self.overlap - self.padding
        return -(-first // self.dilation), -(-last // self.dilation)


@dataclass(frozen=True)
class RowsSent:
    """What is sent from shard to shard: one collective permute.

    Attributes:
        operand, dim: of what.
        rows: of the dim.
        nbytes: what a device sends that has somebody to send to.
        key: equal for sends of one value that are the same, and are written once; None for one like no other.
    """

    operand: int
    dim: int
    rows: int
    nbytes: float
    key: tuple[Hashable, ...] | None


def halo_sends(halos: Sequence[Halo], parts: Callable[[int, int], int]) -> Iterator[RowsSent]:
    """What is sent for an op.

    Dims are exchanged one after another: what is sent of the second one has the rows that the first has brought.

    Args:
        halos: of one op, operand by operand and dim by dim.
        parts: into how many shards a dim of an operand is split.
    """
    shape = list[int]()
    operand: int | None = None
    before: tuple[Hashable, ...] | None = ()
    for halo in halos:
        if halo.operand != operand:
            operand, before = halo.operand, ()
            shape = [size // parts(operand, dim) for dim, size in enumerate(halo.shape)]
        count = parts(halo.operand, halo.dim)
        if count == 1:
            continue
        row = math.prod(size for dim, size in enumerate(shape) if dim != halo.dim) * halo.element_bytes
        for side, rows in zip((-1, 1), halo.rows(count), strict=True):
            if rows:
                key = None if before is None else (*before, halo.dim, side, rows)
                yield RowsSent(halo.operand, halo.dim, rows, float(rows * row), key)
        shape[halo.dim] = halo.span(count)
        before = None if before is None or halo.fill is None else (*before, halo.read_key(count))
