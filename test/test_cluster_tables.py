"""Measured times of collectives in cluster files: read, interpolated, used; and `bactrian profile-cluster`."""

from __future__ import annotations

import math
import os
import re
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from commands import bactrian

from bactrian.driver import cli
from bactrian.driver.profile import cluster_profile, measure_host
from bactrian.driver.profile.cluster_profile import Profile, Sample, cluster_text, fit_link
from bactrian.passes.frame.errors import BactrianError, ConfigError
from bactrian.passes.machine.cluster_file import cluster_of, read_cluster
from bactrian.passes.machine.collective_times import KINDS, Curve
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.plan.schema import Plan

ROOT = Path(__file__).resolve().parent.parent
KEYS: dict[str, Any] = {
    "hosts": 2,
    "devices_per_host": 4,
    "memory_gib": 16,
    "peak_tflops": {"f32": 15.7},
    "intra_host_gb_per_s": 1,
    "inter_host_gb_per_s": 1,
    "intra_host_latency_us": 1,
}
TABLE: dict[str, Any] = {"bytes": [100, 200, 400], "seconds": [1.0, 3.0, 4.0]}


def hosts_of(data: dict[str, Any], name: str = "small") -> HostGroup:
    return cluster_of(data, name=name).only_group("a test")


def measured(**tables: Any) -> HostGroup:
    return hosts_of(KEYS | {"measured": {kind: {"4": table} for kind, table in tables.items()}})


def axis(cluster: HostGroup, size: int = 4) -> Axis:
    return cluster.mesh((("model", size),)).axes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_takes_its_table_and_no_other(kind: str) -> None:
    plain, ours = axis(measured()), axis(measured(**{kind: TABLE}))
    for other in KINDS:
        expected = 2.0 if other == kind else plain.seconds(other, 150)
        assert ours.seconds(other, 150) == expected
    methods = {
        "all_gather": ours.all_gather,
        "reduce_scatter": ours.reduce_scatter,
        "all_reduce": ours.all_reduce,
        "all_to_all": ours.all_to_all,
        "collective_permute": ours.permute,
    }
    # A reduce-scatter takes at most what an all-reduce takes.
    assert [name for name, method in methods.items() if method(150) == 2.0] == [kind] * (kind != "reduce_scatter")
    assert ours.reduce_scatter(150) == min(ours.seconds("reduce_scatter", 150), ours.all_reduce(150))


def test_between_and_beyond_the_points() -> None:
    seconds = axis(measured(all_gather=TABLE)).all_gather
    assert [seconds(nbytes) for nbytes in (1, 100, 150, 200, 300, 400)] == [1, 1, 2, 3, 3.5, 4]
    # The table grows by 3 s over 300 bytes, its last piece by 1 s over 200: the steeper goes on.
    assert seconds(700) == pytest.approx(7.0)
    steep = axis(measured(all_gather={"bytes": [1, 101, 102], "seconds": [1, 2, 4]})).all_gather
    assert steep(103) == pytest.approx(6.0)


def test_a_dip_counts_as_what_came_before() -> None:
    dipped = axis(measured(all_to_all={"bytes": [1, 2, 3, 4], "seconds": [2, 5, 4, 6]})).all_to_all
    assert [dipped(nbytes) for nbytes in (2, 2.5, 3, 3.5, 4)] == [5, 5, 5, 5.5, 6]
    ending = axis(measured(all_to_all={"bytes": [1, 2, 3], "seconds": [2, 6, 4]})).all_to_all
    assert ending(3) == 6
    assert ending(5) == pytest.approx(10)  # 4 s over 2 bytes, of the whole table
    # 5.249e-06 + (4.281e-05 - 5.249e-06) is more than 4.281e-05, after rounding.
    curve = Curve("all_gather", 4, (0.5, 1.0), (5.249e-06, 4.281e-05))
    assert curve.seconds_for(1.0) == 4.281e-05
    costs = [curve.seconds_for(number / 200) for number in range(400)]
    assert all(before <= after for before, after in pairwise(costs))


def test_groups_of_another_size_and_hosts_apart_take_the_formula() -> None:
    cluster, plain = measured(all_gather=TABLE), measured()
    assert axis(cluster, 2) == axis(plain, 2)
    assert axis(cluster, 8) == axis(plain, 8)
    between, inside = cluster.mesh((("data", 2), ("model", 4))).axes
    assert inside.measured and not between.measured
    with pytest.raises(ConfigError, match="axis a of 2 devices has a curve for 4"):
        Mesh((Axis("a", 2, measured=inside.measured),))


def test_all_reduces_take_the_table_of_as_many_devices() -> None:
    wide = KEYS | {"devices_per_host": 8}
    tables = {"all_reduce": {"4": TABLE, "2": {"bytes": [1, 2], "seconds": [70, 80]}}}
    mesh = hosts_of(wide | {"measured": tables}).mesh((("data", 2), ("model", 4)))
    plain = hosts_of(wide).mesh((("data", 2), ("model", 4)))
    assert mesh.all_reduce(["model"], 300) == 3.5
    assert mesh.all_reduce(["data"], 1) == 70
    assert mesh.all_reduce(["data", "model"], 300) == plain.all_reduce(["data", "model"], 300)
    joint = tables["all_reduce"] | {"8": {"bytes": [1, 2], "seconds": [500, 600]}}
    whole = wide | {"measured": {"all_reduce": joint}}
    assert hosts_of(whole).mesh((("data", 2), ("model", 4))).all_reduce(["data", "model"], 1) == 500
    apart = hosts_of(whole | {"hosts": 2, "inter_host_gb_per_s": 1}).mesh((("data", 4), ("model", 4)))
    assert apart.all_reduce(["data", "model"], 1) < 500  # between hosts nothing is measured
    assert hash(mesh) != hash(plain) and mesh == hosts_of(wide | {"measured": tables}, "y").mesh(
        (("data", 2), ("model", 4))
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, r"measured of cluster small is 3, must be a table"),
        ({"all_scatter": {"4": TABLE}}, r"measured\.all_scatter .* no such collective"),
        ({"all_gather": [TABLE]}, r"measured\.all_gather .* must be a table by size"),
        ({"all_gather": TABLE}, r"measured\.all_gather\.bytes .* 'bytes' is not a number of devices"),
        ({"all_gather": {"1": TABLE}}, r"measured\.all_gather\.1 .* not a number of devices, 2 or more"),
        ({"all_gather": {"04": TABLE}}, r"measured\.all_gather\.04 .* not a number of devices"),
        ({"all_gather": {"8": TABLE}}, r"measured\.all_gather\.8 .* of 8 devices, a host has 4"),
        ({"all_gather": {"4": {"bytes": [1, 2]}}}, r"measured\.all_gather\.4 .* keys bytes and seconds"),
        ({"all_gather": {"4": TABLE | {"us": [1]}}}, r"measured\.all_gather\.4 .* no others"),
        ({"all_gather": {"4": TABLE | {"bytes": 3}}}, r"measured\.all_gather\.4\.bytes .* must be a list"),
        ({"all_gather": {"4": TABLE | {"bytes": [100, 200]}}}, r"all_gather\.4 .* has 2 bytes and 3 seconds"),
        ({"all_gather": {"4": TABLE | {"bytes": [-1, 2, 3]}}}, r"entry 0 of measured\.all_gather\.4\.bytes .* is -1"),
        ({"all_gather": {"4": TABLE | {"bytes": [1, 2, 2]}}}, r"all_gather\.4\.bytes .* 2 comes after 2"),
        ({"all_gather": {"4": TABLE | {"bytes": [1, 3, 2]}}}, r"all_gather\.4\.bytes .* 2 comes after 3"),
        ({"all_gather": {"4": TABLE | {"bytes": [1, 2, math.nan]}}}, r"entry 2 of .*\.4\.bytes .* is nan"),
        ({"all_gather": {"4": TABLE | {"seconds": [1, math.nan, 2]}}}, r"entry 1 of .*\.4\.seconds .* is nan"),
        ({"all_gather": {"4": TABLE | {"seconds": [1, 0, 2]}}}, r"entry 1 of .*\.4\.seconds .* is 0"),
        ({"all_gather": {"4": TABLE | {"seconds": [1, "2", 3]}}}, r"entry 1 of .*\.4\.seconds .* is '2'"),
        ({"all_gather": {"4": {"bytes": [1], "seconds": [1]}}}, r"all_gather\.4\.bytes .* fewer than two"),
        ({"all_gather": {"4": TABLE | {"seconds": [3, 2, 1]}}}, r"all_gather\.4\.seconds .* do not grow"),
    ],
)
def test_tables_without_meaning_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_of(KEYS | {"measured": data}, name="small")


def test_the_example_of_the_docs_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "semantics.md").read_text().partition("```toml\n")[2].partition("```")[0]
    path = tmp_path / "cluster.toml"
    for example in (text, text.replace("\n# ", "\n")):
        path.write_text(example)
        cluster = read_cluster(path).only_group("a test")
        assert axis(cluster, 8).all_gather(131072) == 2.1e-05
    assert (cluster.name, cluster.inter_host_bytes_per_second) == ("h100", 50e9)


def test_the_name_is_the_one_that_is_given() -> None:
    assert cluster_of(KEYS | {"name": "big"}, name="small").name == "big"
    with pytest.raises(ConfigError, match="name of cluster small is 3"):
        cluster_of(KEYS | {"name": 3}, name="small")


# What is written


def profile(latency: float = 2e-6, seconds_per_byte: float = 5e-10) -> Profile:
    """Of a host that keeps to the formula."""
    samples = list[Sample]()
    for kind in KINDS:
        for group in (2, 4):
            link = Axis("link", group, latency, seconds_per_byte)
            samples += [Sample(kind, group, size, link.seconds(kind, size)) for size in (1 << 18, 1 << 10, 1 << 14)]
    return Profile("4 devices", 4, 3 << 29, "by hand", {"f32": 4e12, "bf16": 9e12, "f16": 1e12}, 2e11, tuple(samples))


def test_the_fit_finds_what_the_samples_were_made_with() -> None:
    link = fit_link(profile().samples)
    assert link.latency == pytest.approx(2e-6, rel=1e-6)
    assert link.seconds_per_byte == pytest.approx(5e-10, rel=1e-6)
    assert link.largest_error(profile().samples) < 1e-6
    two = (Sample("collective_permute", 2, 1000, 3e-6), Sample("collective_permute", 2, 2000, 5e-6))
    assert fit_link(two).latency == pytest.approx(1e-6) and fit_link(two).seconds_per_byte == pytest.approx(2e-9)
    assert fit_link(profile(latency=0.0).samples).latency > 0


def test_a_profile_is_read_back() -> None:
    data = tomllib.loads(cluster_text(profile(), 'four "fast" ones'))
    cluster = hosts_of(data)
    assert cluster.name == 'four "fast" ones'
    assert (cluster.hosts, cluster.devices_per_host, cluster.memory_bytes) == (1, 4, 3 << 29)
    assert cluster.device.flops_per_second == {"f32": 4e12, "bf16": 9e12, "f16": 1e12, "default": 4e12}
    assert cluster.device.bytes_per_second == 2e11
    assert cluster.device.repack_bytes_per_second == math.inf  # not measured: nothing is paid for it
    assert hosts_of(tomllib.loads(cluster_text(replace(profile(), call_seconds=4e-5)))).call_seconds == pytest.approx(
        4e-5
    )
    repacking = replace(profile(), repack_bytes_per_second=1.5e9)
    assert hosts_of(tomllib.loads(cluster_text(repacking))).device.repack_bytes_per_second == 1.5e9
    assert cluster.intra_host_latency == pytest.approx(2e-6, rel=1e-3)
    assert cluster.intra_host_bytes_per_second == pytest.approx(2e9, rel=1e-3)
    for sample in profile().samples:
        ours = cluster.mesh((("a", sample.group),)).axes[0].seconds(sample.kind, sample.nbytes)
        assert ours == pytest.approx(sample.seconds, rel=1e-3)


def test_times_that_make_no_cluster_are_not_written() -> None:
    with pytest.raises(
        ConfigError, match=r"the measurements are not usable as a cluster file: measured\.all_gather\.2\.seconds"
    ):
        cluster_text(profile(seconds_per_byte=0.0))


# The command


STEP = """
import bactrian, jax
import jax.numpy as jnp

def loss(weights, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)

@bactrian.parallelize(mesh="data=4", num_stages=1)
def step(weights, x):
    value, gradients = bactrian.value_and_grad(loss)(weights, x)
    return jax.tree.map(lambda w, g: w - g, weights, gradients), value

example_args = ([jax.ShapeDtypeStruct((256, 256), "float32")] * 2, jax.ShapeDtypeStruct((512, 256), "float32"))
"""


def test_a_host_is_measured_and_planned_for(tmp_path: Path) -> None:
    done = bactrian("profile-cluster", "--devices", "4", "--seconds", "2", "--name", "here", cwd=tmp_path, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    for word in ("4 virtual CPU devices", "written to cluster.toml", "matmul bf16", *KINDS):
        assert word in done.stdout
    path = tmp_path / "cluster.toml"
    cluster = read_cluster(path).only_group("a test")
    assert (cluster.name, cluster.hosts, cluster.devices_per_host) == ("here", 1, 4)
    assert set(cluster.device.flops_per_second) == {"default", "f32", "bf16", "f16", "f64"}
    assert {(curve.kind, curve.group) for curve in cluster.measured} == {(k, g) for k in KINDS for g in (2, 4)}
    assert all(len(curve.nbytes) == 6 for curve in cluster.measured)

    (tmp_path / "train.py").write_text(STEP)
    plan = ("plan", "train.py:step", "--cluster", "cluster.toml", "--json")
    first = bactrian(*plan, cwd=tmp_path, XLA_FLAGS="")
    assert first.returncode == 0, first.stderr
    assert first.stdout == bactrian(*plan, cwd=tmp_path, XLA_FLAGS="").stdout
    # The plan counts with the tables: once each collective takes a century by them, nothing is sent.
    path.write_text(re.sub(r"(?m)^seconds = .*", "seconds = [3e9, 4e9, 5e9, 6e9, 7e9, 8e9]", path.read_text()))
    second = bactrian(*plan, cwd=tmp_path, XLA_FLAGS="")
    assert second.returncode == 0, second.stderr
    ours = Plan.from_json(second.stdout).stages[0].sharding
    assert ours is not None and ours.sent_bytes == ()
    assert {row.name: row.communication_seconds >= 3e9 for row in ours.compared}["data"]


def test_a_file_is_kept_and_bad_targets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_host, "profile_host", lambda *arguments: profile())
    path = tmp_path / "cluster.toml"
    command = ["profile-cluster", "--output", str(path)]
    assert cli.main(command) == 0
    assert read_cluster(path).name == "cluster"
    path.write_text("mine")
    assert cli.main(command) == 3
    assert "is there already" in capsys.readouterr().err and path.read_text() == "mine"
    assert cli.main([*command, "--force"]) == 0
    assert read_cluster(path).groups[0].devices_per_host == 4
    for target, message in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x.toml", "there is no folder")):
        assert cli.main(["profile-cluster", "--output", str(target)]) == 3
        assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*No such file"):
        cluster_profile.write_cluster(tmp_path / "gone" / "cluster.toml", "")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="no permission"):
        cluster_profile.check_target(tmp_path / "cluster.toml", force=False)


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_a_number_of_devices_that_is_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["profile-cluster", f"--devices={number}"])
    assert "whole number from 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["profile-cluster", "--name", ""])


def test_too_few_devices() -> None:
    with pytest.raises(ConfigError, match="cannot profile one device") as caught:
        measure_host.profile_host(1, 1.0)
    assert "--devices 2" in caught.value.fix
    with pytest.raises(ConfigError, match="cannot profile 1000 devices: jax has"):
        measure_host.profile_host(1000, 1.0)


def test_devices_that_cannot_be_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, message in (("tpu", "cannot profile tpu devices"), ("gpu", "does not say how much memory it has")):
        device = SimpleNamespace(platform=platform, device_kind="X", memory_stats=lambda: None)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device] * 2)
        with pytest.raises(ConfigError, match=message):
            measure_host.profile_host(None, 1.0)


def test_collectives_that_xla_took_away_are_noticed() -> None:
    text = "%a = f32[8] all-reduce(%p), x\n%b = (f32[8], f32[8]) all-reduce-start(%a)\n%c = f32[8] copy(%all-reduce.1)"
    measure_host.check_number(text, "all_reduce", 2)
    with pytest.raises(BactrianError, match="XLA made 2 of 3 collectives all-reduce"):
        measure_host.check_number(text, "all_reduce", 3)
