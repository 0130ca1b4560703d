"""Pipelines with some decisions given: what is kept, and what is refused; plans that are the same wherever they are made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_find_pipeline import ROWS, WIDTH, arguments, cluster, loss, train

import bactrian
from bactrian.driver.planning import find_pipeline
from bactrian.driver.report.cut_reasons import plan_reasons
from bactrian.passes.frame.errors import BactrianError, ConfigError, InfeasiblePlanError, ProgramError
from bactrian.passes.machine.spec import axes_text
from bactrian.passes.plan.schema import Plan


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"boundaries": (0, 3)}, [(0, None), (3, None)]),
        ({"mesh": "model=2", "num_stages": "auto"}, [(0, "model=2"), (2, "model=2")]),
        ({"mesh": "model=2", "num_stages": 1, "num_microbatches": "auto"}, [(0, "model=2")]),
        ({"mesh": "model=2;data=1", "schedule": "auto"}, [(0, "model=2"), (3, "data=1")]),
        ({"mesh": "data=2;data=1", "boundaries": "0,1"}, [(0, "data=2"), (1, "data=1")]),
    ],
)
def test_holes(tmp_path: Path, options: dict[str, Any], stages: list[tuple[int, str | None]]) -> None:
    """What is given stands in the plan, and is named; the rest is found; the run of the last one equals the reference."""
    params, batch = arguments()
    step = bactrian.parallelize(train, cluster=cluster(tmp_path, 2, 2), donate=False, **options)
    plan = step.trace(params, batch).plan().plan
    assert [stage.first_layer for stage in plan.stages] == [first for first, _ in stages]
    for stage, (_, mesh) in zip(plan.stages, stages, strict=True):
        assert mesh in (None, axes_text(stage.mesh))
    assert plan.pipeline is not None
    assert plan.pipeline.fixed == tuple(sorted(name for name, value in options.items() if value != "auto"))
    assert len(plan.pipeline.tried) > 1
    assert not any("even share" in remark.message for remark in plan.remarks), "the search has weighed the stages"
    if options.keys() != {"mesh", "boundaries"}:
        return
    expected = step.reference(params, batch)
    for got, want in zip(jax.tree.leaves(bactrian.gather(step(params, batch))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 3, "boundaries": (0, 2)}, "num_stages is 3, but boundaries are those of 2 stages"),
        ({"mesh": "data=2;data=1;data=1", "boundaries": "0,2"}, "3 meshes for 2 stages"),
        ({"boundaries": (1, 2)}, "not the first layer of each stage"),
        ({"boundaries": "0,x"}, "not the first layer of each stage"),
        ({"boundaries": (0, 9)}, "cannot begin a stage at layer 9: the program has 4 layers"),
        ({"mesh": "data=3", "num_stages": "auto"}, "stage 0 of 3 devices has no place in 2x2"),
        ({"mesh": "data=1;data=2;data=1", "remat": "auto"}, "stage 2 of 1 device has no place in 2x2"),
        ({"mesh": "data=8", "schedule": "auto"}, "1 stage on data=8 needs 8 devices, 2x2 has 4"),
        ({"mesh": "data=2", "schedule": "auto", "strategy": "zero1"}, "with strategy zero1"),
        ({"num_stages": "auto", "cluster": None}, "cannot find what is auto: there is no cluster file"),
        ({"boundaries": (0, 2), "cluster": None}, "with given boundaries: there is no cluster file"),
        ({"mesh": "data=2", "num_stages": "auto", "forward_only": True}, "the step takes no gradient"),
    ],
)
def test_contradictions(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given: dict[str, Any] = {
            "cluster": cluster(tmp_path, 2, 2),
            "num_microbatches": 2,
            "out_reduction": "mean",
        } | options
        made = bactrian.parallelize(loss if "forward_only" in options else train, **given)
        made.trace(*arguments()).plan()


def test_layers_are_those_of_the_search(tmp_path: Path) -> None:
    made = bactrian.parallelize(train, cluster=cluster(tmp_path), boundaries=(0, 2))
    assert repr(made) == f"<bactrian step train: a pipeline is found for {cluster(tmp_path)}>"
    with pytest.raises(ConfigError, match="num_layers is 4, but the pipeline is to be found"):
        made.trace(*arguments()).plan(num_layers=4)


def test_a_plan_decides_all(tmp_path: Path) -> None:
    made = bactrian.parallelize(train, cluster=cluster(tmp_path), boundaries=(0, 1), num_microbatches=4)
    plan = made.trace(*arguments()).plan().plan
    assert made.with_options(plan=plan).options.boundaries == (0, 1)
    contradictions: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_stages": "auto"}, "num_stages is auto, but a plan is given"),
        ({"boundaries": (0, 2)}, "boundaries are 0, 2, but the plan has 0, 1"),
    )
    for options, message in contradictions:
        with pytest.raises(ConfigError, match=message):
            bactrian.parallelize(train, plan=plan, **options)


@pytest.mark.parametrize(
    ("options", "memory", "kind", "message"),
    [
        ({}, 1e-5, InfeasiblePlanError, "cannot place the program on 2x1: devices need"),
        ({"remat": "none", "num_stages": 1}, 1e-5, InfeasiblePlanError, "fix: leave num_stages, remat open; or take"),
        ({"num_stages": 9}, 1.0, InfeasiblePlanError, "cannot make 9 stages of 4 layers"),
        ({"num_stages": 3}, 1.0, ConfigError, "3 stages on data=1 need 3 devices, 2x1 has 2"),
        ({"num_microbatches": 5}, 1.0, ProgramError, "has 8 rows, which 5 microbatches do not divide"),
        ({"remat": ("all", "none")}, 1.0, ConfigError, "cannot find stages and meshes with remat all, none"),
    ],
)
def test_what_cannot_be_found(
    tmp_path: Path, options: dict[str, Any], memory: float, kind: type[BactrianError], message: str
) -> None:
    options = {"num_microbatches": 2} | options
    step = bactrian.parallelize(train, cluster=cluster(tmp_path, memory=memory), **options)
    with pytest.raises(kind, match=message):
        step.trace(*arguments()).plan()


def test_numbers_of_microbatches_that_do_not_fit(tmp_path: Path) -> None:
    """The plan, its explanation and its report say why; the times of the search are among those of the plan."""
    planned = bactrian.parallelize(train, cluster=cluster(tmp_path, 1, memory=1.48e-4)).trace(*arguments()).plan()
    assert planned.plan.pipeline is not None
    refused = [each for each in planned.plan.pipeline.tried if each.step_seconds is None]
    assert [each.num_microbatches for each in refused] == [4]
    assert refused[0].reason.startswith("cannot place the program on 1x1: devices need about")
    assert refused[0].reason.endswith("of each")  # not all of a device is for stages
    reasons = dict(plan_reasons(planned.plan))
    assert reasons["given"] == "nothing but the cluster; all was found"
    assert reasons["no plan"] == f"of 4 microbatches: {refused[0].reason}"
    planned.write_report(tmp_path / "report.html")
    assert refused[0].reason in (tmp_path / "report.html").read_text()
    (search,) = (phase for phase in planned.timing.phases if phase.name == "find pipeline")
    assert {"trace", "group-layers", "choose-pipeline"} <= {part.name for part in search.parts}


def test_only_another_size_is_traced_again(tmp_path: Path) -> None:
    """A step whose rows are read through windows is traced for each number of microbatches; other errors end the search."""
    traces = list[int]()

    def windows(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        traces.append(len(batch[0]))
        x, y = batch
        return jnp.mean((jnp.cumsum(x @ params[0], axis=0) - y) ** 2)

    def step(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> Any:
        value, gradients = bactrian.value_and_grad(windows)(params, batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value

    plan = bactrian.parallelize(step, cluster=cluster(tmp_path)).trace(*arguments(1)).plan().plan
    assert plan.pipeline is not None
    assert {ROWS // each.num_microbatches for each in plan.pipeline.tried} <= set(traces)
    traces.clear()
    with pytest.raises(ConfigError, match="1 stage on data=8 needs 8 devices"):
        bactrian.parallelize(step, cluster=cluster(tmp_path), mesh="data=8", remat="auto").trace(*arguments(1)).plan()
    assert traces == [8, 1]  # as it was given, and for the first number of microbatches


def test_a_step_that_takes_pairs_of_rows(tmp_path: Path) -> None:
    """Numbers of microbatches with which its own code fails are said, and others are found."""

    def step(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> Any:
        def pairs(params: list[jax.Array]) -> jax.Array:
            return loss(params, jax.tree.map(lambda x: x.reshape(-1, 2, WIDTH).mean(1), batch))

        value, gradients = bactrian.value_and_grad(pairs)(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients), value

    plan = bactrian.parallelize(step, cluster=cluster(tmp_path)).trace(*arguments(2)).plan().plan
    assert plan.pipeline is not None and plan.num_microbatches < ROWS
    failed = plan.pipeline.tried[-1]
    assert failed.num_microbatches == ROWS
    assert failed.reason.startswith("the step can't be traced with 8 microbatches: cannot reshape array")


def test_the_missing_memory_is_enough(tmp_path: Path) -> None:
    """With what the error says is needed, there is a plan; with less there is none. What layers may choose depends on it."""
    shapes = arguments()
    step = bactrian.parallelize(train, num_microbatches=4, cluster=cluster(tmp_path, memory=1e-5))
    with pytest.raises(InfeasiblePlanError) as caught:
        step.trace(*shapes).plan()
    assert caught.value.fix.startswith("take more or larger devices; or more microbatches; or a smaller dtype")
    needed = float(caught.value.message.partition("need about ")[2].split()[0]) * 2**10 / 2**30
    for factor, fits in ((1.25, True), (0.75, False)):
        larger = step.with_options(cluster=cluster(tmp_path, memory=needed * factor)).trace(*shapes)
        if fits:
            assert larger.plan().plan.num_microbatches == 4
        else:
            with pytest.raises(InfeasiblePlanError, match="cannot place the program") as caught:
                larger.plan()
            hosts = int(caught.value.fix.partition("or ")[2].split()[0])
            assert hosts > 2
            more = step.with_options(cluster=cluster(tmp_path, hosts, memory=needed * factor)).trace(*shapes)
            assert more.plan().plan.num_stages > 2


SMALL_MODELS = """
import os, sys
import bactrian
from bactrian.driver.models.alpa_suite import small

cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[2])]
os.sched_setaffinity(0, cores)  # there are as many workers
for family in ("gpt", "moe"):
    program = small(family)
    step = bactrian.parallelize(program.step, num_microbatches=4, cluster=sys.argv[1])
    print(step.trace(*program.shapes()).plan().plan.to_json())
"""


@pytest.mark.long
def test_plans_are_the_same_for_any_hash_seed_and_number_of_workers(tmp_path: Path) -> None:
    (script := tmp_path / "plans.py").write_text(SMALL_MODELS)
    outputs = {
        subprocess.run(
            [sys.executable, script, cluster(tmp_path, 2, 8), workers],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=tmp_path,
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
        for workers in ("1", "2")
    }
    assert len(outputs) == 1 and b"step_seconds" in outputs.pop()


def test_a_plan_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = bactrian.parallelize(train, num_microbatches=2, cluster=cluster(tmp_path, 2, 8))
    traced, plans = step.trace(*arguments()), list[Plan]()
    for cores in (1, 2):
        monkeypatch.setattr(find_pipeline, "num_cores", lambda cores=cores: cores)
        plans.append(traced.plan().plan)
    assert plans[0].to_json() == plans[1].to_json()


def test_a_mesh_that_this_process_does_not_have(tmp_path: Path) -> None:
    """A plan is made for any cluster; where it is to run, the stage that has no place is named."""
    params, batch = arguments(1)
    step = bactrian.parallelize(train, mesh="model=16", num_microbatches="auto", cluster=cluster(tmp_path, 1, 16))
    planned = step.trace(params, batch).plan()
    assert planned.plan.num_devices == 16
    with pytest.raises(ConfigError, match=r"stage 0 has a mesh of 16 devices \(model=16\), this process has 8"):
        planned.compile()
