"""What was measured of a host: the link that fits it, the cluster file, and the report."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bactrian import __version__
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.files import write_whole
from bactrian.passes.frame.units import human_bytes, human_count, human_seconds
from bactrian.passes.machine.cluster_file import cluster_of
from bactrian.passes.machine.collective_times import KINDS
from bactrian.passes.machine.mesh import Axis

if TYPE_CHECKING:
    from rich.console import Group

_LEAST = (1e-3, 1e-6)  # of the latency in µs, and of ns per byte


@dataclass(frozen=True)
class Sample:
    """Seconds of one collective over groups of so many devices, all groups at once.

    ``nbytes`` are those that each device holds before, as in `bactrian.passes.machine.collective_times.Curve`.
    """

    kind: str
    group: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What was measured of one host.

    Attributes:
        description: of the devices, in words.
        num_devices: of the host.
        memory_bytes: of one device.
        memory_source: where that comes from, in words.
        flops_per_second: of a device, by element type; measured with matrix products.
        bytes_per_second: of a device's memory; read and written by an elementwise op.
        samples: of collectives.
        repack_bytes_per_second: of both operands of a product that sums over rows; None where it takes no longer.
        call_seconds: of a call that does next to nothing; None where that was not measured.
    """

    description: str
    num_devices: int
    memory_bytes: int
    memory_source: str
    flops_per_second: dict[str, float]
    bytes_per_second: float
    samples: tuple[Sample, ...]
    repack_bytes_per_second: float | None = None
    call_seconds: float | None = None


@dataclass(frozen=True)
class Link:
    """The alpha-beta model of a link: seconds of a collective at least, and seconds per byte that a device sends."""

    latency: float
    seconds_per_byte: float

    def seconds(self, sample: Sample) -> float:
        """What the model gives for a collective that was measured."""
        return Axis("link", sample.group, self.latency, self.seconds_per_byte).seconds(sample.kind, sample.nbytes)

    def largest_error(self, samples: Iterable[Sample]) -> float:
        """The largest relative one: 0.5 where 2 s were measured and the model gives 1 s or 3 s."""
        return max(abs(self.seconds(sample) / sample.seconds - 1) for sample in samples)


def fit_link(samples: Sequence[Sample]) -> Link:
    """The link whose model has the least sum of squared relative errors over the samples.

    With ``t`` the seconds of a sample and ``b`` the bytes that a device sends in it, the least squares of
    ``(latency + b * seconds_per_byte) / t = 1``: 3 µs for 1,000 and 5 µs for 2,000 bytes give 1 µs and 0.5 GB/s. Both
    unknowns stay above 0.
    """
    from scipy.optimize import lsq_linear

    sends = Link(0.0, 1.0)
    seconds = np.array([sample.seconds for sample in samples])
    sent = np.array([sends.seconds(sample) for sample in samples])
    rows = np.stack([1e-6 / seconds, 1e-9 * sent / seconds], axis=1)  # unknowns in µs and in ns per byte
    found = lsq_linear(rows, np.ones(len(samples)), bounds=(_LEAST, np.inf))
    return Link(1e-6 * float(found.x[0]), 1e-9 * float(found.x[1]))


def cluster_text(profile: Profile, name: str | None = None) -> str:
    """The cluster file: one host as it was measured.

    Raises:
        ConfigError: the measurements are not usable as a cluster file, as when large messages took no longer than small ones.
    """
    link = fit_link(profile.samples)
    repack, call = profile.repack_bytes_per_second, profile.call_seconds
    rates = {"default": profile.flops_per_second["f32"]} | profile.flops_per_second
    lines = [
        f"# Measured by `bactrian profile-cluster` {__version__}: {profile.description}, all busy at once.",
        *([f"name = {json.dumps(name, ensure_ascii=False)}"] if name is not None else []),
        "# Links between hosts are not measured: for several hosts, set hosts, inter_host_gb_per_s and",
        "# inter_host_latency_us by hand.",
        "hosts = 1",
        f"devices_per_host = {profile.num_devices}",
        f"memory_gib = {_number(profile.memory_bytes / 2**30)}  # {profile.memory_source}",
        f"memory_gb_per_s = {_number(profile.bytes_per_second / 1e9)}  # of a device: read and written by one op",
        *([f"repack_gb_per_s = {_number(repack / 1e9)}  # of operands of products over rows"] if repack else []),
        *([f"call_us = {_number(call / 1e-6)}  # of a call of a stage function, beside its work"] if call else []),
        "# The model of a collective that has no table below: latency + bytes that a device sends / rate.",
        f"intra_host_gb_per_s = {_number(1e-9 / link.seconds_per_byte)}",
        f"intra_host_latency_us = {_number(link.latency / 1e-6)}",
        "",
        "[peak_tflops]  # of a device, in matrix products",
        *(f"{dtype} = {_number(rate / 1e12)}" for dtype, rate in rates.items()),
        "",
        "# [measured.<collective>.<devices of a group>]: bytes that each device holds before, and seconds.",
        *_tables(profile.samples),
    ]
    text = "\n".join(lines)
    try:
        cluster_of(tomllib.loads(text), name="measured")
    except ConfigError as error:
        raise ConfigError(
            f"the measurements are not usable as a cluster file: {error.message}",
            why=error.why or "something else kept the devices busy",
            fix="measure for longer with --seconds, or when nothing else runs",
        ) from None
    return text


def _tables(samples: Sequence[Sample]) -> Iterator[str]:
    for (kind, group), curve in _curves(samples):
        yield f"[measured.{kind}.{group}]"
        yield f"bytes = [{', '.join(str(sample.nbytes) for sample in curve)}]"
        yield f"seconds = [{', '.join(_number(sample.seconds) for sample in curve)}]"
        yield ""


def _curves(samples: Sequence[Sample]) -> list[tuple[tuple[str, int], list[Sample]]]:
    """Samples by kind and group, by bytes."""
    ordered = sorted(samples, key=lambda sample: (KINDS.index(sample.kind), sample.group, sample.nbytes))
    return [(key, list(curve)) for key, curve in groupby(ordered, key=lambda sample: (sample.kind, sample.group))]


def _number(value: float) -> str:
    return f"{value:.4g}"


def render_profile(profile: Profile) -> Group:
    """What was measured, and how well one link describes it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    link = fit_link(profile.samples)
    rates = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rates.add_column(style="bold", no_wrap=True)
    rates.add_column()
    for dtype, rate in profile.flops_per_second.items():
        rates.add_row(f"matmul {dtype}", human_count(rate, "flop/s"))
    rates.add_row("elementwise", f"{human_count(profile.bytes_per_second, 'B/s')} read and written")
    if profile.repack_bytes_per_second is not None:
        rates.add_row(
            "repacking", f"{human_count(profile.repack_bytes_per_second, 'B/s')} of operands of products over rows"
        )
    if profile.call_seconds is not None:
        rates.add_row("call", f"{human_seconds(profile.call_seconds)} beside its work")
    rates.add_row("memory", f"{human_bytes(profile.memory_bytes)}, {profile.memory_source}")
    rates.add_row(
        "link", f"{human_seconds(link.latency)} + bytes sent / {human_count(1 / link.seconds_per_byte, 'B/s')}"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("collective", no_wrap=True)
    for column in ("group", "smallest", "", "largest", "", "link is off by"):
        table.add_column(column, justify="right", no_wrap=True)
    for (kind, group), curve in _curves(profile.samples):
        ends = [text for end in (curve[0], curve[-1]) for text in (human_bytes(end.nbytes), human_seconds(end.seconds))]
        table.add_row(kind, str(group), *ends, f"{link.largest_error(curve):.0%}")
    note = "bytes on each device before · plans take the measured times, and the link where there are none"
    return Group(Text(f"{profile.description}, all busy at once; figures of one device\n"), rates, "", table, "", note)


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a file that can't be written, before anything is measured.

    Raises:
        ConfigError: the folder is missing or closed, the path is a folder, or the file is there and not ``force``.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"cannot write {path}: {what}", fix="name a TOML file with --output")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: no permission", fix="name another file with --output")
    if path.exists() and not force:
        raise ConfigError(
            f"{path} is there already", why="it may have been edited", fix="name another with --output, or give --force"
        )


def write_cluster(path: Path, text: str) -> None:
    """Write the file.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", fix="name another file with --output") from None
