"""Two ranks, each with a mesh of several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_mesh import SLOW

HERE = Path(__file__).parent


def run(tmp_path: Path, name: str, mesh: str, devices: int) -> subprocess.CompletedProcess[str]:
    """``bactrian run`` on two ranks of so many devices each."""
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(SLOW)
    command = [sys.executable, "-m", "bactrian.driver.cli", "run", "-n", "2", "--devices", str(devices)]
    command += [str(HERE / "mesh_script.py"), name, mesh, str(cluster)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


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
