"""A cluster of equal hosts: the speed of its devices and links, read from TOML."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import brief, integer_between, number_between
from bactrian.passes.machine.collective_times import Curve, curves_of
from bactrian.passes.machine.device import CPU_CORE, Device
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.machine.spec import MeshAxes, axes_text, num_devices

_GIGA = 1e9
_KEYS = {  # and whether they are needed
    "hosts": True,
    "devices_per_host": True,
    "memory_gib": True,
    "peak_tflops": True,
    "memory_gb_per_s": False,
    "repack_gb_per_s": False,
    "intra_host_gb_per_s": True,
    "inter_host_gb_per_s": False,
    "intra_host_latency_us": False,
    "inter_host_latency_us": False,
    "name": False,
    "measured": False,
}
_COUNTS = {"hosts": (1, 1 << 20), "devices_per_host": (1, 1 << 20)}
_RATE, _TIME = (1e-9, 1e9), (1e-6, 1e9)
_NUMBERS = {  # from the least to the most
    "memory_gib": (1e-6, 1e9),
    "memory_gb_per_s": _RATE,
    "repack_gb_per_s": _RATE,
    "intra_host_gb_per_s": _RATE,
    "inter_host_gb_per_s": _RATE,
    "intra_host_latency_us": _TIME,
    "inter_host_latency_us": _TIME,
}


@dataclass(frozen=True)
class Cluster:
    """Equal hosts with equal devices.

    Attributes:
        name: how reports call it.
        hosts: how many.
        devices_per_host: how many on each.
        memory_bytes: of one device.
        device: the speed of one device.
        intra_host_bytes_per_second: from one device to others of its host.
        inter_host_bytes_per_second: from one host to others; its devices share it.
        intra_host_latency, inter_host_latency: seconds of the smallest collective.
        measured: curves of collectives inside a host, which take the place of the formulas; at most one for each kind and
            size of the group.
    """

    name: str
    hosts: int
    devices_per_host: int
    memory_bytes: int
    device: Device
    intra_host_bytes_per_second: float
    inter_host_bytes_per_second: float
    intra_host_latency: float = 5e-6
    inter_host_latency: float = 2e-5
    measured: tuple[Curve, ...] = ()

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.hosts * self.devices_per_host

    def mesh(self, axes: MeshAxes) -> Mesh:
        """A mesh over the first devices, the last axis over neighbours.

        An axis inside a host takes what was measured of groups of its size, if anything was, else the link of the host.
        An axis that leaves the host pays the link between hosts; rings of its neighbours along inner axes share it.

        Raises:
            ConfigError: there are fewer devices, or hosts would be cut unevenly.
        """
        text = axes_text(axes)
        count = num_devices(axes)
        if count > self.num_devices:
            raise ConfigError(
                f"mesh {text} needs {count} devices, {self.name} has {self.num_devices}",
                why=f"{self.hosts} host{'s' * (self.hosts > 1)} of {self.devices_per_host} devices",
                fix="take a smaller mesh, or describe a larger cluster",
            )
        if count > self.devices_per_host and count % self.devices_per_host:
            raise ConfigError(
                f"mesh {text} of {count} devices does not fill hosts of {self.devices_per_host} devices",
                fix="make the product of the sizes a multiple of the devices of a host",
            )
        made, stride = list[Axis](), 1
        for name, size in reversed(axes):
            curves = tuple[Curve, ...]()
            if stride * size <= self.devices_per_host:
                link = self.intra_host_latency, 1 / self.intra_host_bytes_per_second
                curves = tuple(curve for curve in self.measured if curve.group == size)
            else:
                sharing = min(stride, self.devices_per_host)
                between = sharing / self.inter_host_bytes_per_second
                link = self.inter_host_latency, max(between, 1 / self.intra_host_bytes_per_second)
            made.append(Axis(name, size, *link, curves))
            stride *= size
        inside = tuple(c for c in self.measured if c.kind == "all_reduce") if count <= self.devices_per_host else ()
        return Mesh(tuple(reversed(made)), inside, 2 / self.device.bytes_per_second)


CPU_HOST = Cluster("cpu-host", 1, 64, 4 << 30, CPU_CORE, 2e9, 2e9, 5e-5, 5e-5)
"""Cores of one host as devices: collectives are copies through its memory."""


def cluster_or_cores(path: str) -> Cluster:
    """The cluster of a file, as `read_cluster` reads it; the cores of this host where none is named."""
    return read_cluster(path) if path else CPU_HOST


def read_cluster(path: str | Path, table: str | None = None) -> Cluster:
    """Read a cluster from a TOML file.

    The keys are ``hosts``, ``devices_per_host``, ``memory_gib``, ``peak_tflops`` (a table by element type),
    ``memory_gb_per_s``, ``repack_gb_per_s`` (operands of products that sum over rows; nothing is paid without it),
    ``intra_host_gb_per_s`` (of a device), ``inter_host_gb_per_s`` (of a host; needed for more than
    one), ``intra_host_latency_us``, ``inter_host_latency_us``; ``name``, which reports use; and ``measured``, tables
    ``[measured.<kind>.<devices of the group>]`` of collectives inside a host (`bactrian.passes.machine.collective_times`).

    Args:
        path: of the file.
        table: the name of the table that holds them, as in ``cluster.h100``; the top of the file by default.

    Raises:
        ConfigError: the file can't be read; a key is missing or unknown; a rate is not a positive number; `measured` is not
            what `curves_of` takes.
    """
    try:
        data: Any = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the cluster {path}",
            why=error.strerror or str(error) if isinstance(error, OSError) else str(error),
            fix=f"name a TOML file as `bactrian profile-cluster` writes it, with the keys {', '.join(_KEYS)}",
        ) from None
    where = str(path)
    for part in table.split(".") if table else ():
        if not isinstance(data, dict) or part not in data:
            raise ConfigError(f"{path} has no table {table}", where=where)
        data = data[part]
    return cluster_of(data, name=table or Path(path).stem, where=where)


def cluster_of(data: Mapping[str, Any], *, name: str, where: str = "") -> Cluster:
    """A cluster of the keys that `read_cluster` names."""
    name = _name(data, name, where)
    unknown = sorted(set(data) - set(_KEYS))
    if unknown:
        close = [key for each in unknown for key in difflib.get_close_matches(each, _KEYS, 1)]
        raise ConfigError(
            f"cluster {name} has unknown keys: {', '.join(unknown)}",
            where=where,
            fix=(f"did you mean {' and '.join(close)}? " if close else "") + f"keys: {', '.join(_KEYS)}",
        )
    missing = [key for key, needed in _KEYS.items() if needed and key not in data]
    if data.get("hosts", 1) != 1 and "inter_host_gb_per_s" not in data:
        missing.append("inter_host_gb_per_s")
    if missing:
        raise ConfigError(f"cluster {name} lacks {', '.join(missing)}", where=where)
    count = {key: integer_between(data[key], *_COUNTS[key], f"{key} of cluster {name}", where) for key in _COUNTS}
    number = {
        key: number_between(data[key], *bounds, f"{key} of cluster {name}", where)
        for key, bounds in _NUMBERS.items()
        if key in data
    }
    rates = data["peak_tflops"]
    if not isinstance(rates, dict) or not rates:
        raise ConfigError(
            f"peak_tflops of cluster {name} is {brief(rates)}, must be a table of rates by element type", where=where
        )
    flops = {
        dtype: 1e12 * number_between(rate, *_RATE, f"peak_tflops.{dtype} of cluster {name}", where)
        for dtype, rate in rates.items()
    }
    flops.setdefault("default", min(flops.values()))
    return Cluster(
        name=name,
        hosts=count["hosts"],
        devices_per_host=count["devices_per_host"],
        memory_bytes=int(number["memory_gib"] * 2**30),
        device=Device(
            name,
            flops,
            _GIGA * number.get("memory_gb_per_s", 1000.0),
            _GIGA * number.get("repack_gb_per_s", math.inf),
        ),
        intra_host_bytes_per_second=_GIGA * number["intra_host_gb_per_s"],
        inter_host_bytes_per_second=_GIGA * number.get("inter_host_gb_per_s", number["intra_host_gb_per_s"]),
        intra_host_latency=1e-6 * number.get("intra_host_latency_us", 5.0),
        inter_host_latency=1e-6 * number.get("inter_host_latency_us", 20.0),
        measured=_measured(data, count["devices_per_host"], name, where),
    )


def _name(data: Mapping[str, Any], name: str, where: str) -> str:
    given = data.get("name", name)
    if not isinstance(given, str) or not given:
        raise ConfigError(f"name of cluster {name} is {given!r}, must be a string", where=where)
    return given


def _measured(data: Mapping[str, Any], devices_per_host: int, name: str, where: str) -> tuple[Curve, ...]:
    curves = curves_of(data.get("measured", {}), name=name, where=where)
    for curve in curves:
        if curve.group > devices_per_host:
            raise ConfigError(
                f"measured.{curve.kind}.{curve.group} of cluster {name} is of {curve.group} devices, "
                f"a host has {devices_per_host}",
                where=where,
                why="measured collectives are those inside a host",
            )
    return curves
