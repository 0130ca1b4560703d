"""Measured times of collectives, which take the place of the formulas in ``mesh.py``."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import brief, number_between

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute")
_BYTES, _SECONDS = (1e-3, 1e18), (1e-12, 1e18)  # the least and the most of a point


@dataclass(frozen=True)
class Curve:
    """Seconds of one collective over groups of one size, by bytes.

    Attributes:
        kind: one of `KINDS`.
        group: devices that take part together.
        nbytes: what each device holds before: its shard for an all-gather, its summand for a reduce-scatter or an
            all-reduce. Increasing; two or more.
        seconds: for each of these; not decreasing, and more for the last than for the first.
    """

    kind: str
    group: int
    nbytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def seconds_for(self, nbytes: float) -> float:
        """Interpolated linearly between two points; below the first point, its seconds.

        Above the last point the line goes on as steeply as between the last two, or between the first and the last,
        whichever is steeper: a last point that was measured too low would make large messages free.
        """
        points, seconds = self.nbytes, self.seconds
        if nbytes <= points[0]:
            return seconds[0]
        if nbytes > points[-1]:
            last, whole = (
                (seconds[-1] - seconds[first]) / (points[-1] - points[first]) for first in (len(points) - 2, 0)
            )
            return seconds[-1] + max(last, whole) * (nbytes - points[-1])
        above = min(bisect_right(points, nbytes), len(points) - 1)
        share = (nbytes - points[above - 1]) / (points[above] - points[above - 1])
        return min(seconds[above], seconds[above - 1] + share * (seconds[above] - seconds[above - 1]))


def curves_of(data: Any, *, name: str, where: str = "") -> tuple[Curve, ...]:
    """The curves of a cluster's table ``measured``: ``[measured.all_gather.8]`` has the lists ``bytes``, ``seconds``.

    A measurement that is lower than one of fewer bytes counts as that one.

    Raises:
        ConfigError: another form, an unknown kind, numbers that can't be times; the key is named.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"measured of cluster {name} is {brief(data)}, must be a table of collectives", where=where)
    found = list[Curve]()
    for kind, groups in data.items():
        if kind not in KINDS:
            raise ConfigError(
                f"measured.{kind} of cluster {name}: no such collective", where=where, fix=f"one of {', '.join(KINDS)}"
            )
        if not isinstance(groups, dict):
            raise ConfigError(f"measured.{kind} of cluster {name} must be a table by size of the group", where=where)
        for group, lists in groups.items():
            found.append(_curve(kind, group, lists, f"measured.{kind}.{group}", name, where))
    return tuple(sorted(found, key=lambda curve: (curve.kind, curve.group)))


def _curve(kind: str, group: str, lists: Any, key: str, name: str, where: str) -> Curve:
    if not (group.isascii() and group.isdecimal()) or group != str(int(group)) or int(group) < 2:
        raise ConfigError(f"{key} of cluster {name}: {group!r} is not a number of devices, 2 or more", where=where)
    if not isinstance(lists, dict) or set(lists) != {"bytes", "seconds"}:
        raise ConfigError(f"{key} of cluster {name} must have the keys bytes and seconds, and no others", where=where)
    nbytes = _numbers(lists["bytes"], _BYTES, f"{key}.bytes of cluster {name}", where)
    seconds = _numbers(lists["seconds"], _SECONDS, f"{key}.seconds of cluster {name}", where)
    if len(nbytes) != len(seconds):
        raise ConfigError(
            f"{key} of cluster {name} has {len(nbytes)} bytes and {len(seconds)} seconds",
            where=where,
            fix="give one entry of seconds for each of bytes",
        )
    if len(nbytes) < 2:
        raise ConfigError(f"{key}.bytes of cluster {name} has fewer than two entries", where=where)
    for before, after in pairwise(nbytes):
        if after <= before:
            raise ConfigError(
                f"{key}.bytes of cluster {name} must increase: {after:g} comes after {before:g}", where=where
            )
    rising = tuple(accumulate(seconds, max))
    if rising[-1] == rising[0]:
        raise ConfigError(
            f"{key}.seconds of cluster {name} do not grow",
            where=where,
            why=f"{nbytes[-1]:g} bytes take no longer than {nbytes[0]:g}, so larger messages can't be predicted",
            fix="measure larger messages",
        )
    return Curve(kind, int(group), nbytes, rising)


def _numbers(values: Any, bounds: tuple[float, float], key: str, where: str) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise ConfigError(f"{key} is {brief(values)}, must be a list", where=where)
    return tuple(number_between(value, *bounds, f"entry {at} of {key}", where) for at, value in enumerate(values))
