"""Stages on hosts of several kinds: where they are, and what is predicted of each."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import chain_loss, sgd_step
from jaxlib.mlir import ir

import bactrian
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import PassError
from bactrian.passes.machine.cluster_file import cluster_of
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.sharding.stage_programs import stage_hosts

GROUP = """
[[groups]]
name = "{name}"
hosts = 1
devices_per_host = {devices}
memory_gib = {memory}
memory_gb_per_s = {rate}
peak_tflops = {{ {tflops} }}
intra_host_gb_per_s = 10
inter_host_gb_per_s = 1
"""
SLOW = GROUP.format(name="slow", devices=4, memory=1, rate=0.01, tflops="f32 = 1e-4")
FAST = GROUP.format(name="fast", devices=4, memory=4, rate=0.1, tflops="f32 = 1e-3")
GROUPS = [
    {
        "name": name,
        "hosts": 1,
        "devices_per_host": devices,
        "memory_gib": 1,
        "peak_tflops": {"f32": 1},
        "intra_host_gb_per_s": 1,
        "inter_host_gb_per_s": 1,
    }
    for name, devices in (("small", 4), ("large", 8))
]
MIXED = cluster_of({"groups": GROUPS}, name="mixed")


def hosts_of(sizes: list[int], attribute: str = "") -> list[str]:
    """The kinds of hosts that stages of some sizes are on."""
    meshes: dict[str, MeshAxes] = {f"stage{stage}": (("data", size),) for stage, size in enumerate(sizes)}
    with make_context(), ir.Location.unknown():
        module = ir.Module.parse(f"module attributes {{{attribute}}} {{}}")
        return [group.name for group in stage_hosts(module, meshes, MIXED)]


def test_the_module_says_where_stages_are_else_they_follow_each_other() -> None:
    assert hosts_of([2, 2, 2]) == ["small", "small", "large"]
    assert hosts_of([8]) == ["large"]
    assert hosts_of([2, 2], "bactrian.first_devices = array<i64: 6, 2>") == ["large", "small"]


@pytest.mark.parametrize(
    ("firsts", "message"),
    [
        ("0", "places 1 stages, the module has 2"),
        ("0, 3", "places stage 1 of 2 devices at device 3 of mixed"),  # on two hosts
        ("0, 11", "places stage 1 of 2 devices at device 11"),  # behind the last one
        ("-1, 4", "places stage 0 of 2 devices at device -1"),
    ],
)
def test_places_that_there_are_not(firsts: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        hosts_of([2, 2], f"bactrian.first_devices = array<i64: {firsts}>")


def step_arguments() -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    return {"a": shape, "b": shape}, {"x": shape, "y": shape}


def test_each_stage_is_predicted_with_its_own_hosts(tmp_path: Path) -> None:
    (path := tmp_path / "mixed.toml").write_text(SLOW + FAST)
    step = bactrian.parallelize(sgd_step(chain_loss("ab")), num_stages=2, mesh="data=4", cluster=path)
    slow, fast = (stage.sharding for stage in step.trace(*step_arguments()).plan().plan.stages)
    assert slow is not None and fast is not None and slow.seconds is not None and fast.seconds is not None
    assert slow.seconds > 5 * fast.seconds, "a tenth of the rates"
    assert (slow.limit_bytes, fast.limit_bytes) == (1 << 30, 4 << 30)


def test_products_in_a_type_without_a_rate_are_told_of(tmp_path: Path) -> None:
    (path := tmp_path / "v100.toml").write_text(
        GROUP.format(name="v100", devices=4, memory=1, rate=900, tflops="f16 = 125, f32 = 15.7")
    )

    def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        return chain_loss("ab")(*jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, batch)))

    for mesh in ("data=1", "data=4"):
        step = bactrian.parallelize(sgd_step(loss), num_stages=1, mesh=mesh, cluster=path)
        told = [r.message for r in step.trace(*step_arguments()).plan().plan.remarks if "no rate" in r.message]
        assert told == [
            "v100 has no rate for bf16: products in it are timed at the 125 TFLOPS of f16; "
            "give peak_tflops.bf16 in the cluster file"
        ]
