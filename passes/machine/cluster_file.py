"""Clusters read from TOML files."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import brief, integer_between, number_between
from bactrian.passes.machine.cluster import CPU_CLUSTER, Cluster
from bactrian.passes.machine.collective_times import Curve, curves_of
from bactrian.passes.machine.device import Device
from bactrian.passes.machine.host_group import HostGroup

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
    "call_us": False,
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
    "call_us": _TIME,
}
_WITH_TABLE = re.compile(r"(?P<path>.*\.toml):(?P<table>[^:/]+)", re.DOTALL)

Table = Mapping[str, Any]


def cluster_or_cores(cluster: str) -> Cluster:
    """The cluster that `read_cluster` reads; the cores of this host where none is named."""
    return read_cluster(cluster) if cluster else CPU_CLUSTER


def split_table(cluster: str | Path) -> tuple[Path, str]:
    """``"suite.toml:h100"`` as the file and the name of one of its tables, "" for the whole file."""
    found = _WITH_TABLE.fullmatch(str(cluster))
    return (Path(found["path"]), found["table"]) if found else (Path(cluster), "")


def file_text(cluster: str | Path) -> str:
    """The text of a cluster's file.

    Raises:
        ConfigError: it can't be read.
    """
    path, _ = split_table(cluster)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error.strerror or str(error) if isinstance(error, OSError) else str(error)) from None


def read_cluster(cluster: str | Path) -> Cluster:
    """Read a cluster from a TOML file.

    The keys of equal hosts are ``hosts``, ``devices_per_host``, ``memory_gib``, ``peak_tflops`` (a table by element type),
    ``memory_gb_per_s``, ``repack_gb_per_s`` (operands of products that sum over rows; nothing is paid without it),
    ``intra_host_gb_per_s`` (of a device), ``inter_host_gb_per_s`` (of a host; needed for more than one),
    ``intra_host_latency_us``, ``inter_host_latency_us``; ``call_us`` (of a call of a stage function, beside its work; 0
    without it); ``name``, which reports use; and ``measured``, tables
    ``[measured.<kind>.<devices of the group>]`` of collectives inside a host (`bactrian.passes.machine.collective_times`).

    Hosts of several kinds are tables ``[[groups]]`` of these keys, in the order of the line; beside them only ``name``
    stands.

    Args:
        cluster: the file; or ``file.toml:name``, a table of it by its full name or the last part of that.

    Raises:
        ConfigError: the file can't be read; there is no such table; a key is missing or unknown; a rate is not a positive
            number; `measured` is not what `curves_of` takes.
    """
    path, table = split_table(cluster)
    return parse_cluster(file_text(cluster), table, name=table.rpartition(".")[2] or path.stem, where=str(path))


def parse_cluster(text: str, table: str = "", *, name: str, where: str) -> Cluster:
    """A cluster from the text of a file, as `read_cluster` says.

    Args:
        text: of the file.
        table: of its tables, "" for the whole.
        name: for reports, where the file has none.
        where: the file, for errors.

    Raises:
        ConfigError: as `read_cluster`.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, str(error)) from None
    clusters = dict(_clusters(data))
    if table:
        return cluster_of(_table(clusters, table, where), name=name, where=where)
    if clusters and not any(key in data for key in (*_KEYS, "groups")):
        raise ConfigError(
            f"{where} holds {len(clusters)} clusters",
            why=", ".join(clusters),
            fix=f"name one of them, as in {where}:{next(iter(clusters)).rpartition('.')[2]}",
        )
    return cluster_of(data, name=name, where=where)


def _unreadable(path: str | Path, why: str) -> ConfigError:
    return ConfigError(
        f"cannot read the cluster {path}",
        why=why,
        fix=f"name a TOML file as `bactrian profile-cluster` writes it, with the keys {', '.join(_KEYS)}",
    )


def _clusters(data: Table, prefix: str = "") -> Iterator[tuple[str, Table]]:
    """The tables inside another one that describe hosts, by their full names."""
    for key, value in data.items():
        if isinstance(value, dict):
            table = cast(Table, value)
            if "devices_per_host" in table or "groups" in table:
                yield prefix + key, table
            yield from _clusters(table, f"{prefix}{key}.")


def _table(clusters: Mapping[str, Table], wanted: str, where: str) -> Table:
    found = [name for name in clusters if wanted in (name, name.rpartition(".")[2])]
    if len(found) == 1:
        return clusters[found[0]]
    if found:
        raise ConfigError(
            f"{where} has {len(found)} tables {wanted}", why=", ".join(found), fix="give the full name of one of them"
        )
    if not clusters:
        raise ConfigError(f"{where} has no table {wanted}", why="none of its tables describes hosts")
    close = difflib.get_close_matches(wanted, [*clusters, *(name.rpartition(".")[2] for name in clusters)], 1)
    fix = f"did you mean {close[0]}?" if close else f"its clusters are {', '.join(clusters)}"
    raise ConfigError(f"{where} has no table {wanted}", fix=fix)


def cluster_of(data: Table, *, name: str, where: str = "") -> Cluster:
    """A cluster of the keys that `read_cluster` names."""
    name = _name(data, name, where)
    if "groups" not in data:
        return Cluster(name, (_group(data, name, where),))
    if strange := sorted(set(data) - {"groups", "name"}):
        raise ConfigError(
            f"cluster {name} has {', '.join(strange)} beside [[groups]]",
            where=where,
            fix="give them in every table [[groups]]",
        )
    tables = cast(Sequence[Any], data["groups"])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"groups of cluster {name} is {brief(tables)}, must be tables [[groups]]", where=where)
    names = [_name(table, f"{name}-{number}", where) for number, table in enumerate(tables)]
    if len(set(names)) != len(names):
        raise ConfigError(
            f"cluster {name} has two groups of one name: {', '.join(names)}",
            where=where,
            fix="give every table [[groups]] a name of its own",
        )
    several = len(tables) > 1
    return Cluster(name, tuple(_group(table, own, where, several) for table, own in zip(tables, names, strict=True)))


def _group(data: Table, name: str, where: str, has_others: bool = False) -> HostGroup:
    """Equal hosts of the keys of a plain file; ``has_others``: the cluster has other hosts beside these."""
    unknown = sorted(set(data) - set(_KEYS))
    if unknown:
        close = [key for each in unknown for key in difflib.get_close_matches(each, _KEYS, 1)]
        raise ConfigError(
            f"cluster {name} has unknown keys: {', '.join(unknown)}",
            where=where,
            fix=(f"did you mean {' and '.join(close)}? " if close else "") + f"keys: {', '.join(_KEYS)}",
        )
    missing = [key for key, needed in _KEYS.items() if needed and key not in data]
    if (has_others or data.get("hosts", 1) != 1) and "inter_host_gb_per_s" not in data:
        missing.append("inter_host_gb_per_s")
    if missing:
        raise ConfigError(f"cluster {name} lacks {', '.join(missing)}", where=where)
    count = {key: integer_between(data[key], *_COUNTS[key], f"{key} of cluster {name}", where) for key in _COUNTS}
    number = {
        key: number_between(data[key], *bounds, f"{key} of cluster {name}", where)
        for key, bounds in _NUMBERS.items()
        if key in data
    }
    return HostGroup(
        name=name,
        hosts=count["hosts"],
        devices_per_host=count["devices_per_host"],
        memory_bytes=int(number["memory_gib"] * 2**30),
        device=Device(
            name,
            _rates(data["peak_tflops"], name, where),
            _GIGA * number.get("memory_gb_per_s", 1000.0),
            _GIGA * number.get("repack_gb_per_s", math.inf),
        ),
        intra_host_bytes_per_second=_GIGA * number["intra_host_gb_per_s"],
        inter_host_bytes_per_second=_GIGA * number.get("inter_host_gb_per_s", number["intra_host_gb_per_s"]),
        intra_host_latency=1e-6 * number.get("intra_host_latency_us", 5.0),
        inter_host_latency=1e-6 * number.get("inter_host_latency_us", 20.0),
        measured=_measured(data, count["devices_per_host"], name, where),
        call_seconds=1e-6 * number.get("call_us", 0.0),
    )


def _rates(rates: Any, name: str, where: str) -> dict[str, float]:
    if not isinstance(rates, dict) or not rates:
        raise ConfigError(
            f"peak_tflops of cluster {name} is {brief(rates)}, must be a table of rates by element type", where=where
        )
    return {
        dtype: 1e12 * number_between(rate, *_RATE, f"peak_tflops.{dtype} of cluster {name}", where)
        for dtype, rate in cast(Table, rates).items()
    }


def _name(data: Table, name: str, where: str) -> str:
    given = data.get("name", name)
    if not isinstance(given, str) or not given:
        raise ConfigError(f"name of cluster {name} is {given!r}, must be a string", where=where)
    return given


def _measured(data: Table, devices_per_host: int, name: str, where: str) -> tuple[Curve, ...]:
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
