"""Where the time of making a step goes, and that no part of it grows faster than the program."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bactrian
from bactrian.driver.cli import main
from bactrian.driver.xla import compile_stage
from bactrian.passes import pipelines
from bactrian.passes.frame import phase_times, pipeline
from bactrian.passes.frame.base import Pass
from bactrian.passes.frame.phase_times import PhaseClock, PhaseTime, Timing, merged
from bactrian.runtime.instruction_builder import build_streams
from bactrian.runtime.instruction_checks import check_streams

STEP = """
import bactrian, jax, jax.numpy as jnp, numpy as np

def loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return (x ** 2).mean()

@bactrian.parallelize(num_stages=2, num_microbatches=2)
def step(params, x):
    value, gradients = bactrian.value_and_grad(loss)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

example_args = ([np.ones((4, 4), np.float32)] * 2, np.ones((4, 4), np.float32))
"""


class FakeTime:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(phase_times, "time", fake)
    return fake


def test_phases_within_phases_are_parts(clock: FakeTime) -> None:
    measured = PhaseClock()
    with measured.phase("pass"):
        clock.now += 1
        for _ in range(2):
            with measured.phase("solve"):
                clock.now += 2
    with pytest.raises(KeyError), measured.phase("fails"):
        clock.now += 3
        raise KeyError
    assert measured.phases == (
        PhaseTime("pass", 5.0, parts=(PhaseTime("solve", 4.0, runs=2),)),
        PhaseTime("fails", 3.0),
    )
    assert Timing(measured.phases).seconds == 8.0


def test_equal_names_are_one_phase_at_the_place_of_the_first() -> None:
    phases = [PhaseTime("cse", 1.0), PhaseTime("verify", 2.0), PhaseTime("cse", 3.0, parts=(PhaseTime("x", 1.0),))]
    assert merged(phases) == (PhaseTime("cse", 4.0, 2, (PhaseTime("x", 1.0),)), PhaseTime("verify", 2.0))


def _names(steps: Sequence[Pass | str]) -> list[str]:
    """What the phases of a pipeline are called, verification left out."""
    names: list[str] = []
    for before, step in zip([None, *steps], steps, strict=False):
        text = step if isinstance(step, str) else step.name
        if isinstance(step, str) and isinstance(before, str):
            names[-1] += f",{text}"
        else:
            names.append(text)
    return names


def _step(num_leaves: int, **options: Any) -> Any:
    def loss(params: Any, x: Any) -> jax.Array:
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def train(params: Any, x: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    step = bactrian.parallelize(train, num_microbatches=2, **options)
    return step, [np.eye(4, dtype=np.float32)] * num_leaves, np.ones((4, 4), np.float32)


def test_a_step_knows_the_time_of_every_phase_in_its_order() -> None:
    step, params, x = _step(2, num_stages=2)
    planned = step.trace(params, x).plan()
    passes = _names(pipelines.stage_step(num_stages=2))
    names = [phase.name for phase in planned.timing.phases if phase.name != "verify"]
    assert [name for name in names if name in passes] == list(dict.fromkeys(passes))
    assert names[:2] == ["trace", "lower"]
    compiled = planned.compile()
    assert compiled.timing.phases[: len(planned.timing.phases)] == planned.timing.phases
    assert "compile" in [phase.name for phase in compiled.timing.phases]
    assert compiled.timing.seconds > planned.timing.seconds > 0


def test_the_choice_of_shardings_has_parts() -> None:
    step, params, x = _step(1, num_stages=1, mesh="data=2")
    phases = {phase.name: phase for phase in step.trace(params, x).plan().timing.phases}
    solve = phases["solve-shardings"]
    assert [part.name for part in solve.parts] == ["read", "solve", "write"]
    assert sum(part.seconds for part in solve.parts) <= solve.seconds


def test_plan_prints_the_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text(STEP)
    assert main(["plan", f"{tmp_path}/train.py:step", "--timing"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = [words[0] for words in lines if words]
    order = [first.index(word) for word in ("phase", "trace", "lower", "flatten-calls", "split-stages", "compile")]
    assert order == sorted(order)
    assert main(["plan", f"{tmp_path}/train.py:step", "--timing", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["num_stages"] == 2
    assert {"phase", "seconds", "runs"} == set(data["timing"][0])
    assert "compile" in [row["phase"] for row in data["timing"]]


def test_mlirs_passes_are_measured_beside_ours() -> None:
    from jaxlib.mlir import ir

    from bactrian.passes.flatten_calls import FlattenCalls
    from bactrian.passes.frame.context import make_context

    with make_context():
        module = ir.Module.parse("func.func public @main() { return }")
        report = pipeline.run_pipeline(module, ["cse", "canonicalize", FlattenCalls(), FlattenCalls(), "cse"])
    names = [phase.name for phase in report.phases]
    assert names[-5:] == ["cse,canonicalize", "flatten-calls", "verify", "flatten-calls", "cse"]


def _num_compiled(num_stages: int, monkeypatch: pytest.MonkeyPatch) -> int:
    compiled: list[Any] = []
    real = compile_stage._compile  # pyright: ignore[reportPrivateUsage]

    def counted(*args: Any) -> Any:
        compiled.append(args)
        return real(*args)

    step, params, x = _step(num_stages, num_stages=num_stages)
    with monkeypatch.context() as patched:
        patched.setattr(compile_stage, "_compile", counted)
        made = step.trace(params, x).plan().compile()
    ours, reference = made(params, x), step.reference(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), bactrian.gather(ours), reference)
    return len(compiled)


def test_functions_of_equal_stages_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first and the last stage differ from those between them. All are on one device here."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert _num_compiled(6, monkeypatch) == _num_compiled(4, monkeypatch) < 6 * 3


def _num_calls(num_leaves: int) -> int:
    """How many Python functions are called to plan and to build instructions."""
    step, params, x = _step(num_leaves, num_stages=2)
    traced = step.trace(params, x)
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        program = traced.plan().staged.program
        check_streams(build_streams(program, (0, 0)))
    finally:
        sys.setprofile(None)
    return count


def test_planning_is_linear_in_the_leaves() -> None:
    """Three times as many more leaves take three times as many more calls."""
    _num_calls(8)  # what is cached is there
    few, more, many = _num_calls(8), _num_calls(24), _num_calls(72)
    assert many - more < 3.3 * (more - few)
