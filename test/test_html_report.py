"""The report of a plan: a valid page that needs nothing else, with all that the plan has, and names as they are."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from html_page import Element, everything, read_page
from staged_programs import chain
from test_explain_command import STEP
from test_plan import random_plan

from bactrian.driver import cli
from bactrian.driver.planning.held_memory import held_memory
from bactrian.driver.planning.predicted_trace import write_predicted_trace
from bactrian.driver.planning.saved_plan import load_program
from bactrian.driver.planning.simulated_step import simulated
from bactrian.driver.report import run_report
from bactrian.driver.report.html_report import render_report, write_report
from bactrian.driver.report.plan_table import place_text
from bactrian.driver.report.step_timeline import StepTimeline, measured_timeline, predicted_timeline
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.pipelining.pipeline_events import PipelineTimes
from bactrian.passes.plan.schema import LayerPlan, Plan, Remark, StagePlan
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan
from bactrian.passes.plan.step_timing import StageTiming, TransferTiming

HOSTILE = "</script><script>alert(1)</script>{{ 7 * 7 }}\x1b[2J\x9b31m\u202e\"'&<!--"


def chain_plan(num_stages: int = 3, num_microbatches: int = 4, seconds: float = 1.2, schedule: str = "1f1b") -> Plan:
    """Of `chain`, all stages busy for as long, a third of it in the forwards; transfers take no time."""
    timing = StageTiming(seconds / num_microbatches / 3, 2 * seconds / num_microbatches / 3)
    stages = tuple(StagePlan(s, s, s, predicted_seconds=seconds, timing=timing) for s in range(num_stages))
    program = chain(num_stages, num_microbatches, schedule)
    transfers = tuple(
        TransferTiming(program.values[moved.source].stage, program.values[moved.target].stage, 8, 0.0, 0.0)
        for moved in program.transfers
    )
    return Plan(num_stages, num_microbatches, schedule, num_stages, stages, transfers=transfers)


def chain_times(plan: Plan) -> PipelineTimes:
    _, times = simulated(plan, chain(plan.num_stages, plan.num_microbatches, plan.schedule))
    assert times is not None
    return times


def chain_timeline(plan: Plan) -> StepTimeline:
    return predicted_timeline(chain(plan.num_stages, plan.num_microbatches), chain_times(plan))


def sharded_plan(name: str = "state['w']") -> Plan:
    """Two stages on meshes, with shardings, baselines, layers and remarks."""
    sharding = ShardingPlan(
        seconds=2.0,
        communication_seconds=0.5,
        memory_bytes=(("activations", 3000), ("parameters", 1000)),
        limit_bytes=8000,
        peak_bytes=5000,
        shardings=((name, "data,-"), ("state['b']", "-"), ("state['n']", "")),
        compared=(ShardingFigures("data", 3.0, 1.0, 4000), ShardingFigures("megatron")),
    )
    meshes = ((("data", 2),), (("data", 2), ("model", 4)))
    stages = tuple(
        StagePlan(s, s, s, meshes[s], forward_flops=1, backward_flops=2, predicted_seconds=2.0, sharding=sharding)
        for s in range(2)
    )
    layers = tuple(LayerPlan(k, f"stablehlo.dot_general at {name}:7", (f"block_{k}",)) for k in range(2))
    remarks = (Remark("warning", f"uneven {name}", "train.py:3", "why", "fix"), Remark("remark", "a constant"))
    return Plan(2, 4, "1f1b", 2, stages, layers, fingerprint="ab" * 32, remarks=remarks, options=(("o", name),))


def rows_of(page: Element, section: str) -> list[list[str]]:
    """The cells of the rows of a section's first table, its head left out."""
    (found,) = page.find("section", id=section)
    return [[cell.text for cell in row.children] for row in found.find("tbody")[0].find("tr")]


@pytest.mark.parametrize("seed", range(20))
def test_any_plan_has_a_valid_page_with_all_its_stages(seed: int) -> None:
    plan = random_plan(seed)
    page = read_page(render_report(plan))
    assert [row[0] for row in rows_of(page, "stages")] == [str(stage.stage) for stage in plan.stages]
    assert len(page.find("div", class_="strip-stage")) == plan.num_stages
    assert len(page.find("div", class_="strip-layer")) == plan.num_layers
    assert "None" not in page.text


def test_a_page_asks_for_nothing_from_outside() -> None:
    text = render_report(sharded_plan(), chain_timeline(chain_plan(2)))
    page = read_page(text)
    for element in everything(page):
        assert element.tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "ping"} & element.attributes.keys()
        assert element.attributes.get("href", "#").startswith("#")
        assert not [name for name in element.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|import\(|WebSocket", text)


def test_names_are_shown_as_they_are() -> None:
    timeline = chain_timeline(chain_plan(2))
    text = render_report(sharded_plan(HOSTILE), timeline, name=HOSTILE)
    page = read_page(text)
    assert len(page.find("script")) == len(read_page(render_report(sharded_plan(), timeline)).find("script")) == 1
    shown = "</script><script>alert(1)</script>{{ 7 * 7 }}\\x1b[2J\\x9b31m\\u202e\"'&<!--"
    assert page.find("h1")[0].text == shown
    assert [row[0] for row in rows_of(page, "shardings")].count(shown) == 1
    assert shown in page.find("footer")[0].text and shown in page.find("aside")[0].text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_shardings_have_the_axes_of_each_dim() -> None:
    page = read_page(render_report(sharded_plan()))
    (section,) = page.find("section", id="shardings")
    dims = [[dim.text for dim in row.find("span", class_="dim")] for row in section.find("tbody")[0].find("tr")]
    assert dims == [["data", "·"], ["·"], ["scalar"]]
    assert [summary.text for summary in section.find("summary")] == [
        "stage 0 1 of 3 are sharded, on data=2",
        "stage 1 1 of 3 are sharded, on data=2 model=4",
    ]


def test_baselines_stand_beside_the_plan_the_fastest_first() -> None:
    rows = rows_of(read_page(render_report(sharded_plan())), "baselines")
    assert rows == [
        ["this plan", "2.00 s", "2.00 s", "2.00 s", ""],
        ["data", "3.00 s", "3.00 s", "3.00 s", "1.50 ×"],
        ["megatron", "does not fit", "does not fit", "–", ""],
    ]


def test_stages_have_their_places_on_the_line_of_hosts() -> None:
    plan = sharded_plan()
    firsts = (4, 6)
    stages = tuple(dataclasses.replace(s, first_device=first) for s, first in zip(plan.stages, firsts, strict=True))
    rows = rows_of(read_page(render_report(dataclasses.replace(plan, stages=stages))), "stages")
    assert [row[2] for row in rows] == ["data=2devices 4–5", "data=2 model=4devices 6–13"]
    narrow = StagePlan(0, 0, 0, first_device=3)
    assert (place_text(narrow), place_text(plan.stages[0])) == ("device 3", "")


def test_layers_have_their_names_lines_and_what_is_computed_again() -> None:
    plan = dataclasses.replace(sharded_plan(), remat=("none", "all"))
    (section,) = read_page(render_report(plan)).find("section", id="stages")
    layers = [[cell.text for cell in row.children] for row in section.find("tbody")[1].find("tr")]
    assert layers == [
        ["0", "0", "–", "none", "block_0", "stablehlo.dot_general at state['w']:7"],
        ["1", "1", "–", "all", "block_1", "stablehlo.dot_general at state['w']:7"],
    ]


def test_warnings_come_first() -> None:
    page = read_page(render_report(sharded_plan()))
    main = page.find("main")[0]
    assert main.children[0].tag == "aside" and "Warning: uneven state['w']" in main.children[0].text
    assert "a constant" in page.find("section", id="remarks")[0].text


def test_what_the_plan_does_not_know_is_left_out() -> None:
    page = read_page(render_report(Plan(1, 1, "1f1b", 1, (StagePlan(0, 0, 0),))))
    assert [section.attributes["id"] for section in page.find("section")] == ["stages", "time"]
    assert [link.attributes["href"] for link in page.find("nav")[0].find("a")] == ["#stages", "#time"]
    assert "No time was predicted" in page.text


def test_the_predicted_timeline_is_the_pipeline_of_the_plan() -> None:
    plan = chain_plan()  # 3 stages of 0.3 s a microbatch, 4 microbatches
    timeline = chain_timeline(plan)
    assert timeline.seconds == pytest.approx((4 + 3 - 1) * 0.3)
    assert timeline.bubble_share == pytest.approx(2 / 6)
    first, _, last = timeline.rows
    assert [(bar.kind, bar.microbatch) for bar in first.bars[:4]] == [
        *(("forward", m) for m in range(3)),
        ("backward", 0),
    ]
    assert [bar.end - bar.begin for bar in first.bars[2:4]] == pytest.approx([0.1, 0.2])
    assert {bar.kind for bar in last.bars} == {"forward_backward"}
    (section,) = read_page(render_report(plan, timeline)).find("section", id="timeline")
    lanes = [lane for lane in section.find("div", class_="lane") if not lane.find("line")]
    assert [len(lane.find("rect")) for lane in lanes] == [8, 8, 4]
    label = lanes[2].find("svg")[0].attributes["aria-label"]
    assert label == "stage 2 computes for 1.20 s of 1.80 s, 66.7 %"


def test_the_time_of_each_stage_adds_up_to_the_step() -> None:
    plan, _ = simulated(chain_plan(seconds=1.2), chain(3, 4))
    rows = rows_of(read_page(render_report(plan)), "time")
    assert rows[2] == ["stage 2", "", "1.20 s66.7 %", "0.00 s0.0 %", "0.00 s0.0 %", "600 ms33.3 %"]
    (section,) = read_page(render_report(plan)).find("section", id="time")
    widths = [[rect.attributes["width"] for rect in svg.find("rect")] for svg in section.find("svg")]
    assert [sum(float(width.removesuffix("%")) for width in row) for row in widths] == pytest.approx([200 / 3] * 3)


def test_memory_over_a_step_is_drawn_beside_its_peak() -> None:
    plan, times = simulated(chain_plan(2), chain(2, 4))
    assert times is not None
    held = held_memory(chain(2, 4), times)
    stages = tuple(
        dataclasses.replace(s, state_bytes=300, activation_bytes=100, microbatches_in_flight=1) for s in plan.stages
    )
    page = read_page(render_report(dataclasses.replace(plan, stages=stages), chain_timeline(plan), None, held))
    curves = page.find("svg", class_="curve")
    assert [curve.attributes["aria-label"].partition(":")[0] for curve in curves] == ["stage 0", "stage 1"]
    assert all(
        re.fullmatch(r"M0 100(H\d+V[\d.]+)+H400V100Z", curve.find("path")[0].attributes["d"]) for curve in curves
    )


def run(stage: int, name: str, begin: float, seconds: float, category: str = "run", rank: int = 0) -> dict[str, Any]:
    """An event of a trace; times in seconds."""
    return {
        "pid": rank,
        "tid": stage,
        "name": name,
        "ph": "X",
        "cat": category,
        "ts": begin * 1e6,
        "dur": seconds * 1e6,
    }


def two_steps() -> list[dict[str, Any]]:
    """Two steps of one stage and two microbatches; the second is the slower one."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "rank 0"}}]
    for begin, seconds in ((0.0, 1.0), (10.0, 2.0)):
        events += [
            run(0, "RECV from rank 1 m0", begin, 0.5, "arrive"),
            *(run(0, f"stage0.forward_backward m{m}", begin + 0.5 + m * seconds, seconds) for m in range(2)),
            run(0, "SEND to rank 1 m1", begin + 0.5 + 2 * seconds, 0.25, "send"),
            run(0, "stage0.update", begin + 0.75 + 2 * seconds, 0.125),
        ]
    return events


def write_events(path: Path, events: list[Any]) -> Path:
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_the_measured_timeline_is_the_last_step_of_a_trace(tmp_path: Path) -> None:
    plan = Plan(1, 2, "1f1b", 1, (StagePlan(0, 0, 0),))
    timeline = measured_timeline(write_events(tmp_path / "trace.json", two_steps()), plan)
    found = [(bar.kind, bar.microbatch, bar.begin, bar.end) for bar in timeline.rows[0].bars]
    assert found == [
        ("receive", 0, 0.0, 0.5),
        ("forward_backward", 0, 0.5, 2.5),
        ("forward_backward", 1, 2.5, 4.5),
        ("send", 1, 4.5, 4.75),
        ("update", None, 4.75, 4.875),
    ]
    assert timeline.rows[0].computing_seconds == pytest.approx(4.125)
    page = read_page(render_report(plan, None, timeline))
    assert [title.text for title in page.find("h3")] == ["Measured 4.88 s, 15.4 % of it idle"]


def test_a_predicted_trace_read_as_a_measured_one_is_the_predicted_timeline(tmp_path: Path) -> None:
    plan, program = chain_plan(), chain(3, 4)
    functions = {call.function: FunctionMemory(1, 1, 0, 0) for call in program.calls}
    write_predicted_trace(tmp_path / "trace.json", plan, program, functions)
    measured, predicted = measured_timeline(tmp_path / "trace.json", plan), chain_timeline(plan)
    assert measured.seconds == pytest.approx(predicted.seconds)
    for one, other in zip(measured.rows, predicted.rows, strict=True):
        shown = [[(b.kind, b.microbatch) for b in row.bars if b.end > b.begin] for row in (one, other)]
        times = [[t for b in row.bars if b.end > b.begin for t in (b.begin, b.end)] for row in (one, other)]
        assert shown[0] == shown[1] and times[0] == pytest.approx(times[1])


def test_ranks_that_share_a_mesh_have_rows_of_their_own(tmp_path: Path) -> None:
    events = [run(0, f"stage0.forward_backward m{m}", rank + m, 1.0, rank=rank) for rank in (0, 1) for m in (0, 1)]
    plan = Plan(1, 2, "1f1b", 1, (StagePlan(0, 0, 0),))
    timeline = measured_timeline(write_events(tmp_path / "trace.json", events), plan)
    assert [row.name for row in timeline.rows] == ["stage 0, rank 0", "stage 0, rank 1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a trace of a run"),
        ("[" * 100_000, "is not a trace of a run"),
        ("[]", "is not a trace of a run"),
        ('{"traceEvents": [1]}', "is not a trace of a run"),
        ('{"traceEvents": [{"ph": "X", "ts": 1}]}', "is not a trace of a run"),
        (json.dumps({"traceEvents": [run(0, "matmul", 0, 1)]}), "is not a trace of a run"),
        (json.dumps({"traceEvents": [run(0, "stage0.matmul", 0, 1)]}), "is not a trace of a run"),
        ('{"traceEvents": []}', "is not of this plan: it has 0 stages, the plan 3"),
        (
            json.dumps({"traceEvents": [run(s, "stage0.forward m0", 0, 1) for s in range(3)]}),
            "has 1 microbatches, the plan 4",
        ),
    ],
)
def test_what_is_no_trace_of_the_plan_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        measured_timeline(path, chain_plan())
    assert caught.value.fix


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*No such file"):
        measured_timeline(tmp_path / "none.json", chain_plan())
    with pytest.raises(ConfigError, match=r"cannot write the report .*No such file"):
        write_report(tmp_path / "none" / "plan.html", chain_plan(), None)


def test_equal_plans_have_equal_reports() -> None:
    assert render_report(sharded_plan(), chain_timeline(chain_plan(2))) == render_report(
        sharded_plan(), chain_timeline(chain_plan(2))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a script, the plan of its step in two stages on meshes, and the report of `bactrian plan`."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "reported_step.py").write_text(STEP)
    options = ["--num-stages", "2", "--mesh", "data=2", "--save", str(folder / "plan")]
    assert (
        cli.main(["plan", f"{folder / 'reported_step.py'}:step", *options, "--report", str(folder / "plan.html")]) == 0
    )
    return folder


def test_a_saved_plan_has_the_same_report(saved: Path) -> None:
    assert cli.main(["explain", str(saved / "plan"), "--report", str(saved / "again.html")]) == 0
    first, again = (read_page((saved / name).read_text()) for name in ("plan.html", "again.html"))
    assert first.find("h1")[0].text.endswith("reported_step.py:step") and again.find("h1")[0].text == "plan plan"
    assert first.find("main")[0].text == again.find("main")[0].text
    ids = [section.attributes["id"] for section in first.find("section")]
    assert ids == ["stages", "timeline", "time", "memory", "shardings", "baselines"]


def test_a_plan_file_alone_has_no_timeline(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text((saved / "plan" / "plan.json").read_text())
    assert cli.main(["explain", str(tmp_path / "plan.json"), "--report", str(tmp_path / "plan.html")]) == 0
    assert "timeline" not in [
        s.attributes["id"] for s in read_page((tmp_path / "plan.html").read_text()).find("section")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module {", "cannot read .*staged.mlir"),
        ("module { }", "cannot read .*staged.mlir"),
        ("<" * 5000, "cannot read .*staged.mlir"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_damaged_staged_program_is_refused(saved: Path, tmp_path: Path, text: str, message: str) -> None:
    plan = Plan.load(saved / "plan")
    (tmp_path / "staged.mlir").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        load_program(tmp_path, plan)


def test_a_staged_program_of_another_plan_is_refused(saved: Path) -> None:
    plan = dataclasses.replace(Plan.load(saved / "plan"), num_microbatches=4)
    with pytest.raises(ConfigError, match=r"staged.mlir and plan.json in .* belong to different plans"):
        load_program(saved / "plan", plan)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measured", "t.json"], "--measured is shown in a report"),
        (["--report", "r.html", "--value", "w"], "a report is of the whole plan"),
    ],
)
def test_options_that_go_together(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["explain", "plan", *words]) == 3
    assert message in capsys.readouterr().err


def test_the_steps_of_a_run_leave_their_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan, program = chain_plan(), chain(3, 4)
    monkeypatch.setattr(run_report, "_files", {})
    run_report.report_if_asked(plan, program, "step")
    monkeypatch.setenv(run_report.PLAN_REPORT_VARIABLE, str(tmp_path / "plan.html"))
    for name in ("step", "evaluate/<lambda>", "step"):
        run_report.report_if_asked(plan, program, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan-evaluate_lambda_.html", "plan.html"]
    assert read_page((tmp_path / "plan.html").read_text()).find("h1")[0].text == "step"
    monkeypatch.setattr(run_report, "_files", {})
    monkeypatch.setenv(run_report.PLAN_REPORT_VARIABLE, str(tmp_path / "none" / "plan.html"))
    run_report.report_if_asked(plan, program, "step")
    assert "cannot write the report" in caplog.text


def test_a_run_refuses_a_report_in_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text("raise AssertionError")
    report = tmp_path / "none" / "plan.html"
    assert cli.main(["run", "--report", str(report), str(tmp_path / "train.py")]) == 3
    assert f"cannot write the report {report}: there is no folder {report.parent}" in capsys.readouterr().err
