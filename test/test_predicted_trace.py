"""The predicted trace: the form of measured ones, the events of the simulation, and memory over time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from staged_programs import random_program
from test_explain_command import STEP
from test_simulated_step import plan_of, random_timings

from bactrian.driver import cli
from bactrian.driver.planning.predicted_trace import write_predicted_trace
from bactrian.driver.planning.saved_plan import load_program
from bactrian.driver.planning.simulated_step import simulated
from bactrian.driver.planning.stage_memory import memory_over_time, stage_peak
from bactrian.driver.report.step_timeline import measured_timeline, predicted_timeline
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.plan.schema import Plan, StagePlan
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.unrolled_step import INDEX, ONCE, Key, UnrolledStep


def idle(program: StagedProgram) -> dict[str, FunctionMemory]:
    """Functions that need no memory of their own."""
    return {call.function: FunctionMemory(0, 0, 0, 0) for call in program.calls}


def events_of(path: Path, *phases: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] in phases]


@pytest.mark.parametrize("seed", range(8))
def test_a_predicted_trace_is_read_as_a_measured_one(seed: int, tmp_path: Path) -> None:
    program, _ = random_program(seed)
    plan = plan_of(program, random_timings(seed, program.num_stages), link=0.25)
    path = tmp_path / "predicted.json"
    write_predicted_trace(path, plan, program, idle(program))
    _, times = simulated(plan, program)
    assert times is not None
    predicted, read = predicted_timeline(program, times), measured_timeline(path, plan)
    assert read.seconds == pytest.approx(predicted.seconds)
    for one, other in zip(predicted.rows, read.rows, strict=True):
        longer = [bar for bar in other.bars if bar.end - bar.begin > 1e-9]
        assert [(bar.kind, bar.begin, bar.end) for bar in sorted(longer, key=lambda bar: bar.begin)] == [
            (bar.kind, pytest.approx(bar.begin), pytest.approx(bar.end)) for bar in one.bars
        ]
    ends = [{event["id"]: event["pid"] for event in events_of(path, side)} for side in "sf"]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) == len(times.messages)
    assert [ends[0][str(number)] for number in range(len(ends[0]))] == [each.source for each in times.messages]


def held_at(step: UnrolledStep, stage: int, at: int) -> int:
    """Bytes of what is there at a task and is not its own, by the meaning of it."""
    program, tasks = step.program, step.stage_tasks[stage]
    arguments = {p.value for p in program.arguments if p.role != "batch" and program.values[p.value].stage == stage}
    results = {step.key(piece.value, ONCE) for piece in program.results}
    keys = {key for task in tasks for key in (*step.reads[task], *step.writes[task]) if key.value != INDEX}
    keys |= {Key(value, ONCE, stage) for value in arguments}
    total = 0
    for key in keys - {*step.reads[tasks[at]], *step.writes[tasks[at]]}:
        uses = [i for i, task in enumerate(tasks) if key in (*step.reads[task], *step.writes[task])]
        begun = key.value in arguments or min(uses) < at
        if begun and (key.value in arguments or key in results or max(uses) > at):
            total += program.values[key.value].nbytes
    return total


@pytest.mark.parametrize("seed", range(12))
def test_memory_over_time_is_what_is_there(seed: int) -> None:
    program, _ = random_program(seed)
    step = UnrolledStep(program)
    for stage, tasks in enumerate(step.stage_tasks):
        functions = {call.function: FunctionMemory(i, 0, 0, 7) for i, call in enumerate(program.calls)}
        held = memory_over_time(step, stage, functions)
        assert held == [held_at(step, stage, at) + task.call + 7 for at, task in enumerate(tasks)]
        peak = stage_peak(step, stage, functions)
        assert (peak.nbytes, peak.temporaries) == (max(held, default=0), 7 if held else 0)


def test_the_command_writes_it_with_memory(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(STEP)
    words = ["plan", f"{tmp_path / 'step.py'}:step", "--num-stages", "2", "--mesh", "data=2"]
    path = tmp_path / "predicted.json"
    assert cli.main([*words, "--trace", str(path), "--save", str(tmp_path / "plan")]) == 0
    plan = Plan.load(tmp_path / "plan")
    program = load_program(tmp_path / "plan", plan)
    assert program is not None
    assert measured_timeline(path, plan).seconds == pytest.approx(plan.predicted_step_seconds)
    for stage in plan.stages:
        most = max(event["args"]["bytes"] for event in events_of(path, "C") if event["pid"] == stage.stage)
        assert stage.sharding is not None and most == stage.sharding.peak_bytes


def test_without_times_there_is_nothing_to_write(tmp_path: Path) -> None:
    program, _ = random_program(0)
    stages = tuple(StagePlan(s, s, s) for s in range(program.num_stages))
    plan = Plan(program.num_stages, program.num_microbatches, program.schedule, program.num_stages, stages)
    with pytest.raises(ConfigError, match="no times were predicted"):
        write_predicted_trace(tmp_path / "predicted.json", plan, program, idle(program))
