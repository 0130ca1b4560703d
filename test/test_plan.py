"""The plan: JSON form, checks, difference and table."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bactrian.driver.report.cut_reasons import cut_reasons, moved_layers
from bactrian.driver.report.plan_diff import diff, render_diff
from bactrian.driver.report.plan_table import render_explanation, render_plan, stage_reasons
from bactrian.driver.report.terminal import WIDTH, RichView
from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.passes.frame.units import human_bytes, human_count, human_seconds
from bactrian.passes.frame.views import Viewable
from bactrian.passes.plan.schema import STAGED_FILE, LayerPlan, Plan, Remark, StagePlan, fingerprint_text
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan
from bactrian.passes.plan.step_timing import StageTiming
from bactrian.passes.schedules.by_name import SCHEDULES


def random_plan(seed: int, max_stages: int = 6) -> Plan:
    """A plan with random decisions; each prediction is missing in one plan of four."""
    draw = random.Random(seed)

    def maybe(top: int) -> int | None:
        return draw.randrange(top) if draw.random() < 0.75 else None

    sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, max_stages))]
    stages: list[StagePlan] = []
    first = 0
    for number, size in enumerate(sizes):
        mesh = (("data", draw.randint(1, 4)), ("model", draw.randint(1, 8))) if draw.random() < 0.5 else (("data", 1),)
        counts = [maybe(10 ** draw.randint(1, 18)) for _ in range(10)]
        seconds = draw.random() if draw.random() < 0.75 else None
        stages.append(StagePlan(number, first, first + size - 1, mesh, *counts, predicted_seconds=seconds))
        first += size
    names = tuple(LayerPlan(k, f"op é{k}", tuple(f"block{k}/{i}" for i in range(k % 3))) for k in range(first))
    return Plan(
        num_stages=len(sizes),
        num_microbatches=draw.randint(1, 64),
        schedule=draw.choice(list(SCHEDULES)),
        num_layers=first,
        stages=tuple(stages),
        layers=names if draw.random() < 0.5 else (),
        fingerprint=fingerprint_text(str(seed)),
        predicted_step_seconds=draw.choice([None, 0.0, 1e-7, 12.5]),
        peak_memory_bytes=maybe(10**12),
        options=tuple((f"option{i}", draw.choice([None, True, 1, 1.5, "x"])) for i in range(draw.randint(0, 3))),
    )


def small(**changes: Any) -> Plan:
    return dataclasses.replace(Plan(2, 4, "1f1b", 3, (StagePlan(0, 0, 1), StagePlan(1, 2, 2))), **changes)


@pytest.mark.parametrize("seed", range(100))
def test_json_round_trip_is_the_identity(seed: int) -> None:
    plan = random_plan(seed)
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert diff(plan, again) == []


@pytest.mark.parametrize("seed", range(100))
def test_plans_are_equal_exactly_when_nothing_differs(seed: int) -> None:
    a, b = random_plan(seed), random_plan(seed + 1000)
    assert (a == b) == (a.to_json() == b.to_json()) == (not diff(a, b))


def test_equal_plans_have_equal_bytes_however_they_were_made() -> None:
    a = small(predicted_step_seconds=1, peak_memory_bytes=7, options=(("b", 1), ("a", 2)))
    b = small(
        predicted_step_seconds=np.float64(1.0),
        peak_memory_bytes=np.int64(7),
        options=[("a", 2), ("b", 1)],
        stages=[*a.stages],
    )
    assert a.to_json() == b.to_json()
    assert small(predicted_step_seconds=-0.0).to_json() == small(predicted_step_seconds=0.0).to_json()


def test_json_does_not_depend_on_the_hash_seed() -> None:
    code = "import sys; sys.path.insert(0, 'test'); from test_plan import random_plan; print(random_plan(3).to_json())"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(texts) == 1


def test_a_plan_can_be_written_by_hand() -> None:
    plan = Plan.from_json(
        """{"version": 2, "num_stages": 2, "num_microbatches": 4, "schedule": "1f1b", "num_layers": 3,
        "stages": [{"stage": 0, "first_layer": 0, "last_layer": 1},
                   {"stage": 1, "first_layer": 2, "last_layer": 2, "mesh": {"model": 4, "data": 2}}]}"""
    )
    assert plan.stages[1].mesh == (("model", 4), ("data", 2)) and plan.num_devices == 9
    plan.check_program("any program")
    assert Plan.from_json(plan.to_json()) == plan  # the order of the axes is kept


def test_plans_of_version_1_are_read() -> None:
    plan = small(stages=(StagePlan(0, 0, 1, sharding=ShardingPlan(shardings=(("w", "data,-"),))), StagePlan(1, 2, 2)))
    old = plan.to_json().replace('"version": 2', '"version": 1').replace('"shardings": {', '"layouts": {')
    assert old != plan.to_json() and Plan.from_json(old) == plan
    with pytest.raises(ConfigError, match="missing keys"):
        Plan.from_json('{"version": 1, "stages": 3}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "it has version 3, this Bactrian reads version 2"),
        ({"version": None}, "it has no version"),
        ({"version": True}, "it has version true"),
        ({"versoin": 1}, "unknown key in plan: 'versoin'"),
        ({"num_stages": "2"}, "plan.num_stages should be an integer from 0 to 9223372036854775807, got '2'"),
        ({"num_stages": True}, "plan.num_stages should be an integer"),
        ({"num_stages": None}, "plan.num_stages should be an integer"),
        ({"num_stages": 2.5}, "plan.num_stages should be an integer"),
        ({"num_stages": 3}, "num_stages is 3, but 2 stages are listed"),
        ({"num_microbatches": 0}, "num_microbatches is 0, should be from 1 to 65536"),
        ({"num_layers": 4}, "the stages end at layer 2, should end at layer 3"),
        ({"schedule": 1}, "plan.schedule should be a string"),
        ({"stages": {}}, "plan.stages should be a list"),
        ({"stages": [1]}, r"plan.stages\[0\] should be an object"),
        ({"stages": [{"stage": 0, "first_layer": 0}]}, r"missing key in plan.stages\[0\]: 'last_layer'"),
        ({"stages": [{"stage": 0, "first_layer": 1, "last_layer": 2}]}, "should begin at layer 0"),
        ({"layers": [{"layer": 1}]}, "layers should be numbered 0 to 2"),
        ({"layers": [{"layer": 0, "modules": "x"}]}, r"layers\[0\].modules should be a list of strings"),
        ({"options": {"a": [1]}}, "plan.options should be option names with plain values"),
        ({"options": [1]}, "plan.options should be an object"),
        ({"options": {"a": "\ud800"}}, "plan.options should be option names with plain values"),
        ({"num_layers": 10**12}, "num_layers is 1000000000000, should be from 1 to 65536"),
        ({"num_layers": 2**63}, "plan.num_layers should be an integer from 0 to 9223372036854775807, got 92233"),
        ({"predicted_step_seconds": "fast"}, "plan.predicted_step_seconds should be a finite number"),
        ({"peak_memory_bytes": -1}, "plan.peak_memory_bytes should be an integer from 0"),
    ],
)
def test_bad_json_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    data = json.loads(small().to_json()) | change
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "plan should be an object"),
        ('{"version": NaN}', "NaN is not a number of JSON"),
        ('{"version": 1, "version": 1}', "key 'version' stands twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize("seed", range(200))
def test_damaged_json_is_refused_or_read_never_a_bare_exception(seed: int) -> None:
    draw = random.Random(seed)
    text = random_plan(seed).to_json()
    at = draw.randrange(len(text))
    damaged = text[:at] + draw.choice(["", "0", '"', "{", "null", "-", "[]"]) + text[at + draw.randrange(4) :]
    try:
        Plan.from_json(damaged)
    except ConfigError as error:
        assert "plan" in str(error)


def test_bad_plans_cannot_be_made_in_python_either() -> None:
    for changes in (
        {"num_stages": 0},
        {"schedule": 3},
        {"predicted_step_seconds": float("nan")},
        {"options": (("a", 1), ("a", 2))},
        {"options": 3},
        {"stages": (StagePlan(0, 0, 2, ()), StagePlan(1, 3, 2))},
        {"stages": ("x",)},
        {"version": 1},
    ):
        with pytest.raises(ConfigError, match="bad plan"):
            small(**changes)


def test_save_and_load(tmp_path: Path) -> None:
    plan = random_plan(1)
    plan.save(tmp_path / "new" / "folder", "module {}")
    assert Plan.load(tmp_path / "new" / "folder") == plan == Plan.load(tmp_path / "new" / "folder" / "plan.json")
    assert (tmp_path / "new" / "folder" / STAGED_FILE).read_text() == "module {}"
    plan.save(tmp_path / "new" / "folder")  # the module of another plan does not stay behind
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["plan.json"]


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read plan .*: No such file"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Plan.load(tmp_path)
    with pytest.raises(ConfigError, match="cannot save the plan"):
        small().save(tmp_path / "plan.json")


def test_a_plan_for_another_program_is_refused() -> None:
    mine, other = fingerprint_text("mine"), fingerprint_text("other")
    plan = small(fingerprint=mine)
    plan.check_program(mine)
    with pytest.raises(ProgramError) as caught:
        plan.check_program(other)
    assert mine[:12] in caught.value.message and other[:12] in caught.value.message and "--save" in caught.value.fix


def test_diff_names_decisions_and_relative_changes() -> None:
    a = small(options=(("balance", 1),))
    stages = (a.stages[0], dataclasses.replace(a.stages[1], mesh=(("data", 2), ("model", 4)), state_bytes=100))
    b = small(schedule="gpipe", num_microbatches=8, stages=stages, options=(("balance", 2),))
    assert diff(a, b) == [
        "num_microbatches 4 → 8 (+100.0 %)",
        "schedule 1f1b → gpipe",
        "option balance 1 → 2 (+100.0 %)",
        "stage 1: mesh [data=1] → [data=2, model=4]",
        "stage 1: state_bytes unknown → 100",
    ]


def test_diff_says_how_cuts_and_meshes_differ() -> None:
    wide = (("data", 2), ("model", 2))
    names = tuple(LayerPlan(k, modules=(f"block_{k}",)) for k in range(3))
    a = small(layers=names)
    b = small(layers=names, stages=(StagePlan(0, 0, 0), StagePlan(1, 1, 2)))
    assert diff(a, b) == [
        "layers of stages 0–1 · 2 → 0 · 1–2",
        "stage 1 begins at layer 2 (block_2) → layer 1 (block_1)",
    ]
    c = small(layers=names, num_stages=3, stages=tuple(StagePlan(s, s, s, wide) for s in range(3)))
    assert diff(a, c) == [
        "num_stages 2 → 3 (+50.0 %)",
        "layers of stages 0–1 · 2 → 0 · 1 · 2",
        "meshes of stages 2 × 1 device → 3 × data=2 model=2",
        "devices 2 → 12 (+500.0 %)",
    ]


def test_diff_says_which_shardings_differ() -> None:
    def with_sharding(*stage: ShardingPlan) -> Plan:
        return small(stages=(StagePlan(0, 0, 1, sharding=stage[0] if stage else None), StagePlan(1, 2, 2)))

    one = ShardingPlan(seconds=2.0, shardings=(("w", "data,-"), ("b", "-")), compared=(ShardingFigures("data", 3.0),))
    other = ShardingPlan(seconds=1.0, shardings=(("w", "-,data"), ("b", "-")), compared=(ShardingFigures("data", 4.5),))
    assert diff(with_sharding(one), with_sharding(other)) == [
        "stage 0: seconds 2 → 1 (-50.0 %)",
        "stage 0: sharding of w data,- → -,data",
        "stage 0: baseline data: seconds 3 → 4.5 (+50.0 %)",
    ]
    assert diff(with_sharding(one), with_sharding()) == ["stage 0: sharding only in the first plan"]
    assert diff(with_sharding(), with_sharding(one)) == ["stage 0: sharding only in the second plan"]
    turned = dataclasses.replace(one, shardings=one.shardings[::-1])
    assert diff(with_sharding(one), with_sharding(turned)) == ["stage 0: shardings in another order"]
    more = dataclasses.replace(one, seconds=2.0 + 1e-12, compared=())
    assert diff(with_sharding(one), with_sharding(more)) == [
        "stage 0: seconds 2.0 → 2.000000000001 (+0.0 %)",
        "stage 0: baseline data only in the first plan",
    ]


def timed(layers: list[float], cut: int, speeds: tuple[float, float] = (1.0, 1.0), count: int = 9) -> Plan:
    """A plan of two stages over layers of so many seconds; ``cut`` is the first layer of the second."""
    ranges = ((0, cut - 1), (cut, len(layers) - 1))
    busy = [sum(layers[first : last + 1]) / speed for (first, last), speed in zip(ranges, speeds, strict=True)]
    stages = tuple(
        StagePlan(s, *ranges[s], timing=StageTiming(busy[s] / 3, 2 * busy[s] / 3), predicted_seconds=busy[s] * count)
        for s in range(2)
    )
    names = tuple(LayerPlan(k, "", (f"block_{k}",), each) for k, each in enumerate(layers))
    step = sum(busy) + (count - 1) * max(busy)
    return Plan(2, count, "1f1b", len(layers), stages, names, predicted_step_seconds=step)


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 4.0)])
def test_the_next_best_cut_takes_as_long_as_its_own_plan(speeds: tuple[float, float]) -> None:
    layers = [1.0, 2.0, 1.0, 3.0]
    for cut in (1, 2, 3):
        plan = timed(layers, cut, speeds)
        moved = {each.layer: each for each in moved_layers(plan)}
        others = {cut - 1: cut - 1, cut: cut + 1}  # the layer that moves, and where the second stage begins then
        assert moved.keys() == {layer for layer, other in others.items() if 0 < other < len(layers)}
        for layer, each in moved.items():
            other = timed(layers, others[layer], speeds)
            assert each.added_seconds == pytest.approx(
                (other.predicted_step_seconds or 0) - (plan.predicted_step_seconds or 0)
            )
        assert [each.added_seconds for each in moved_layers(plan)] == sorted(
            each.added_seconds for each in moved.values()
        )


def test_the_cut_is_explained() -> None:
    reasons = dict(cut_reasons(timed([1.0, 2.0, 1.0, 3.0], 3)))
    assert reasons["pace"] == (
        "stage 0 binds: it takes 4.00 s for a microbatch, 14.3 % more than the mean, and the others wait for it"
    )
    assert reasons["next best"].startswith(
        "layer 2 (block_2) in stage 1 instead of 0 would take 0.00 s more a step (+0.0 %): the least of all cuts"
    )
    assert dict(cut_reasons(timed([1.0, 1.0], 1))) == {
        "pace": "all stages take 1.00 s for a microbatch: none waits for a slower one",
        "next best": "there is no other cut into so many stages: each has one layer",
    }
    assert cut_reasons(Plan(1, 1, "1f1b", 1, (StagePlan(0, 0, 0),))) == []
    assert cut_reasons(small()) == []  # nothing was predicted


def test_memory_binds_where_little_is_left() -> None:
    def held(nbytes: int) -> str:
        sharding = ShardingPlan(limit_bytes=512, peak_bytes=nbytes)
        stages = (StagePlan(0, 0, 1, sharding=sharding), StagePlan(1, 2, 2, sharding=ShardingPlan(limit_bytes=2000)))
        return dict(cut_reasons(small(stages=stages)))["memory"]

    assert held(504) == "it binds: a device of stage 0, the fullest, holds 504 B of 512 B, 98.4 %"
    assert held(256) == "it does not bind: a device of stage 0, the fullest, holds 256 B of 512 B, 50.0 %"


def test_a_plan_of_the_public_name_can_be_printed() -> None:
    program = """
import sys, bactrian
from bactrian.passes.frame.views import Viewable
from bactrian.passes.plan.schema import StagePlan
plan = bactrian.Plan(1, 4, "1f1b", 2, (StagePlan(0, 0, 1),))
print(plan)
plan.show()
assert plan._repr_html_().startswith("<pre")
assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("1 stage · 4 microbatches · 1f1b · 2 layers · 1 cpu device") == 2


HOSTILE = "block\x1b[2J\x9b31m\u202e\x07"


def hostile_plan() -> Plan:
    """A plan whose names would clear a terminal, recolour it, and turn its lines around."""
    sharding = ShardingPlan(compared=(ShardingFigures(HOSTILE, 1.0),), memory_bytes=((HOSTILE, 5),))
    return small(
        layers=tuple(LayerPlan(k, HOSTILE, (HOSTILE,)) for k in range(3)),
        stages=(StagePlan(0, 0, 1, ((HOSTILE, 2),), sharding=sharding), StagePlan(1, 2, 2)),
        schedule=HOSTILE,
        options=((HOSTILE, HOSTILE),),
        remarks=(Remark("warning", HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_control_characters_of_names_reach_no_terminal(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    plan = hostile_plan()
    for table in (render_plan(plan), render_explanation(plan), render_diff(small(), plan)):
        RichView(table).show()
        shown = capsys.readouterr().out
        ours = re.sub(r"\x1b\[[\d;]*m", "", shown) if is_terminal else shown  # the colours of the table itself
        assert ours.count("block\\x1b[2J") >= 2 and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", ours)


def test_control_characters_of_names_are_in_no_error_or_remark() -> None:
    error = ConfigError(HOSTILE, where=HOSTILE, why=HOSTILE, fix=HOSTILE)
    for text in (str(error), hostile_plan().remarks[0].text()):
        assert text.count("block\\x1b[2J\\x9b31m\\u202e\\x07") == 4 and text.replace("\n", "").isprintable()
    assert error.message == HOSTILE  # what is compared and passed on stays as it is


@pytest.mark.parametrize("name", ["w[/x]", "[bold]", ":smile:"])
def test_names_are_shown_as_they_are(name: str) -> None:
    plan = small(platform=name)
    assert name in str(plan) and name in plan._repr_html_()


def test_data_without_a_table_is_refused() -> None:
    with pytest.raises(TypeError, match="no table of Viewable is known"):
        Viewable().show()


@pytest.mark.parametrize("seed", range(40))
def test_tables_fit_and_render_whatever_is_known(seed: int) -> None:
    plan = random_plan(seed, max_stages=40 if seed % 4 == 0 else 6)
    text = str(plan)
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert plan.fingerprint[:12] in text and f"{plan.num_microbatches} microbatch" in text
    page = plan._repr_html_()
    assert page.startswith("<pre") and plan.fingerprint[:12] in page
    for stage in plan.stages:
        assert stage_reasons(plan, stage)


def test_the_table_has_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    first = StagePlan(
        0,
        0,
        1,
        forward_flops=10**9,
        backward_flops=2 * 10**9,
        num_parameters=1_230_000,
        state_bytes=3 << 20,
        activation_bytes=1 << 20,
        microbatches_in_flight=2,
        sent_bytes_forward=2048,
        sent_bytes_backward=0,
        predicted_seconds=0.3,
    )
    stages = (first, dataclasses.replace(first, stage=1, first_layer=2, last_layer=2, predicted_seconds=0.1))
    small(stages=stages, predicted_step_seconds=0.5, peak_memory_bytes=5 << 20).show()
    text = capsys.readouterr().out
    for figure in (
        "3.00 G",
        "1.23 M",
        "3.00 MiB",
        "1.00 MiB × 2",
        "2.00 KiB",
        "75.0 %",
        "6.00 G",
        "4.00 MiB",
        "500 ms",
        "5.00 MiB of state and residuals per device",
    ):
        assert figure in text, figure


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (human_bytes(0), "0 B"),
        (human_bytes(999), "999 B"),
        (human_bytes(1536), "1.50 KiB"),
        (human_bytes(1000 * 2**20), "0.98 GiB"),
        (human_bytes(None), "–"),
        (human_count(1_234_567), "1.23 M"),
        (human_count(999_999), "1.00 M"),
        (human_count(12), "12"),
        (human_seconds(1.234), "1.23 s"),
        (human_seconds(0.0123), "12.3 ms"),
        (human_seconds(2e-6), "2.00 µs"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
