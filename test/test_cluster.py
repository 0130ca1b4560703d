"""Clusters from TOML, and the links under the axes of a mesh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.cluster import CPU_HOST, Cluster, cluster_of, read_cluster

KEYS: dict[str, Any] = {
    "hosts": 2,
    "devices_per_host": 4,
    "memory_gib": 16,
    "peak_tflops": {"f16": 125, "f32": 15.7},
    "memory_gb_per_s": 900,
    "intra_host_gb_per_s": 150,
    "inter_host_gb_per_s": 3.125,
}
TEXT = """
[cluster.small]
hosts = 2
devices_per_host = 4
memory_gib = 16
memory_gb_per_s = 900
intra_host_gb_per_s = 150  # a comment
inter_host_gb_per_s = 3.125
peak_tflops = { f16 = 125, f32 = 15.7 }
"""


def small(**changes: Any) -> Cluster:
    return cluster_of(KEYS | changes, name="small")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    cluster = read_cluster(path, "cluster.small")
    assert (cluster.hosts, cluster.devices_per_host, cluster.memory_bytes) == (2, 4, 16 << 30)
    assert cluster.device.flops_per_second == {"f16": 125e12, "f32": 15.7e12, "default": 15.7e12}
    assert cluster.inter_host_bytes_per_second == 3.125e9


def test_axes_pay_for_their_links() -> None:
    data, model = small().mesh((("data", 2), ("model", 4))).axes
    assert model.seconds_per_byte == 1 / 150e9
    assert data.seconds_per_byte == 4 / 3.125e9  # four rings share the host's link
    assert data.latency > model.latency
    (both,) = small().mesh((("data", 8),)).axes
    assert both.seconds_per_byte == 1 / 3.125e9  # one ring leaves each host once


@pytest.mark.parametrize(
    ("axes", "message"),
    [((("data", 16),), "needs 16 devices"), ((("data", 2), ("model", 3)), "does not fill hosts")],
)
def test_a_mesh_that_does_not_fit_is_refused(axes: tuple[tuple[str, int], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small().mesh(axes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "unknown keys: speed"),
        ({"hosts": 0}, "hosts .* is 0"),
        ({"hosts": 1.5}, "must be an integer"),
        ({"memory_gib": -1}, "memory_gib .* is -1"),
        ({"memory_gib": 1e308}, r"memory_gib of cluster small is 1e\+308, must be a number from 1e-06 to 1e\+09"),
        ({"hosts": 1 << 21}, "hosts of cluster small is 2097152, must be an integer from 1 to 1048576"),
        ({"intra_host_gb_per_s": math.nan}, "is nan"),
        ({"intra_host_gb_per_s": math.inf}, "is inf"),
        ({"intra_host_gb_per_s": "fast"}, "is 'fast'"),
        ({"devices_per_host": True}, "is True"),
        ({"peak_tflops": {}}, "must be a table of rates"),
        ({"peak_tflops": {"f32": -2}}, "peak_tflops.f32 .* is -2"),
        ({"peak_tflops": 3}, "must be a table of rates"),
        ({"repack_gb_per_s": 0}, "repack_gb_per_s .* is 0"),
        ({"repack_gb_per_s": math.nan}, "repack_gb_per_s .* is nan"),
    ],
)
def test_values_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_mistyped_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        small(memory_gb=80, speed=1)
    assert raised.value.fix.startswith("did you mean memory_gib? keys: hosts, ")
    with pytest.raises(ConfigError) as raised:
        read_cluster(tmp_path / "nowhere.toml")
    assert raised.value.why == "No such file or directory"
    assert "profile-cluster" in raised.value.fix and "devices_per_host" in raised.value.fix
    with pytest.raises(ConfigError) as raised:
        CPU_HOST.mesh((("data", 128),))
    assert raised.value.why == "1 host of 64 devices"


@pytest.mark.parametrize("key", ["hosts", "memory_gib", "peak_tflops", "inter_host_gb_per_s"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {key}"):
        cluster_of({name: value for name, value in KEYS.items() if name != key}, name="small")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    with pytest.raises(ConfigError, match="cannot read"):
        read_cluster(path)
    for broken in ("hosts = ", "hosts = " + "[" * 5000):
        path.write_text(broken)
        with pytest.raises(ConfigError, match="cannot read"):
            read_cluster(path)
    path.write_text(TEXT)
    with pytest.raises(ConfigError, match=r"has no table cluster\.big"):
        read_cluster(path, "cluster.big")
