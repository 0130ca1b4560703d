"""The arithmetic of the benchmarks."""

from __future__ import annotations

import io
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import bactrian
from bactrian.runtime.instructions import Run

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import first_step
import layouts
import pipeline
import plan as plans
import predicted
import programs
import suite
import unequal
import worker


def run(function: str, microbatch: int) -> Run:
    stage, phase = function.removeprefix("stage").split(".")
    return Run(function, int(stage), phase.partition("_1")[0], microbatch, (), ())


def test_ideal_is_the_schedule_without_overheads() -> None:
    first = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("update", -1), ("update_1", -1)]
    last = [("forward_backward", 0), ("forward_backward", 1), ("update", -1)]
    lists = [[run(f"stage{s}.{phase}", m) for phase, m in order] for s, order in enumerate((first, last))]
    seconds = {"stage0.forward": 1.0, "stage0.backward": 1.0, "stage1.forward_backward": 2.0}
    seconds |= {"stage0.update": 0.5, "stage0.update_1": 0.25, "stage1.update": 2.0}
    calls = [[seconds[x.function] for x in runs] for runs in lists]
    assert worker.ideal_seconds(lists, calls) == 7.25  # B1 ends at 6; the second round waits for stage 1, until 7
    calls[0][2] += 3.0  # B0 ends at 7, B1 at 8
    assert worker.ideal_seconds(lists, calls) == 8.75
    with pytest.raises(ValueError, match="order"):
        worker.ideal_seconds([lists[0][::-1], lists[1]], calls)


def test_median_of_functions_is_over_all_microbatches() -> None:
    runs = [run("stage0.forward", 0), run("stage0.forward", 1), run("stage0.update", -1)]
    medians = worker.median_of_functions(runs, [[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    assert medians == {"stage0.forward": 2.5, "stage0.update": 7.0}


def test_predicted_steps_are_compared_by_their_order_and_by_their_calls() -> None:
    assert predicted.rank_correlation([1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 6.0]) == -1.0
    assert predicted.rank_correlation([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == 0.5
    assert len(predicted.TEN) == 10
    for ten, models in ((predicted.TEN, ["mlp", "gpt", "words"]), (predicted.SCHEDULES, ["mlp", "transformer"])):
        assert [model for model, decided in ten if predicted.is_found(decided)] == models
    step, state, batch = programs.mlp(width=8, batch=4, length=2, layers=2)
    compiled = step.with_options(num_stages=2, num_microbatches=2).trace(state, batch).plan().compile()
    calls = {call.function: 1.0 for call in compiled.session.staged.program.calls}
    found = worker.predicted(compiled, calls)
    assert found["predicted_seconds"] == compiled.plan.predicted_step_seconds
    assert found["simulated_seconds"] >= 2 + 2 + 1  # a forward, two fused ones, a backward, an update
    assert found["predicted_functions"].keys() == calls.keys()


def test_found_plans_are_compared_with_the_fastest() -> None:
    rows = [("a", True, 1.0, 3.0), ("a", False, 2.0, 2.0), ("a", False, 0.5, 2.5), ("b", True, 1.0, 1.0)]
    names = ("model", "found", "predicted_seconds", "measured_seconds")
    shares = predicted.above_fastest([dict(zip(names, row, strict=True)) for row in rows])
    assert shares == {"a": (0.5, 0.25), "b": (0.0, 0.0)}


def test_cuts_of_equal_weight_are_the_nearest() -> None:
    assert unequal.halves([1.0] * 5) in (2, 3)
    assert unequal.halves([1.0, 1.0, 1.0, 1.0, 8.0]) == 4
    assert unequal.halves([0.0, 3.0, 1.0, 1.0, 1.0]) == 2


@pytest.mark.parametrize("name", ["mixture", "tables", "transformer", "unet", "words"])
def test_programs_have_a_gradient_for_all_of_their_state(name: str) -> None:
    small: dict[str, dict[str, int]] = {
        "mixture": {"width": 4, "experts": 2, "dense": 1, "mixed": 1, "batch": 2, "length": 4},
        "tables": {"count": 2, "rows": 4, "width": 4, "layers": 1, "batch": 8},
        "transformer": {"layers": 1, "width": 4, "heads": 2, "batch": 2, "length": 4},
        "unet": {"channels": 2, "size": 8, "batch": 2},
        "words": {"vocabulary": 8, "width": 4, "layers": 1, "batch": 2, "length": 4},
    }
    step, state, batch = programs.PROGRAMS[name](**small[name])
    new, loss = step.reference(state, batch)
    assert np.isfinite(loss)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert np.isfinite(after).all() and (np.asarray(after) != before).any()


def test_interval_holds_the_median_of_paired_quotients() -> None:
    base = np.linspace(1.0, 2.0, 9)
    assert pipeline.interval([2 * base, base], pipeline.ratio) == (2.0, 2.0, 2.0)
    value, low, high = pipeline.interval([base])
    assert low < value < high


def test_first_steps_are_compared_with_what_jit_compiles() -> None:
    def run(*seconds: float) -> dict[str, Any]:
        return {"name": "mlp:8", "seconds": seconds, "core_seconds": [2 * seconds[0], *seconds[1:]]}

    found = first_step.figures([run(1, 2, 3, 9), run(1, 4, 5, 9)], [run(1, 1, 2, 7), run(1, 1, 2, 5)])
    assert (found["seconds"], found["jit_seconds"]) == ([1, 3, 4, 9], [1, 1, 2, 6])
    assert (found["plan_ratio"], found["compile_ratio"]) == (1.0, 2.0)
    assert (found["plan_core_ratio"], found["compile_core_ratio"]) == (1.0, 1.8)


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        ("mlp", "zero1"),
        ("mlp", "zero3"),
        *(pytest.param(name, "auto", marks=pytest.mark.long) for name in suite.SMALL),
    ],
)
def test_bytes_of_layouts_are_those_of_xla(model: str, strategy: str) -> None:
    made = suite.SMALL[model]()
    step = bactrian.parallelize(made.step, num_stages=1, mesh="data=2,model=4", strategy=strategy)
    row = layouts.sent_bytes(step.trace(*made.shapes()).plan())
    assert row["predicted"] == pytest.approx(row["counted"], abs=1)
    assert row["xla"] == row["counted"] and not row["differences"]
    assert {"all_gather", "reduce_scatter"} <= row["xla"].keys() or strategy == "auto"


def test_table_of_bytes() -> None:
    row = {"predicted": {"reduce_scatter": 1000}, "counted": {"reduce_scatter": 1000.0}, "xla": {"all_reduce": 2000.0}}
    row |= {"differences": 7}
    file = io.StringIO()
    Console(width=120, file=file).print(layouts.table_of_bytes({"model": "mlp", "rows": {"zero1": row}}))
    text = file.getvalue()
    assert "2.000" in text and "7" in text


def test_manual_plans_use_all_devices_and_the_whole_batch() -> None:
    from bactrian.passes.machine.spec import num_devices, parse_axes

    made = list(plans.grid(64, 8, 48, 1024))
    assert len(made) == len(set(made)) > 100
    for each in made:
        axes = parse_axes(each.mesh)
        assert num_devices(axes) * each.num_stages == 64 and each.num_stages <= 48
        assert 1024 // each.num_microbatches // dict(axes)["data"] in (1, 2, 4)
    assert [(each.num_stages, each.num_microbatches) for each in plans.candidates("gpt-39B", "alpa", 64, 8)] == [
        (16, 1024)
    ]
    assert [each.num_stages for each in plans.candidates("gpt-1.3B", "inter", 4, 8)] == [4]
    assert {each.mesh for each in plans.candidates("gpt-2.6B", "intra", 8, 8)} == {"data=1,model=8"}
    assert plans.candidates("gpt-125M", "alpa", 1, 8) == []


def test_published_plans_use_all_devices() -> None:
    from bactrian.driver.models.alpa_suite import SUITE
    from bactrian.passes.machine.spec import meshes_of_stages, num_devices, parse_meshes

    for name in tomllib.loads(plans.DATA.read_text())["plan"]:
        (made,) = plans.candidates(name, "alpa", SUITE[name].devices, 8)
        assert made.mesh is not None and made.num_stages is not None
        meshes = meshes_of_stages(parse_meshes(made.mesh), made.num_stages)
        assert sum(map(num_devices, meshes)) == SUITE[name].devices


def test_a_cluster_of_the_first_devices(tmp_path: Path) -> None:
    from bactrian.passes.machine.cluster_file import read_cluster

    whole = read_cluster(f"{plans.DATA}:p3_16xlarge").groups[0]
    for devices, hosts, per_host in ((64, 8, 8), (16, 2, 8), (4, 1, 4)):
        (made,) = read_cluster(plans.with_devices(f"{plans.DATA}:p3_16xlarge", devices, tmp_path)).groups
        assert (made.hosts, made.devices_per_host) == (hosts, per_host)
        assert made.device.flops_per_second == pytest.approx(whole.device.flops_per_second)
        assert made.inter_host_latency == pytest.approx(whole.inter_host_latency)


def test_a_plan_is_made_and_shown_beside_what_was_measured() -> None:
    cluster = f"{plans.DATA}:h100"
    row = plans.make("moe-380M", plans.Manual("data=1", 2, 256), cluster)
    assert row["step_s"] > 0 and row["pflops"] > 0 and row["cpu_s"] > 0
    failed = plans.make("moe-380M", plans.Manual("data=1", 1000, 256), cluster)
    assert failed["error"].startswith("1000 stages need") and "step_s" not in failed
    file = io.StringIO()
    alpa = {"devices": 8, "plan": "alpa"}
    Console(width=200, file=file).print(plans.table([row | alpa, failed | alpa, row | alpa | {"plan": "inter"}]))
    lines = file.getvalue().splitlines()
    assert sum("0.36" in line for line in lines) == 2, "what was measured of Alpa's plan on 8 devices"
    assert any("1000 stages need" in line for line in lines)
