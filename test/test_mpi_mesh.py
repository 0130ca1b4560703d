"""Ranks with meshes of several devices each, and meshes with the devices of several ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from clusters import SLOW, cluster_text
from commands import bactrian
from xla_flags import QUICK

HERE = Path(__file__).parent


def run(
    tmp_path: Path, name: str, mesh: str, devices: int, *options: str, ranks: int = 2, stages: int = 2
) -> subprocess.CompletedProcess[str]:
    """``bactrian run`` on so many ranks of so many devices each."""
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(SLOW)
    words = [HERE / "mesh_script.py", name, mesh, cluster, stages]
    return bactrian("run", "-n", ranks, "--devices", devices, *options, *words, XLA_FLAGS=" ".join(QUICK))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "mesh", "devices"),
    [
        ("mlp/plain", "data=2,model=2", 4),
        pytest.param("gpt-tied-dropout/linen", "data=2,model=2", 4, marks=pytest.mark.long),
        pytest.param("encoder-decoder/linen", "data=4", 4, marks=pytest.mark.long),
        pytest.param("conv/linen", "data=2,model=2", 4, marks=pytest.mark.long),
    ],
)
def test_ranks_with_meshes_equal_one_device(tmp_path: Path, name: str, mesh: str, devices: int) -> None:
    done = run(tmp_path, name, mesh, devices)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"equal {2 * devices}")


@pytest.mark.mpi
def test_ranks_with_too_few_devices(tmp_path: Path) -> None:
    done = run(tmp_path, "mlp/plain", "data=2,model=2", 2)
    assert done.returncode == 3
    assert "stage 0 has a mesh of 4 devices (data=2,model=2), each rank has 2" in done.stderr
    assert "bactrian run --devices 4" in done.stderr
    assert "bactrian run --distributed" in done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "ranks", "stages", "mesh"),
    [
        ("mlp/plain", 2, 1, "data=2,model=2"),
        ("mlp/plain", 4, 2, "data=2,model=2"),
        pytest.param("gpt-tied-dropout/linen", 4, 2, "data=2,model=2", marks=pytest.mark.long),
        pytest.param("mlp/plain", 4, 4, "data=4", marks=pytest.mark.long),
        pytest.param("conv/linen", 2, 2, "model=4", marks=pytest.mark.long),
    ],
)
def test_meshes_over_several_ranks_equal_one_device(
    tmp_path: Path, name: str, ranks: int, stages: int, mesh: str
) -> None:
    """Two ranks of two devices for each mesh; each element of a value crosses to another mesh once."""
    done = run(tmp_path, name, mesh, 2, "--distributed", ranks=ranks, stages=stages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"equal {4 * stages}")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "mesh", "devices", "ranks", "sizes"),
    [
        ("mlp/plain", "data=2,model=2;data=2", 2, 3, [4, 2]),  # two ranks and one
        pytest.param("mlp/plain", "data=1;model=2", 1, 3, [1, 2], marks=pytest.mark.long),  # a rank for each device
        pytest.param("mlp/plain", "data=4;data=1", 4, 2, [4, 1], marks=pytest.mark.long),  # a rank for each stage
        pytest.param("mlp/plain", "data=3;data=2;data=1", 1, 6, [3, 2, 1], marks=pytest.mark.long),
        pytest.param("mlp/plain", "data=2,model=3;model=8", 8, 2, [6, 8], marks=pytest.mark.long),
        pytest.param("mlp/plain", "data=2;data=1;model=2;data=1", 1, 3, [2, 1, 2, 1], marks=pytest.mark.long),
        pytest.param("gpt-tied-dropout/linen", "data=4;data=2", 2, 3, [4, 2], marks=pytest.mark.long),
        pytest.param("encoder-decoder/linen", "data=1;data=2,model=2", 2, 3, [1, 4], marks=pytest.mark.long),
    ],
)
def test_meshes_of_different_sizes_equal_one_device(
    tmp_path: Path, name: str, mesh: str, devices: int, ranks: int, sizes: list[int]
) -> None:
    """Each element of a value crosses to another mesh once."""
    done = run(tmp_path, name, mesh, devices, "--distributed", ranks=ranks, stages=len(sizes))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"equal {sum(sizes)}")


TOGETHER = """
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import bactrian
import bactrian.driver.traced_step as traced_step
from bactrian.driver.ranks import World

world, planned = World.current(), []
plan_program = traced_step.plan_program
traced_step.plan_program = lambda *args, **options: planned.append(options) or plan_program(*args, **options)


def make(**options):
    @bactrian.parallelize(num_stages=2, cluster=sys.argv[1], **{"mesh": "data=2"} | options)
    def step(w, x):
        loss, gradient = bactrian.value_and_grad(lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) ** 2))(w)
        return jax.tree.map(lambda a, b: a - 0.1 * b, w, gradient), loss

    return step


w, x = [np.full((8, 8), 0.1, np.float32)] * 2, np.ones((16, 8), np.float32)


def check(step):
    found = bactrian.gather(step(w, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, make().reference(w, x))
"""


def together(tmp_path: Path, body: str, cluster: str = SLOW) -> subprocess.CompletedProcess[str]:
    """The script on two ranks of two devices each."""
    (tmp_path / "cluster.toml").write_text(cluster)
    (tmp_path / "script.py").write_text(TOGETHER + body)
    words = ["-n", 2, "--devices", 2, tmp_path / "script.py", tmp_path / "cluster.toml"]
    return bactrian("run", *words, XLA_FLAGS=" ".join(QUICK))


@pytest.mark.mpi
def test_all_ranks_take_what_rank_0_has_found(tmp_path: Path) -> None:
    """It alone plans; and when all have planned, as when two searches are ended by the clock, its shardings are taken."""
    body = """
check(make())
print(world.rank, "planned", len(planned))

found = make(strategy="zero3" if world.rank else "data").trace(w, x).plan()
stages = [replace(s, sharding=replace(s.sharding, strategy="auto")) for s in found.plan.stages]
found.staged.plan = replace(found.plan, stages=tuple(stages))
assert len(set(world.control.allgather(found.staged_text))) == 2
compiled = found.compile()
assert len(set(world.control.allgather(compiled.plan.to_json()))) == 1
assert world.rank or compiled.plan == found.plan
check(compiled)
print("equal")
"""
    done = together(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 planned 1", "1 planned 0", "equal", "equal"]


@pytest.mark.mpi
@pytest.mark.long
def test_results_of_a_stage_whose_axes_others_do_not_have(tmp_path: Path) -> None:
    """Gradients of each stage, sharded over its own axes, come to every rank."""
    body = """
@bactrian.parallelize(mesh="x=2;y=2", cluster=sys.argv[1], state={0: 0})
def step(w, x):
    loss, gradient = bactrian.value_and_grad(lambda w: jnp.mean(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) ** 2))(w)
    return jax.tree.map(lambda a, b: a - 0.1 * b, w, gradient), loss, gradient


found = bactrian.gather(step(w, x))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, step.reference(w, x))
print("equal")
"""
    done = together(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["equal", "equal"]


@pytest.mark.mpi
def test_ranks_that_ask_for_different_plans(tmp_path: Path) -> None:
    """Every rank raises the same error; one that the script doesn't catch ends the job."""
    body = """
def refused(run):
    try:
        run()
    except bactrian.ConfigError as error:
        print(str(error).splitlines()[0], flush=True)

refused(lambda: check(make(strategy="zero1" if world.rank else "auto")))
refused(lambda: check(make(mesh="model=2" if world.rank else "data=2")))
make().trace(w, x).plan().compile() if world.rank else check(make())
"""
    done = together(tmp_path, body)
    assert done.returncode == 3, done.stderr
    first = [line for line in done.stdout.splitlines() if "in the strategy" in line]
    second = [line for line in done.stdout.splitlines() if "in the mesh" in line]
    assert len(first) == len(second) == 2
    assert all("ranks differ in the strategy: rank 0 has auto, rank 1 has zero1" in line for line in first)
    assert all("ranks differ in the mesh: rank 0 has data=2, rank 1 has model=2" in line for line in second)
    assert "ranks differ in num_stages: rank 0 has 2, rank 1 has none" in done.stderr
    assert "start every rank with the same script" in done.stderr


@pytest.mark.mpi
def test_what_rank_0_finds_wrong_every_rank_says(tmp_path: Path) -> None:
    body = """
try:
    check(make())
except bactrian.InfeasiblePlanError as error:
    print(str(error).splitlines()[0])
"""
    done = together(tmp_path, body, cluster_text("f32 = 1e-5", 0.001, 0.01, memory_gib=1e-6))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0].startswith("cannot fit stage 0 into a device: ")
