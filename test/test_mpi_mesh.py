"""Ranks with meshes of several devices each, and meshes with the devices of several ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from clusters import SLOW
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
