"""What plans say that their steps send is what XLA sends, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import pytest
from cases import Built, sgd_step
from test_mesh_plans import printed

import bactrian
from bactrian.driver.planned_step import Planned
from bactrian.driver.report.comparison_table import render_comparison
from bactrian.driver.report.terminal import RichView
from bactrian.driver.xla.compare_bytes import Comparison, Difference, FunctionComparison, compare, compare_function
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.plan.schema import Plan

Kinds = dict[str, float]


def planned(built: Built, slow: Path, **options: Any) -> Planned:
    step = bactrian.parallelize(built.step, **{**built.options, "num_stages": 1, "cluster": slow, **options})
    return step.trace(built.state, *built.batches[0]).plan()


def predicted(plan: Plan) -> Kinds:
    """What all stages of a plan send."""
    sent = dict[str, float]()
    for stage in plan.stages:
        assert stage.sharding is not None
        for kind, nbytes in stage.sharding.sent_bytes:
            sent[kind] = sent.get(kind, 0.0) + nbytes
    return sent


def data_parallel(dtype: Any = jnp.float32, rows: int = 1024, width: int = 32) -> Built:
    """An MLP of three layers whose batch all devices can share."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = batch["x"].astype(dtype)
        for name in sorted(params):
            x = jnp.tanh(x @ params[name].astype(dtype))
        return jnp.square(x.astype(jnp.float32) - batch["y"]).mean()

    state = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in "abc"}
    batch = {name: jax.ShapeDtypeStruct((rows, width), jnp.float32) for name in "xy"}
    return Built(sgd_step(loss), state, [(batch,)])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_data_parallel_bytes_are_those_of_the_plan(microbatches: int, slow: Path) -> None:
    """Weights whose dims 8 devices can't cut: their gradients are added up once per step, and nothing else."""
    built = data_parallel(rows=1024, width=36)
    plan = planned(built, slow, mesh="data=8", strategy="data", num_microbatches=microbatches)
    comparison = plan.compare_xla()
    gradients = 2 * 7 / 8 * 3 * 36 * 36 * 4
    assert predicted(plan.plan)["all_reduce"] == pytest.approx(gradients, rel=0.01)
    assert comparison.planned == comparison.compiled == pytest.approx(predicted(plan.plan), abs=1)
    assert not comparison.differences
    assert [f.runs for f in comparison.functions if "backward" in f.symbol] == [microbatches]


@pytest.mark.parametrize(
    ("name", "mesh", "strategy"),
    [
        ("mlp/plain", "data=2,model=4", "auto"),
        ("mlp/plain", "data=8", "zero3"),
        ("conv/linen", "data=8", "data"),
        pytest.param("gpt-tied-dropout/linen", "data=2,model=4", "auto", marks=pytest.mark.long),
        pytest.param("encoder-decoder/linen", "data=2,model=4", "zero3", marks=pytest.mark.long),
    ],
)
def test_xla_sends_what_is_planned(name: str, mesh: str, strategy: str, slow: Path) -> None:
    built = models.train_case(name, "adamw", microbatches=2).make()
    plan = planned(built, slow, mesh=mesh, strategy=strategy)
    comparison = plan.compare_xla()
    assert not comparison.differences
    assert comparison.compiled == comparison.planned == pytest.approx(predicted(plan.plan), abs=1)


def test_stages_are_compared_each_on_its_mesh(slow: Path) -> None:
    built = models.train_case("mlp/plain", "sgd", microbatches=4, stages=2, schedule="gpipe").make()
    plan = planned(built, slow, mesh="data=4", num_stages=2)
    comparison = plan.compare_xla()
    assert not comparison.differences
    assert comparison.planned == pytest.approx(predicted(plan.plan), abs=1)
    runs = {function.symbol: function.runs for function in comparison.functions}
    assert runs["stage0.forward"] == runs["stage1.backward"] == 4 and runs["stage0.update"] == 1


def test_elements_of_another_size(slow: Path) -> None:
    """CPUs add up bfloat16 as float32: twice the bytes of what is planned."""
    built = data_parallel(jnp.bfloat16, rows=32, width=64)
    comparison = planned(built, slow, mesh="data=4,model=2").compare_xla()
    assert {difference.compiled / difference.planned for difference in comparison.differences} == {2.0}


LOCAL = """
module @local {
  func.func public @main(%x: tensor<8x8xf32>) -> tensor<2x32xf32> {
    %0 = "stablehlo.all_to_all"(%x) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, concat_dimension = 1 : i64, replica_groups = dense<[[0, 1, 2, 3], [4, 5, 6, 7]]> : tensor<2x4xi64>, split_count = 4 : i64, split_dimension = 0 : i64}> : (tensor<8x8xf32>) -> tensor<2x32xf32>
    return %0 : tensor<2x32xf32>
  }
}
"""
MOVED = "%a = f32[2,32]{1,0} all-to-all(%x), replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ((MOVED,), []),
        ((MOVED.replace("f32", "f64"),), [("all_to_all", 4, 192.0, 384.0)]),
        (
            (MOVED.replace("f32[2,32]{1,0} all-to-all", "f32[8,32]{1,0} all-gather"),),
            [("all_gather", 4, 0.0, 768.0), ("all_to_all", 4, 192.0, 0.0)],
        ),
        ((MOVED.replace("[2,32]", "[2,16]"), MOVED.replace("[2,32]", "[2,16]").replace("%a", "%b")), []),  # in two
        ((MOVED.replace("[2,4]", "[4,2]"),), [("all_to_all", 2, 0.0, 128.0), ("all_to_all", 4, 192.0, 0.0)]),
        (("%a = f32[2,32]{1,0} copy(%x)",), [("all_to_all", 4, 192.0, 0.0)]),
        (
            (MOVED, "%b = f32[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]"),
            [("all_gather", 4, 0.0, 192.0)],
        ),
    ],
)
def test_differences(lines: tuple[str, ...], found: list[tuple[str, int, float, float]]) -> None:
    """One planned all-to-all, beside what a compiler might have made of it."""
    text = "\n  ".join(lines)
    hlo = f"HloModule x, replica_count=8\n\nENTRY %main (x: f32[8,8]) -> f32[2,32] {{\n  {text}\n}}\n"
    differences = compare_function("stage0.forward", 1, LOCAL, hlo).differences
    assert [(each.kind, each.group, each.planned, each.compiled) for each in differences] == found


def test_no_mesh_and_no_devices(slow: Path) -> None:
    built = models.train_case("mlp/plain", microbatches=1).make()
    with pytest.raises(ConfigError, match="every stage has one device") as caught:
        planned(built, slow, mesh="data=1").compare_xla()
    assert caught.value.fix
    with pytest.raises(ConfigError, match="mesh of 8 devices: this process has 4") as caught:
        compare(planned(built, slow, mesh="data=8").staged, jax.devices()[:4])
    assert "force_host_platform_device_count=8" in caught.value.fix


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(tmp_path, capsys, "--mesh", "data=2,model=4", "--compare-xla")
    assert code == 0
    table = out[out.index("a device sends") :]
    assert "stage0.forward_backward × 2" in table and "in a step" in table
    code, text, _ = printed(tmp_path, capsys, "--mesh", "data=2,model=4", "--compare-xla", "--json")
    assert code == 0
    document = json.loads(text)
    compared, sharding = document["xla"], document["stages"][0]["sharding"]
    assert compared["planned"] == pytest.approx(sharding["sent_bytes"], abs=1)
    assert compared["compiled"] == compared["planned"] and "every collective is as planned" in table
    assert not any(function["differences"] for function in compared["functions"])
    code, _, err = printed(tmp_path, capsys, "--compare-xla", fast=False)
    assert code == 3 and "every stage has one device" in err


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    same = FunctionComparison("stage0.forward", 4, {"all_gather": 1000.0}, {"all_gather": 1000.0}, 2, 1, ())
    RichView(render_comparison(Comparison((same,)))).show()
    out = capsys.readouterr()[0]
    assert "every collective is as planned" in out and "2 → 1" in out and "1.00 ×" in out
    reduce = Difference("reduce_scatter", 4, 300.0, 600.0)
    other = FunctionComparison(
        "stage0.update", 1, {"reduce_scatter": 300.0}, {"reduce_scatter": 600.0}, 1, 1, (reduce,)
    )
    comparison = Comparison((same, other))
    assert comparison.planned == {"all_gather": 4000.0, "reduce_scatter": 300.0}
    assert comparison.differences == (reduce,)
    RichView(render_comparison(comparison)).show()
    out = capsys.readouterr()[0]
    assert "reduce-scatter among 4 devices, 300 B planned, 600 B compiled" in out and "4.20 KiB" in out
