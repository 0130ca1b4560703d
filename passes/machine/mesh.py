"""A mesh of devices: named axes, and the seconds of collectives along them.

The formulas are those of ring algorithms: a collective over n devices takes a latency, and the bytes that each device sends
over the rate of the link. Per byte that a device holds before: all-gather n - 1, reduce-scatter and all-to-all (n - 1) / n,
all-reduce 2 (n - 1) / n, permute 1 (Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
MPICH", 2005). Measured curves take their place where a cluster file has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.collective_times import Curve


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh.

    A collective along it takes what its measured curve says, or else ``latency`` plus the bytes that a device sends times
    ``seconds_per_byte``.

    Attributes:
        name: as in ``sdy.mesh``.
        size: devices along it.
        latency: seconds of the smallest collective along it.
        seconds_per_byte: of what one device sends along it while all others send as much.
        measured: curves of collectives over groups of ``size`` devices, at most one of a kind.
    """

    name: str
    size: int
    latency: float = 5e-6
    seconds_per_byte: float = 1e-10
    measured: tuple[Curve, ...] = ()

    def all_gather(self, nbytes: float) -> float:
        """Seconds, for ``nbytes`` on each device before."""
        return self.seconds("all_gather", nbytes)

    def all_to_all(self, nbytes: float) -> float:
        """Seconds, for ``nbytes`` on each device."""
        return self.seconds("all_to_all", nbytes)

    def reduce_scatter(self, nbytes: float) -> float:
        """Seconds, for ``nbytes`` on each device before.

        Never more than an all-reduce, of which each device keeps its shard: compilers may write either for the other.
        """
        return min(self.seconds("reduce_scatter", nbytes), self.seconds("all_reduce", nbytes))

    def all_reduce(self, nbytes: float) -> float:
        """Seconds, for ``nbytes`` on each device."""
        return self.seconds("all_reduce", nbytes)

    def permute(self, nbytes: float) -> float:
        """Seconds, for ``nbytes`` on each device."""
        return self.seconds("collective_permute", nbytes)

    def seconds(self, kind: str, nbytes: float) -> float:
        """Of a collective of this kind (`KINDS`), for ``nbytes`` on each device before."""
        for curve in self.measured:
            if curve.kind == kind:
                return curve.seconds_for(nbytes)
        return self.latency + _sent_share(kind, self.size) * nbytes * self.seconds_per_byte


def _sent_share(kind: str, size: int) -> float:
    """Bytes that each of ``size`` devices sends, for each byte that it holds before."""
    match kind:
        case "all_gather":
            return size - 1
        case "all_to_all" | "reduce_scatter":
            return (size - 1) / size
        case "all_reduce":
            return 2 * (size - 1) / size
        case "collective_permute":
            return 1
        case _:
            raise ValueError(f"no collective {kind}")


@dataclass(frozen=True)
class Mesh:
    """Axes of devices in row-major order: neighbours along the last axis are neighbours in the cluster.

    Attributes:
        axes: of the mesh.
        measured: curves of all-reduces over several axes at once, by the devices of their group.
        copy_seconds_per_byte: of a copy within a device's memory, which is read and written.
    """

    axes: tuple[Axis, ...]
    measured: tuple[Curve, ...] = ()
    copy_seconds_per_byte: float = 0.0

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise ConfigError(f"the mesh has two axes of one name: {', '.join(names)}")
        for axis in self.axes:
            if axis.size < 1:
                raise ConfigError(f"axis {axis.name} of the mesh has size {axis.size}", fix="give sizes of 1 or more")
            for what, value in (("latency", axis.latency), ("seconds per byte", axis.seconds_per_byte)):
                if not 0 <= value < math.inf:
                    raise ConfigError(f"the {what} of axis {axis.name} is {value}, must be a number of 0 or more")
            for curve in axis.measured:
                if curve.group != axis.size:
                    raise ConfigError(f"axis {axis.name} of {axis.size} devices has a curve for {curve.group}")

    @cached_property
    def by_name(self) -> dict[str, Axis]:
        """The axes by their names, in the mesh's order."""
        return {axis.name: axis for axis in self.axes}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return {axis.name: axis.size for axis in self.axes}

    @cached_property
    def wide(self) -> tuple[str, ...]:
        """The axes of more than one device: an axis of size 1 shards nothing."""
        return tuple(axis.name for axis in self.axes if axis.size > 1)

    @cached_property
    def position(self) -> dict[str, int]:
        """The number of each axis in the mesh's order."""
        return {axis.name: number for number, axis in enumerate(self.axes)}

    @property
    def num_devices(self) -> int:
        """All of them."""
        return math.prod(axis.size for axis in self.axes)

    def all_reduce(self, axes: Sequence[str], nbytes: float) -> float:
        """Seconds of one all-reduce over several axes, for ``nbytes`` on each device.

        Hierarchical: reduce-scatters along one axis after the other, the fastest first, so that the slowest carries the
        least, then all-gathers in the opposite order; the latency is the largest one. A curve that was measured for a
        group of as many devices takes the place of this.
        """
        if len(axes) == 1:
            return self.by_name[axes[0]].all_reduce(nbytes)
        group = self.group_size(axes)
        for curve in self.measured:
            if (curve.kind, curve.group) == ("all_reduce", group):
                return curve.seconds_for(nbytes)
        seconds = 0.0
        for axis in sorted((self.by_name[name] for name in axes), key=lambda axis: axis.seconds_per_byte):
            seconds += 2 * (axis.size - 1) / axis.size * nbytes * axis.seconds_per_byte
            nbytes /= axis.size
        return seconds + max((self.by_name[name].latency for name in axes), default=0.0)

    def group_size(self, axes: Iterable[str]) -> int:
        """Devices along some axes: the shards that they split something into."""
        return math.prod(self.sizes[name] for name in axes)
