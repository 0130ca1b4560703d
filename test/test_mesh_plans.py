"""The same step, cluster and mesh give the same plan, whatever the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, sys
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
planned = made.trace([layer] * 6, shape((64, 64), jnp.float32)).plan(compare=True)
text = planned.plan.to_json() + planned.staged.text
print(hashlib.sha256(text.encode()).hexdigest())
"""
FAST = """
hosts = 1
devices_per_host = 8
memory_gib = 1
peak_tflops = { f32 = 1e-3 }
memory_gb_per_s = 0.1
intra_host_gb_per_s = 1.0
intra_host_latency_us = 1
"""


def digests(tmp_path: Path, seeds: range) -> set[str]:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(FAST)
    found = set[str]()
    for seed in seeds:
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed % 4)}
        command = [sys.executable, "-c", SCRIPT, str(cluster)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    return found


def test_plans_do_not_depend_on_hash_seeds(tmp_path: Path) -> None:
    assert len(digests(tmp_path, range(3))) == 1


@pytest.mark.long
def test_a_hundred_plans_are_one(tmp_path: Path) -> None:
    assert len(digests(tmp_path, range(100))) == 1
