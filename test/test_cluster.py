"""Clusters from TOML, and the links under the axes of a mesh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.machine.cluster import CPU_HOST, Cluster
from bactrian.passes.machine.cluster_file import cluster_of, read_cluster
from bactrian.passes.machine.device import Device
from bactrian.passes.machine.host_group import HostGroup

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


def small(**changes: Any) -> HostGroup:
    return cluster_of(KEYS | changes, name="small").only_group("a test")


def two_kinds(**large: Any) -> Cluster:
    """2 hosts of 4 devices, then 1 of 8."""
    kinds = [
        KEYS | {"name": "small"},
        KEYS | {"name": "large", "hosts": 1, "devices_per_host": 8, "memory_gib": 80} | large,
    ]
    return cluster_of({"groups": kinds}, name="mixed")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(TEXT)
    cluster = read_cluster(f"{path}:cluster.small").only_group("a test")
    assert (cluster.hosts, cluster.devices_per_host, cluster.memory_bytes) == (2, 4, 16 << 30)
    assert cluster.device.flops_per_second == {"f16": 125e12, "f32": 15.7e12}
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
        ({"call_us": -1}, "call_us .* is -1"),
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
    assert read_cluster(f"{path}:small").name == "small", "the last part of a table's name is enough"
    for name, fix in (("smal", "did you mean small?"), ("x", "its clusters are cluster.small")):
        with pytest.raises(ConfigError, match=f"has no table {name}") as raised:
            read_cluster(f"{path}:{name}")
        assert raised.value.fix == fix
    with pytest.raises(ConfigError, match="holds 1 clusters") as raised:
        read_cluster(path)
    assert raised.value.fix.endswith("cluster.toml:small")
    path.write_text(TEXT + TEXT.replace("cluster.small", "other.small"))
    with pytest.raises(ConfigError, match="has 2 tables small") as raised:
        read_cluster(f"{path}:small")
    assert raised.value.why == "cluster.small, other.small"
    path.write_text("[machines]\ncount = 2\n")
    with pytest.raises(ConfigError, match="has no table machines") as raised:
        read_cluster(f"{path}:machines")
    assert raised.value.why == "none of its tables describes hosts"


GROUPS = """
name = "mixed"
[[groups]]
name = "small"
hosts = 2
devices_per_host = 4
memory_gib = 16
peak_tflops = { f16 = 125 }
intra_host_gb_per_s = 150
inter_host_gb_per_s = 3.125
[groups.measured.all_gather.4]
bytes = [1, 2]
seconds = [1, 2]
[[groups]]
name = "large"
hosts = 1
devices_per_host = 8
memory_gib = 80
peak_tflops = { bf16 = 989 }
intra_host_gb_per_s = 450
inter_host_gb_per_s = 50
inter_host_latency_us = 50
"""


def test_a_file_with_two_kinds_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(GROUPS)
    cluster = read_cluster(path)
    assert cluster.description == "2 hosts of 4 small, 1 host of 8 large"
    assert [len(group.measured) for group in cluster.groups] == [1, 0]
    assert [group.memory_bytes >> 30 for group in cluster.groups] == [16, 80]
    path.write_text("[a]" + GROUPS.replace("[groups", "[a.groups"))
    assert read_cluster(f"{path}:a") == cluster, "as a table of a larger file"


def test_devices_are_on_a_line() -> None:
    cluster = two_kinds()
    assert (cluster.num_devices, cluster.first_devices) == (16, (0, 8))
    assert [cluster.group_of(device).name for device in (0, 7, 8, 15)] == ["small", "small", "large", "large"]
    assert [cluster.host_of(device) for device in (0, 3, 4, 7, 8, 15)] == [0, 0, 1, 1, 2, 2]
    for outside in (-1, 16):
        with pytest.raises(ValueError, match=f"device {outside} of 16"):
            cluster.group_of(outside)


def test_a_mesh_lies_in_a_host_or_fills_hosts_of_one_kind() -> None:
    cluster = two_kinds()
    for device in range(cluster.num_devices + 2):
        for count in range(1, 18):
            # Of all places the first one that the rule allows.
            def allowed(first: int, count: int = count) -> bool:
                if first + count > 16 or cluster.group_of(first) is not cluster.group_of(first + count - 1):
                    return False
                hosts = {cluster.host_of(each) for each in range(first, first + count)}
                size = cluster.group_of(first).devices_per_host
                return len(hosts) == 1 or (len(hosts) * size == count)

            expected = next((first for first in range(device, 16) if allowed(first)), None)
            assert cluster.next_place(device, count) == expected, (device, count)


def test_stages_are_laid_along_the_line() -> None:
    cluster = two_kinds()
    assert cluster.places((3, 3, 2, 6)) == (0, 4, 8, 10)
    with pytest.raises(ConfigError, match="stage 2 of 8 devices has no place in mixed") as raised:
        cluster.places((8, 1, 8))
    assert raised.value.why.startswith(
        "7 of 16 devices are behind the stages before it: 2 hosts of 4 small, 1 host of 8"
    )


def test_links_between_hosts_are_those_of_the_slower_one() -> None:
    cluster = two_kinds(inter_host_gb_per_s=50, inter_host_latency_us=50, intra_host_gb_per_s=450)
    assert cluster.link(0, 3) == pytest.approx((5e-6, 150e9))
    assert cluster.link(8, 9) == pytest.approx((5e-6, 450e9))
    assert cluster.link(3, 4) == pytest.approx((2e-5, 3.125e9))
    assert cluster.link(0, 15) == cluster.link(15, 0) == pytest.approx((5e-5, 3.125e9))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"groups": 2}, "groups of cluster mixed is 2, must be tables"),
        ({"groups": []}, r"groups of cluster mixed is \[\], must be tables"),
        ({"groups": [3]}, r"must be tables \[\[groups\]\]"),
        ({"groups": [KEYS], "memory_gib": 3}, r"cluster mixed has memory_gib beside \[\[groups\]\]"),
        ({"groups": [KEYS | {"name": "a"}, KEYS | {"name": "a"}]}, "two groups of one name: a, a"),
        ({"groups": [KEYS, {k: v for k, v in KEYS.items() if k != "hosts"}]}, "cluster mixed-1 lacks hosts"),
        (
            {"groups": [{k: v for k, v in (KEYS | {"hosts": 1}).items() if k != "inter_host_gb_per_s"}] * 2},
            "cluster mixed-0 lacks inter_host_gb_per_s",
        ),
        ({"groups": [KEYS | {"host": 2}]}, "cluster mixed-0 has unknown keys: host"),
        ({"groups": [KEYS | {"name": 3}]}, "name of cluster mixed-0 is 3, must be a string"),
    ],
)
def test_groups_without_meaning_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_of(data, name="mixed")


def test_what_needs_equal_hosts_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match="a profile needs equal hosts, mixed has 2 kinds") as raised:
        two_kinds().only_group("a profile")
    assert raised.value.why == "2 hosts of 4 small, 1 host of 8 large"


@pytest.mark.parametrize(
    ("rates", "dtype", "counts"),
    [
        ("f16 f32", "f32", "f32"),
        ("f16 f32", "bf16", "f16"),
        ("bf16 f32", "f16", "bf16"),
        ("f32 f64", "bf16", "f32"),
        ("f16 f32", "f64", "f32"),
        ("bf16 f32", "f8E4M3FN", "bf16"),
        ("f16 f32", "i32", "f32"),
        ("i8 f32", "i32", "i8"),
        ("f16 default", "f32", "default"),
    ],
)
def test_a_type_without_a_rate_has_that_of_the_nearest(rates: str, dtype: str, counts: str) -> None:
    device = Device("a", {name: 1e9 * number for number, name in enumerate(rates.split(), 1)}, 1e9)
    assert device.rated_as(dtype) == counts
    assert device.rate(dtype) == device.flops_per_second[counts]
