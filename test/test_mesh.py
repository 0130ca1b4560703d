"""Steps on meshes of several devices in one process: the numbers of one device, and where state lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numerics
import numpy as np
import pytest

import bactrian
from bactrian.driver.compiled import Compiled
from bactrian.passes.errors import ConfigError

# Slow devices on fast links: whatever can be cut is.
SLOW = """
hosts = 1
devices_per_host = 8
memory_gib = 1
peak_tflops = { f32 = 1e-5 }
memory_gb_per_s = 0.001
intra_host_gb_per_s = 1.0
intra_host_latency_us = 0.01
"""
MESHES = ("data=2,model=4", "data=8", "data=4,model=2")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a cluster on which everything is worth cutting."""
    path = tmp_path_factory.mktemp("cluster") / "slow.toml"
    path.write_text(SLOW)
    return path


def check(built: models.Built, **options: Any) -> Compiled:
    """Run every batch, each step from where ours stands, and compare with one device."""
    step = bactrian.parallelize(built.step, **{**built.options, "num_stages": 1, **options})
    state = built.state
    for batch in built.batches:
        reference = step.reference(state, *batch)
        result = step(state, *batch)
        numerics.assert_equal_step(bactrian.gather(result), reference, built.zero_gradient_leaves)
        state = built.next_state(result)
    return step.compiled


def cut(compiled: Compiled) -> list[str]:
    """Where the state is that is not whole everywhere."""
    return [p.layout for p in compiled.placements if any(any(layout) for layout in p.layouts.values())]


@pytest.mark.parametrize("name", models.MODELS_COVER)
def test_models_equal_one_device(name: str, slow: Path) -> None:
    number = models.MODELS_COVER.index(name)
    case = models.train_case(name, ("adamw", "sgd")[number % 2], microbatches=(1, 2, 4)[number % 3])
    compiled = check(case.make(), mesh=MESHES[number % len(MESHES)], cluster=slow)
    assert cut(compiled)


@pytest.mark.parametrize("case", models.TRAPS, ids=lambda case: case.name)
def test_traps_equal_one_device(case: models.Case, slow: Path) -> None:
    check(case.make(), mesh="data=2,model=2", cluster=slow)


def test_three_axes_and_sizes_that_are_no_powers_of_two(slow: Path) -> None:
    random = np.random.default_rng(0)
    state = {name: random.standard_normal((24, 24)).astype(np.float32) / 5 for name in "ab"}
    data = {name: random.standard_normal((12, 24)).astype(np.float32) for name in "xy"}
    built = models.Built(models.sgd_step(models.chain_loss("ab")), state, [(data,)] * 3)
    for mesh in ("data=3,model=2", {"data": 2, "model": 3}, "a=2,b=2,c=2", "a=6"):
        for microbatches in (1, 2):
            assert cut(check(built, mesh=mesh, num_microbatches=microbatches, cluster=slow))


def test_gathered_and_put_again(slow: Path) -> None:
    built = models.train_case("mlp/plain", "adamw", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow)
    state, _ = step(built.state, *built.batches[0])
    again = bactrian.put(bactrian.gather(state), step.compiled)
    assert "over" in repr(again["params"][0]["w"])
    for one, other in zip(
        *(numerics.host(bactrian.gather(step(x, *built.batches[1]))) for x in (state, again)), strict=True
    ):
        numerics.assert_equal_step(one, other)


def test_more_devices_than_there_are(slow: Path) -> None:
    built = models.train_case("mlp/plain", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=16", cluster=slow)
    with pytest.raises(ConfigError, match="needs 16 devices, slow has 8"):
        step(built.state, *built.batches[0])
    step = bactrian.parallelize(built.step, **built.options, mesh="data=16")
    with pytest.raises(ConfigError, match=r"mesh of 16 devices \(data=16\), this process has 8"):
        step(built.state, *built.batches[0])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data", "is not a list of axes"),
        ("data=0", "an axis of size 0"),
        ("data=2,data=2", "two axes of one name"),
        ({"data": 2.5}, "is not a list of axes"),
    ],
)
def test_what_is_no_mesh(mesh: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bactrian.parallelize(lambda state, batch: state, mesh=mesh)
