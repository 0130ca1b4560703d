"""Plans of meshes: what `bactrian plan` prints of them, and that they are the same whatever the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from clusters import FAST

from bactrian.driver import cli

SCRIPT = """
import hashlib, os, sys
if sys.argv[2] == "one core" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
import bactrian
from bactrian.driver.api import parallelize

def loss(params, batch):
    x = batch
    for layer in params:
        x = x + jax.nn.gelu(x @ layer["a"]) @ layer["b"]
    return jnp.square(x).mean()

def step(params, batch):
    value, gradients = bactrian.value_and_grad(loss)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

shape = jax.ShapeDtypeStruct
layer = {"a": shape((64, 256), jnp.float32), "b": shape((256, 64), jnp.float32)}
made = bactrian.parallelize(step, num_stages=1, num_microbatches=2, mesh="data=2,model=4", cluster=sys.argv[1])
planned = made.trace([layer] * int(sys.argv[3]), shape((64, 64), jnp.float32)).plan(compare=True)
text = planned.plan.to_json() + planned.staged.text
print(hashlib.sha256(text.encode()).hexdigest())
"""


def digests(tmp_path: Path, seeds: range, layers: int) -> set[str]:
    """Of plans made with these hash seeds, the odd ones on one core, with 1 to 4 threads for products."""
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(FAST)
    found = set[str]()
    for seed in seeds:
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed % 4)}
        cores = "one core" if seed % 2 else "all cores"
        command = [sys.executable, "-c", SCRIPT, str(cluster), cores, str(layers)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    return found


def test_plans_do_not_depend_on_hash_seeds(tmp_path: Path) -> None:
    assert len(digests(tmp_path, range(2), layers=3)) == 1


@pytest.mark.long
def test_a_hundred_plans_are_one(tmp_path: Path) -> None:
    assert len(digests(tmp_path, range(100), layers=6)) == 1


STEP = """
import jax, jax.numpy as jnp
import bactrian

def loss(params, batch):
    return jnp.square(jax.nn.gelu(batch @ params["a"]) @ params["b"]).mean()

@bactrian.parallelize(num_microbatches=2)
def step(params, batch):
    value, gradients = bactrian.value_and_grad(loss)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

shape = jax.ShapeDtypeStruct
example_args = {"a": shape((64, 256), jnp.float32), "b": shape((256, 64), jnp.float32)}, shape((64, 64), jnp.float32)
"""


def printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, fast: bool = True
) -> tuple[int, str, str]:
    """Exit code, output and errors of ``bactrian plan``."""
    (tmp_path / "cluster.toml").write_text(FAST)
    (tmp_path / "mesh_step.py").write_text(STEP)
    cluster = ["--cluster", str(tmp_path / "cluster.toml")] if fast else []
    code = cli.main(["plan", f"{tmp_path / 'mesh_step.py'}:step", *cluster, *options])
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_prints_what_is_sent_and_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(tmp_path, capsys, "--mesh", "data=2,model=4", "--save", str(tmp_path / "plan"))
    assert code == 0
    assert "8 cpu devices" in out and "proved optimal in the cost model" in out
    rows = [line.split()[0] for line in out[out.index("of it communication") :].splitlines()[2:] if line.strip()]
    assert rows[0] == "chosen" and sorted(rows[1:]) == ["data", "megatron", "zero1", "zero2", "zero3"]
    assert cli.main(["explain", str(tmp_path / "plan")]) == 0
    explained = capsys.readouterr()[0]
    assert (
        "predicted peak per device" in explained and "whole stage, unsharded" in explained and "per device" in explained
    )
    sharding = json.loads((tmp_path / "plan" / "plan.json").read_text())["stages"][0]["sharding"]
    assert sharding["seconds"] == sharding["bound_seconds"] > 0
    assert set(sharding["shardings"]) == {"params['a']", "params['b']", "batch"}


def test_plans_of_stages_on_meshes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(tmp_path, capsys, "--mesh", "data=4", "--num-stages", "2", "--strategy", "zero1")
    assert code == 0
    assert "8 cpu devices" in out
    assert "stage 0  zero1; the rest proved optimal" in out and "stage 1  zero1; the rest" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "data"), "mesh 'data' is not a list of axes"),
        (("--mesh", "data=16"), "needs 16 devices, cluster has 8"),
        (("--mesh", "data=2", "--strategy", "zero"), "unknown strategy 'zero'"),
        (("--strategy", "zero1"), "strategy is zero1, but there is no mesh"),
    ],
)
def test_what_can_not_be_planned(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = printed(tmp_path, capsys, *options)
    assert code == 3 and message in err and "fix:" in err
