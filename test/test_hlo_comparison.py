"""What plans say that their steps send, beside what XLA sends: every difference has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import pytest
from cases import Built, sgd_step
from jaxlib.mlir import ir
from test_mesh_plans import printed

import bactrian
from bactrian.driver.planned_step import Planned
from bactrian.driver.report.comparison_table import render_comparison
from bactrian.driver.report.terminal import RichView
from bactrian.driver.xla.compare_bytes import (
    CLASSES,
    UNEXPLAINED,
    Comparison,
    Difference,
    FunctionComparison,
    Sent,
    compare,
    compare_function,
)
from bactrian.driver.xla.compile_stage import compile_function, constrain, function_texts
from bactrian.driver.xla.hlo_collectives import read_collectives
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.regions import main_function, nested_operations
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


def explained(comparison: Comparison) -> None:
    """The rest of this file stands on these: the names account for all that is more or less."""
    assert not comparison.unexplained and UNEXPLAINED not in comparison.classes
    for function in comparison.functions:
        more = sum(difference.more_bytes for difference in function.differences)
        assert sum(function.compiled.values()) - sum(function.planned.values()) == pytest.approx(more)
        assert all(difference.names and set(difference.names) <= set(CLASSES) for difference in function.differences)


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
    assert comparison.planned == pytest.approx(predicted(plan.plan), abs=1)
    assert comparison.compiled == pytest.approx(comparison.planned, rel=0.1)
    assert not comparison.classes
    assert [f.runs for f in comparison.functions if "backward" in f.symbol] == [microbatches]


@pytest.mark.parametrize(
    ("name", "mesh", "strategy", "classes", "most"),
    [
        ("mlp/plain", "data=2,model=4", "auto", {"axis-by-axis"}, 1.003),
        ("mlp/plain", "data=8", "zero3", set(), 1.0),
        ("conv/linen", "data=8", "data", {"all-reduce-and-slice"}, 1.18),  # of cut images
        pytest.param(
            "gpt-tied-dropout/linen",
            "data=2,model=4",
            "auto",
            {"all-reduce-and-slice", "axis-by-axis"},
            1.002,
            marks=pytest.mark.long,
        ),
        pytest.param(
            "encoder-decoder/linen",
            "data=2,model=4",
            "zero3",
            {"all-reduce-and-slice"},
            1.001,
            marks=pytest.mark.long,
        ),
    ],
)
def test_every_difference_has_a_name(
    name: str, mesh: str, strategy: str, classes: set[str], most: float, slow: Path
) -> None:
    """XLA sends what is planned, and so many times as much where a difference has a name."""
    built = models.train_case(name, "adamw", microbatches=2).make()
    comparison = planned(built, slow, mesh=mesh, strategy=strategy).compare_xla()
    explained(comparison)
    assert set(comparison.classes) == classes
    assert 1.0 <= sum(comparison.compiled.values()) / sum(comparison.planned.values()) <= most


def test_stages_are_compared_each_on_its_mesh(slow: Path) -> None:
    built = models.train_case("mlp/plain", "sgd", microbatches=4, stages=2, schedule="gpipe").make()
    plan = planned(built, slow, mesh="data=4", num_stages=2)
    comparison = plan.compare_xla()
    explained(comparison)
    assert comparison.planned == pytest.approx(predicted(plan.plan), abs=1)
    runs = {function.symbol: function.runs for function in comparison.functions}
    assert runs["stage0.forward"] == runs["stage1.backward"] == 4 and runs["stage0.update"] == 1


def test_elements_of_another_size(slow: Path) -> None:
    """CPUs add up bfloat16 as float32: twice the bytes of what is planned, or of a move beside it."""
    built = data_parallel(jnp.bfloat16, rows=32, width=64)
    comparison = planned(built, slow, mesh="data=4,model=2").compare_xla()
    explained(comparison)
    sizes = {
        (difference.planned[0].element_bytes, difference.compiled[0].element_bytes)
        for function in comparison.functions
        for difference in function.differences
        if "element-type" in difference.names
    }
    assert sizes == {(2.0, 4.0)}


def test_numbers_of_ops_change_nothing(slow: Path) -> None:
    """What is compared is what runs: the same collectives without the numbers."""
    built = models.train_case("mlp/plain", "adamw", microbatches=2).make()
    module = planned(built, slow, mesh="data=2,model=4").staged.module
    texts = function_texts(module, "cpu"), function_texts(module, "cpu", numbered=True)
    for symbol, text in texts[0].items():
        read = [
            sorted((c.kind, c.group, c.nbytes, c.shapes) for c in read_collectives(hlo_of(each)))
            for each in (text, texts[1][symbol])
        ]
        assert read[0] == read[1]


def hlo_of(text: str) -> str:
    return compile_function(text, jax.devices()[:8]).hlo_modules()[0].to_string()


READERS = """
module @readers attributes {mhlo.num_partitions = 8 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @stage0 = <["data"=2, "model"=4]>
  func.func public @main(%x: tensor<4x32xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data", "model"}]>})
      -> (tensor<4x32xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"data"}, {"model"}]>},
          tensor<4x32xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"data", "model"}]>}) {
    %y = stablehlo.tanh %x {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {"data", "model"}]>]>} : tensor<4x32xf32>
    %0 = sdy.reshard READ <@stage0, [{}, {"model", "data"}]> : tensor<4x32xf32>
    %1 = sdy.reshard %0 <@stage0, [{"data"}, {"model"}]> : tensor<4x32xf32>
    %2 = stablehlo.sine %1 {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"data"}, {"model"}]>]>} : tensor<4x32xf32>
    %3 = stablehlo.cosine READ {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{}, {"data", "model"}]>]>} : tensor<4x32xf32>
    return %2, %3 : tensor<4x32xf32>, tensor<4x32xf32>
  }
}
"""


def compared(text: str) -> FunctionComparison:
    """A module with reshards, numbered, beside what XLA makes of it."""
    with make_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        main = main_function(module)
        for number, op in enumerate(nested_operations(main)):
            op.location = ir.Location.name(f"op.{number}/{op.name}")
        explicit = str(module.operation.get_asm(enable_debug_info=True))
        constrain(main, (("data", 2), ("model", 4)), "cpu")
        constrained = str(module.operation.get_asm(enable_debug_info=True))
    return compare_function("readers", 1, explicit, hlo_of(constrained))


@pytest.mark.parametrize("read", ["%y", "%x"], ids=["result", "argument"])
def test_readers_beside_a_move_read_what_was_planned(read: str) -> None:
    """Shardy lets all later readers of a value read what a chain of constraints makes of it: here the cosine would
    bring that back into its own sharding, by the same moves once more."""
    comparison = compared(READERS.replace("READ", read))
    held = 4 * 32 * 4 / 8
    assert comparison.planned == comparison.compiled == {"all_to_all": held / 2, "collective_permute": held}
    assert not comparison.differences


NUMBERED = """
module @numbered {
  sdy.mesh @stage0 = <["data"=2, "model"=4]>
  func.func public @main(%x: tensor<8x32xf32> {sdy.sharding = #sdy.sharding<@stage0, [{}, {"model"}]>})
      -> (tensor<8x32xf32> {sdy.sharding = #sdy.sharding<@stage0, [{"model"}, {}]>}) {
    %0 = sdy.reshard %x <@stage0, [{"model"}, {}]> : tensor<8x32xf32> loc("op.0/move")
    %1 = stablehlo.tanh %0 {sdy.sharding = #sdy.sharding_per_value<[<@stage0, [{"model"}, {}]>]>} : tensor<8x32xf32> loc("op.1/tanh")
    return %1 : tensor<8x32xf32> loc("op.2/return")
  }
}
"""
MOVED = '%a = f32[8,8]{1,0} all-to-all(%x), replica_groups=[2,4]<=[8], metadata={op_name="op.0/move"}'


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ((MOVED,), ()),
        ((MOVED.replace("f32", "f64"),), ("element-type",)),
        ((MOVED.replace("f32[8,8]{1,0} all-to-all", "f32[8,32]{1,0} all-gather"),), ("gathered",)),
        ((MOVED.replace("f32[8,8]", "f32[8,4]"), MOVED.replace("%a", "%b")), (UNEXPLAINED,)),
        ((MOVED.replace("[2,4]", "[4,2]"), MOVED.replace("[2,4]", "[4,2]").replace("%a", "%b")), (UNEXPLAINED,)),
        (('%a = f32[8,8]{1,0} copy(%x), metadata={op_name="op.0/move"}',), (UNEXPLAINED,)),
        (("%a = f32[8,8]{1,0} copy(%x)",), ("dropped",)),
        (
            (MOVED, '%b = f32[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], metadata={op_name="op.1/tanh"}'),
            (UNEXPLAINED,),
        ),
        ((MOVED, "%b = f32[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]"), (UNEXPLAINED,)),
    ],
)
def test_names_are_computed(lines: tuple[str, ...], names: tuple[str, ...]) -> None:
    """One planned all-to-all, beside what a compiler might have made of it."""
    text = "\n  ".join(lines)
    hlo = f"HloModule x, num_partitions=8\n\nENTRY %main (x: f32[8,8]) -> f32[8,8] {{\n  {text}\n}}\n"
    found = compare_function("stage0.forward", 1, NUMBERED, hlo).differences
    assert tuple(name for difference in found for name in difference.names) == names


def test_what_runs_an_unknown_number_of_times() -> None:
    hlo = f"""HloModule x, num_partitions=8

%body (x: f32[8,8]) -> f32[8,8] {{
  {MOVED}
}}

%condition (x: f32[8,8]) -> pred[] {{
  %c = pred[] constant(true)
}}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %w = f32[8,8] while(%x), condition=%condition, body=%body
}}
"""
    (difference,) = compare_function("stage0.forward", 1, NUMBERED, hlo).differences
    assert difference.names == ("in-loop",)
    known = hlo.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    (difference,) = compare_function("stage0.forward", 1, NUMBERED, known).differences
    assert difference.names == (UNEXPLAINED,)  # planned once, and sent three times


def test_no_mesh_and_no_devices(slow: Path) -> None:
    built = models.train_case("mlp/plain", microbatches=1).make()
    with pytest.raises(ConfigError, match="every stage has one device") as caught:
        planned(built, slow).compare_xla()
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
    assert all(name in table for name in compared["differences"])
    more = sum(compared["compiled"].values()) - sum(compared["planned"].values())
    assert more == pytest.approx(sum(compared["differences"].values()))
    code, _, err = printed(tmp_path, capsys, "--compare-xla", fast=False)
    assert code == 3 and "every stage has one device" in err


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    same = FunctionComparison("stage0.forward", 4, {"all_gather": 1000.0}, {"all_gather": 1000.0}, 2, 1, ())
    RichView(render_comparison(Comparison((same,)))).show()
    out = capsys.readouterr()[0]
    assert "every collective is as planned" in out and "2 → 1" in out and "1.00 ×" in out
    reduce = Difference(
        ("all-reduce-and-slice",),
        "stablehlo.reduce jit(f)/sum",
        "/a/b.py:3",
        (Sent("reduce_scatter", 4, 300.0, 4.0),),
        (Sent("all_reduce", 4, 600.0, 4.0),),
    )
    other = FunctionComparison("stage0.update", 1, {"reduce_scatter": 300.0}, {"all_reduce": 600.0}, 1, 1, (reduce,))
    comparison = Comparison((same, other))
    assert comparison.planned == {"all_gather": 4000.0, "reduce_scatter": 300.0}
    assert comparison.classes == {"all-reduce-and-slice": 300.0}
    RichView(render_comparison(comparison)).show()
    out = capsys.readouterr()[0]
    assert "+300 B" in out and "b.py:3" in out and "4.20 KiB" in out and "4.49 KiB" in out
