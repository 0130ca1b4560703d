"""A cluster file alone: stages, meshes, microbatches and schedule are found, run, saved, and refused where they can't be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

import bactrian
from bactrian.driver import cli, traced_step
from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.planning.plan_program import plan_program
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.report.plan_table import plan_lines
from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.machine.cluster_file import read_cluster
from bactrian.passes.plan.pipeline_record import OtherPipeline
from bactrian.passes.plan.schema import Plan

WIDTH, ROWS = 64, 8

CLUSTER = """
hosts = {hosts}
devices_per_host = {devices}
memory_gib = {memory}
peak_tflops = {{ f32 = 0.001 }}
memory_gb_per_s = 10
intra_host_gb_per_s = 1
inter_host_gb_per_s = 0.01
intra_host_latency_us = 1
inter_host_latency_us = 1
"""


def loss(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean((x - y) ** 2)


def train(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    value, gradients = bactrian.value_and_grad(loss)(params, batch)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value


def arguments(layers: int = 4) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), layers + 2)
    params = [jax.random.normal(key, (WIDTH, WIDTH)) / 8 for key in keys[2:]]
    return params, tuple(jax.random.normal(key, (ROWS, WIDTH)) for key in keys[:2])


def cluster(tmp_path: Path, hosts: int = 2, devices: int = 1, memory: float = 1.0) -> str:
    (path := tmp_path / f"{hosts}x{devices}.toml").write_text(
        CLUSTER.format(hosts=hosts, devices=devices, memory=memory)
    )
    return str(path)


def test_a_cluster_alone(tmp_path: Path) -> None:
    """Two stages of two layers each; the run equals the reference, and the saved plan is the same plan."""
    params, batch = arguments()
    step = bactrian.parallelize(train, cluster=cluster(tmp_path), donate=False)
    planned = step.trace(params, batch).plan()
    plan, record = planned.plan, planned.plan.pipeline
    assert [(s.first_layer, s.last_layer, s.mesh, s.first_device) for s in plan.stages] == [
        (0, 1, (("data", 1),), 0),
        (2, 3, (("data", 1),), 1),
    ]
    assert record is not None and record.fixed == ()
    assert record.simulated_seconds == min(each.step_seconds for each in record.tried if each.step_seconds is not None)
    assert plan.num_microbatches > 1 and record.bound_seconds <= record.step_seconds
    assert record.simulated_seconds == pytest.approx(plan.predicted_step_seconds, rel=0.05)

    other = OtherPipeline(1, "1f1b", 1.5 * record.simulated_seconds)
    said = plan_lines(dataclasses.replace(plan, pipeline=dataclasses.replace(record, next_best=other)))
    assert "next best: 1 stage with 1f1b, 50.0% longer" in said

    expected = step.reference(params, batch)
    for got, want in zip(jax.tree.leaves(bactrian.gather(step(params, batch))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    # Of other numbers of microbatches than the first, the layers were those of another trace.
    count = record.tried[0].num_microbatches
    traced = step.with_options(num_microbatches=count).trace(params, batch).plan().plan.pipeline
    assert traced is not None and traced.simulated_seconds == record.tried[0].step_seconds

    planned.save(tmp_path / "saved")
    assert Plan.load(tmp_path / "saved") == plan
    again = bactrian.parallelize(train, plan=tmp_path / "saved", cluster=cluster(tmp_path), donate=False)
    assert again.trace(params, batch).plan().plan == plan


@pytest.mark.parametrize(("num_stages", "calls"), [(None, [1]), (2, [2 * 4 + 2, 4 + 2])])
def test_calls_of_stage_functions_count(tmp_path: Path, num_stages: int | None, calls: list[int]) -> None:
    """Calls that take longer than all work: one stage, whose step is a loop, is faster than a pipeline of many calls."""
    (slow := tmp_path / "slow.toml").write_text(Path(cluster(tmp_path)).read_text() + "call_us = 100_000\n")
    step = bactrian.parallelize(train, num_stages=num_stages, num_microbatches=4, cluster=str(slow))
    plan = step.trace(*arguments()).plan().plan
    timings = [stage.timing for stage in plan.stages]
    assert [timing.calls_seconds for timing in timings if timing] == pytest.approx([0.1 * number for number in calls])
    assert plan.pipeline is not None
    assert plan.pipeline.simulated_seconds == pytest.approx(plan.predicted_step_seconds, rel=1e-2)
    (said,) = [line for line in plan_lines(plan) if line.startswith(("one program", "next best"))] or [None]
    assert said == ("one program on 1 of 2 devices beats every pipeline" if num_stages is None else None)


def test_meshes_are_found(tmp_path: Path) -> None:
    """One layer cannot be cut, so a pipeline of one stage has all devices."""
    params, batch = arguments(1)
    step = bactrian.parallelize(train, num_microbatches=1, cluster=cluster(tmp_path, 1, 2), donate=False)
    (stage,) = step.trace(params, batch).plan().plan.stages
    assert stage.num_devices == 2
    expected = step.reference(params, batch)
    for got, want in zip(jax.tree.leaves(bactrian.gather(step(params, batch))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_two_kinds_of_hosts(tmp_path: Path) -> None:
    """Both are used, each stage on one of them, and that is faster than either alone; the run equals the reference.

    The second kind is twice as fast: it gets more layers.
    """
    fast = CLUSTER.replace("inter_host_gb_per_s = 0.01", "inter_host_gb_per_s = 1")
    kinds = [fast.format(hosts=1, devices=2, memory=memory) for memory in (1.0, 0.5)]
    kinds[1] = kinds[1].replace("f32 = 0.001", "f32 = 0.002")
    both = "".join(f"[[groups]]\nname = '{name}'\n{text}" for name, text in zip("ab", kinds, strict=True))
    params, batch = arguments(6)
    steps = list[Any]()
    for number, text in enumerate((both, *kinds)):
        (path := tmp_path / f"{number}.toml").write_text(text)
        steps.append(bactrian.parallelize(train, num_microbatches=4, cluster=path, donate=False))
    plan, *alone = (step.trace(params, batch).plan().plan for step in steps)
    assert all(plan.predicted_step_seconds < each.predicted_step_seconds for each in alone)
    groups = read_cluster(tmp_path / "0.toml").groups
    layers = dict.fromkeys((0, 1), 0)
    for stage in plan.stages:
        first, last = stage.first_device, stage.first_device + stage.num_devices - 1
        assert first // 2 == last // 2, "a mesh lies on one kind of hosts"
        layers[first // 2] += stage.num_layers
        assert stage.sharding is None or stage.sharding.limit_bytes <= groups[first // 2].memory_bytes
    assert 0 < layers[0] < layers[1]

    expected = steps[0].reference(params, batch)
    for got, want in zip(
        jax.tree.leaves(bactrian.gather(steps[0](params, batch))), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_stages": 1, "num_microbatches": 4, "schedule": "gpipe", "remat": "all"}
    plan = bactrian.parallelize(train, cluster=cluster(tmp_path), **options).trace(*arguments()).plan().plan
    assert (plan.num_stages, plan.num_microbatches, plan.schedule) == (1, 4, "gpipe")
    assert plan.pipeline is not None
    assert plan.pipeline.fixed == ("num_microbatches", "num_stages", "remat", "schedule")
    assert [each.num_microbatches for each in plan.pipeline.tried] == [4]
    assert set(plan.remat) <= {"all", "none"}


@pytest.mark.parametrize("misfits", [1, 9])
def test_what_does_not_fit_after_all_is_searched_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misfits: int
) -> None:
    """A stage that needs more than a device has, whatever its layers say: the next plan holds less."""
    device, tried = 1e-4 * 2**30, list[Decisions]()

    def plan_but_misfits(module: ir.Module, decisions: Decisions, **options: Any) -> StagedPlan:
        tried.append(decisions)
        if len(tried) <= misfits:
            raise InfeasiblePlanError("it needs more", stage=0, needed_bytes=round(1.01 * device))
        return plan_program(module, decisions, **options)

    monkeypatch.setattr(traced_step, "plan_program", plan_but_misfits)
    path = cluster(tmp_path, 1, 2, memory=device / 2**30)
    traced = bactrian.parallelize(train, num_microbatches=1, cluster=path).trace(*arguments())
    if misfits > 1:
        with pytest.raises(InfeasiblePlanError, match="it needs more"):
            traced.plan()
        assert 1 < len(tried) <= 4
    else:
        plan = traced.plan().plan
        assert [sum(each.memory_bytes) for each in tried] == sorted(
            {sum(each.memory_bytes) for each in tried}, reverse=True
        )
        assert len(tried) == 2 and plan.peak_memory_bytes <= tried[1].memory_bytes[0]


def test_the_command_finds_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    script = tmp_path / "train.py"
    script.write_text(
        "import bactrian, test_find_pipeline as here\n"
        "step = bactrian.parallelize(here.train)\nexample_args = here.arguments()\n"
    )
    assert cli.main(["plan", f"{script}:step", "--cluster", cluster(tmp_path), "--json"]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert plan.num_stages == 2 and plan.pipeline is not None
    assert cli.main(["plan", f"{script}:step", "--cluster", cluster(tmp_path), "--num-stages", "1"]) == 0
    text = capsys.readouterr().out
    assert "of the search's bound" in text and "given: num_stages" in text
    words = ["--mesh", "data=1", "--num-stages", "auto", "--boundaries", "0,1", "--json"]
    assert cli.main(["plan", f"{script}:step", "--cluster", cluster(tmp_path), *words]) == 0
    plan = Plan.from_json(capsys.readouterr().out)
    assert [stage.first_layer for stage in plan.stages] == [0, 1]
    assert cli.main(["plan", f"{script}:step", "--cluster", cluster(tmp_path), "--mesh", "auto"]) == 0
