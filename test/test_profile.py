"""Plans with measured stages: what is timed, what is kept of it, and how the search goes on with it."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_find_pipeline import arguments, cluster, train

import bactrian
from bactrian.driver import cli
from bactrian.driver.profile import profile_cache, profiled_plan, stage_profiler
from bactrian.driver.profile.function_profile import FunctionFailure, FunctionProfile, Measured
from bactrian.driver.profile.profile_cache import Environment, ProfileCache
from bactrian.driver.profile.time_function import TimedFunction, time_function
from bactrian.driver.ranks import World
from bactrian.driver.report.html_report import render_report
from bactrian.driver.report.plan_table import stage_reasons
from bactrian.driver.xla.compile_stage import compile_function, function_texts, structure_text
from bactrian.passes import choose_pipeline
from bactrian.passes.frame.errors import BactrianError, ConfigError, InfeasiblePlanError
from bactrian.passes.frame.processes import GuardedProcess, ProcessLost
from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.pipelining.layer_menus import menus
from bactrian.passes.plan.schema import Plan

HERE = Environment("2 devices", "jax 1")
PROFILE = FunctionProfile(0.25, FunctionMemory(100, 20, 10, 50))
MODEL_FLOPS = 1e9  # of the cluster


def on_two_devices_it_aborts(function: TimedFunction) -> Measured:
    """For a process of its own: a crash of some functions."""
    if function.num_devices == 2:
        os.abort()
    return time_function(function)


# The cache.


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    ProfileCache(tmp_path, HERE).put("a", PROFILE)
    ProfileCache(tmp_path, HERE).put("b", FunctionFailure("it crashed"))
    cache = ProfileCache(tmp_path, HERE)
    assert cache.get("a") == PROFILE and cache.get("b") == FunctionFailure("it crashed") and cache.get("c") is None
    assert cache.remarks == []


@pytest.mark.parametrize("other", [Environment("3 devices", "jax 1"), Environment("2 devices", "jax 2"), None])
def test_a_stale_cache_is_not_used(tmp_path: Path, other: Environment | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other hardware, other versions of jax, or another version of the files. It stays where it is."""
    ProfileCache(tmp_path, HERE).put("a", PROFILE)
    if other is None:
        monkeypatch.setattr(profile_cache, "VERSION", 2)
    cache = ProfileCache(tmp_path, other or HERE)
    assert cache.get("a") is None
    (remark,) = cache.remarks
    assert "1 measured function is of other hardware or versions, and not used" in remark.text()
    assert '"hardware": "2 devices", "software": "jax 1"' in remark.text()
    monkeypatch.undo()
    assert ProfileCache(tmp_path, HERE).get("a") == PROFILE


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"seconds": 1.0}', '{"seconds": -1.0, "memory": {}}', '{"failure": 3}', "\udc80"]
)
def test_a_damaged_file_is_set_aside(tmp_path: Path, text: str) -> None:
    ProfileCache(tmp_path, HERE).put("a", PROFILE)
    ProfileCache(tmp_path, HERE).put("b", PROFILE)
    (path,) = tmp_path.glob("*/a.json")
    path.write_bytes(text.encode(errors="surrogateescape"))
    cache = ProfileCache(tmp_path, HERE)
    assert cache.get("a") is None and cache.get("b") == PROFILE
    (remark,) = cache.remarks
    assert "its file was damaged" in remark.message and remark.where == str(path.with_suffix(".damaged"))
    assert path.with_suffix(".damaged").read_bytes() == text.encode(errors="surrogateescape")
    cache.put("a", PROFILE)
    assert ProfileCache(tmp_path, HERE).get("a") == PROFILE


def test_any_missing_or_wrong_field_is_damage(tmp_path: Path) -> None:
    ProfileCache(tmp_path, HERE).put("a", PROFILE)
    (path,) = tmp_path.glob("*/a.json")
    data: dict[str, Any] = json.loads(path.read_text())
    for wrong in (
        data | {"more": 1},
        data | {"seconds": math.nan},
        data | {"memory": data["memory"] | {"results": 1.5}},
        data | {"memory": {name: size for name, size in data["memory"].items() if name != "results"}},
    ):
        path.write_text(json.dumps(wrong))
        assert ProfileCache(tmp_path, HERE).get("a") is None


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot keep measured functions in .*file"):
        ProfileCache(path, HERE)


# One function.


def test_a_function_is_timed_and_its_memory_is_that_of_xla(tmp_path: Path) -> None:
    """Also where arguments are donated: they are what the function gave before."""
    step = bactrian.parallelize(train, num_stages=2, num_microbatches=2)
    texts = function_texts(step.trace(*arguments()).plan().staged.module)
    assert any("tf.aliasing_output" in text for text in texts.values())
    for text in texts.values():
        measured = time_function(TimedFunction(text, 1, 0, 0.0))
        assert isinstance(measured, FunctionProfile) and 0 < measured.seconds < 60
        stats = compile_function(text, jax.local_devices()[:1]).get_compiled_memory_stats()
        assert measured.memory.temporaries == stats.temp_size_in_bytes
        assert measured.memory.arguments == stats.argument_size_in_bytes


def test_equal_functions_of_different_stages_are_one() -> None:
    step = bactrian.parallelize(train, num_stages=4, num_microbatches=2, mesh="data=2")
    texts = function_texts(step.trace(*arguments()).plan().staged.module)
    assert texts["stage1.forward"] != texts["stage2.forward"]
    assert structure_text(texts["stage1.forward"]) == structure_text(texts["stage2.forward"])
    assert structure_text(texts["stage1.forward"]) != structure_text(texts["stage1.backward"])


def test_a_process_may_crash_or_hang() -> None:
    with GuardedProcess({"TEST_PROFILE": "told"}) as process:
        assert process.run(os.getenv, "TEST_PROFILE", 60.0) == "told"
        with pytest.raises(ProcessLost, match="its process ended with exit status 3"):
            process.run(os._exit, 3, 60.0)
        with pytest.raises(ProcessLost, match=r"it took more than 0\.2 s") as late:
            process.run(time.sleep, 60, 0.2)
        assert late.value.is_late
        with pytest.raises(ZeroDivisionError):
            process.run(eval, "1 / 0", 60.0)
        assert process.run(abs, -1, 60.0) == 1


# Whole plans.


class Fake:
    """In the place of processes: functions take as many seconds as is said."""

    seconds: Callable[[TimedFunction], float]
    asked: list[TimedFunction]

    def __init__(self, _: object) -> None: ...
    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: object, task: TimedFunction, seconds: float) -> Measured:
        """What was measured, or the loss of the process."""
        Fake.asked.append(task)
        return FunctionProfile(Fake.seconds(task), FunctionMemory(1, 1, 0, 1))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(stage_profiler, "GuardedProcess", Fake)
    monkeypatch.setattr(stage_profiler, "num_cores", lambda: 2)
    Fake.asked = []
    return Fake


def test_what_found_no_memory_is_tried_again(tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> object:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat")

    monkeypatch.setattr("bactrian.driver.profile.time_function.compile_measured", exhausted)
    failure = time_function(TimedFunction("", 1, 0, 0.0))
    assert failure == FunctionFailure("RESOURCE_EXHAUSTED: Out of memory", may_pass=True)
    monkeypatch.setattr(Fake, "run", lambda *_: failure)
    profiled(tmp_path, num_stages=1, mesh="data=1")
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == ["environment.json"]


def profiled(tmp_path: Path, hosts: int = 1, **options: Any) -> Plan:
    options = {"num_microbatches": 2} | options
    step = bactrian.parallelize(train, cluster=cluster(tmp_path, hosts, 2), profile=tmp_path / "cache", **options)
    return step.trace(*arguments()).plan().plan


def raised(error: Exception) -> float:
    raise error


def lost(task: TimedFunction) -> float:
    if task.num_devices == 2:
        raise ProcessLost("its process ended with SIGSEGV")
    return 1e-3


def test_measured_times_take_the_place_of_predicted_ones(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two devices together are slow, stages have one each; else they have two. Layers are solved once."""
    solved = list[object]()
    monkeypatch.setattr(choose_pipeline, "menus", lambda *given: (solved.append(given), menus(*given))[1])
    fake.seconds = lambda task: 1e-6 if task.num_devices == 2 else 1.0
    assert [stage.num_devices for stage in profiled(tmp_path).stages] == [2]
    assert len(solved) == 1
    shutil.rmtree(tmp_path / "cache")
    fake.asked.clear()
    fake.seconds = lambda task: 1.0 if task.num_devices == 2 else 1e-6
    plan = profiled(tmp_path)
    assert [stage.num_devices for stage in plan.stages] == [1] * plan.num_stages
    assert plan.pipeline is not None and plan.pipeline.profile_rounds > 1
    for stage in plan.stages:
        assert stage.measured is not None and stage.measured.model_seconds > 0
        assert stage.timing is not None and stage.timing.calls_seconds == 0
    assert plan.predicted_step_seconds is not None and plan.predicted_step_seconds < 1e-3

    # With what is known, nothing is measured, and the plan is the same.
    asked = len(fake.asked)
    assert profiled(tmp_path) == plan
    assert len(fake.asked) == asked == len({structure_text(task.text) for task in fake.asked})


@pytest.mark.parametrize(("factor", "is_said"), [(2.0, False), (20.0, True), (0.05, True)])
def test_a_model_of_other_devices(tmp_path: Path, fake: type[Fake], factor: float, is_said: bool) -> None:
    options: dict[str, Any] = {"num_stages": 1, "mesh": "data=1"}
    model = bactrian.parallelize(train, cluster=cluster(tmp_path, 1, 2), num_microbatches=2, **options)
    seconds = model.trace(*arguments()).plan().plan.stages[0].predicted_seconds
    assert seconds is not None
    fake.seconds = lambda task: factor * seconds
    said = [remark.message for remark in profiled(tmp_path, **options).remarks]
    assert (f"measured stages take {factor:.3g} times as long as the cluster file predicts" in said) == is_said


def test_measuring_ends(tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiled_plan, "MOST_ROUNDS", 1)
    fake.seconds = lambda task: 1e-3
    plan = profiled(tmp_path)
    assert plan.pipeline is not None and plan.pipeline.profile_rounds == 1
    assert "other pipelines may be faster: measuring ended at its limit of searches, 1" in [
        r.message for r in plan.remarks
    ]


def test_stages_that_crash_are_left_out(tmp_path: Path, fake: type[Fake]) -> None:
    fake.seconds = lost
    plan = profiled(tmp_path)
    assert [stage.num_devices for stage in plan.stages] == [1] * plan.num_stages
    texts = [remark.text() for remark in plan.remarks]
    assert any(
        "a stage that can't run was left out of the search: layers 0 to 3 on model=2" in text
        and text.endswith("its process ended with SIGSEGV")
        for text in texts
    )


def test_nothing_runs(tmp_path: Path, fake: type[Fake]) -> None:
    fake.seconds = lambda task: raised(ProcessLost("it crashed"))
    with pytest.raises(InfeasiblePlanError, match="cannot run any of the pipelines") as caught:
        profiled(tmp_path)
    assert "layers 0 to 3 on model=2, 2 microbatches: initialize: it crashed; " in caught.value.why


def test_a_given_plan_is_measured(tmp_path: Path, fake: type[Fake]) -> None:
    """There is no search: a stage that can't run is said to, and keeps what is predicted."""
    fake.seconds = lambda task: 1e-3
    plan = profiled(tmp_path, num_stages=2, mesh="data=1", num_microbatches=2)
    assert plan.pipeline is None and all(stage.measured is not None for stage in plan.stages)
    first = plan.stages[0].timing
    assert first is not None and (first.forward_seconds, first.backward_seconds) == (1e-3, 1e-3)
    report = render_report(plan)
    assert "2 of 2 stages were measured; the cost model has them busy for" in report
    assert "measured 6.00 ms per step, the model has" in "\n".join(stage_reasons(plan, plan.stages[0]))
    # A plan that is applied keeps what was measured.
    again = bactrian.parallelize(train, cluster=cluster(tmp_path, 1, 2), plan=plan).trace(*arguments()).plan()
    assert again.plan == plan
    fake.seconds = lost
    plan = profiled(tmp_path, num_stages=1, mesh="data=2", num_microbatches=2)
    assert plan.stages[0].measured is None
    assert any("a stage can't run: layers 0 to 0 on data=2" in remark.message for remark in plan.remarks)


def test_meshes_larger_than_a_host_are_not_measured(tmp_path: Path, fake: type[Fake]) -> None:
    fake.seconds = lambda task: 1e-3
    plan = profiled(tmp_path, 2, num_stages=1, mesh="data=4", num_microbatches=2)
    assert plan.stages[0].measured is None and not fake.asked


def test_a_compiled_stage_that_needs_too_much(
    tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Fake, function: object, task: TimedFunction, seconds: float) -> Measured:
        return FunctionProfile(1e-3, FunctionMemory(1, 1, 0, (2 << 30) if task.num_devices == 2 else 0))

    monkeypatch.setattr(Fake, "run", run)
    plan = profiled(tmp_path)
    assert [stage.num_devices for stage in plan.stages] == [1] * plan.num_stages
    assert any("which has 1.00 GiB" in remark.message for remark in plan.remarks)


def test_what_took_too_long_is_tried_again(tmp_path: Path, fake: type[Fake]) -> None:
    """The host may have been busy, so it is not kept; a crash is."""
    options: dict[str, Any] = {"num_stages": 1, "mesh": "data=1", "num_microbatches": 2}
    for is_late, again in ((True, True), (False, False)):
        fake.seconds = lambda task, late=is_late: raised(ProcessLost("it took more than 1 s", late))
        assert profiled(tmp_path, **options).stages[0].measured is None
        asked = len(fake.asked)
        profiled(tmp_path, **options)
        assert (len(fake.asked) > asked) == again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": 3}, "profile is 3"),
        ({"profile": True, "cluster": None}, "cannot profile stages without a cluster file"),
        ({"profile": True}, "its hosts have 2 devices, this one has 1 cores"),
    ],
)
def test_what_cannot_be_profiled(
    tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_profiler, "num_cores", lambda: 1)
    with pytest.raises(BactrianError, match=message):
        options = {"cluster": cluster(tmp_path, 1, 2)} | options
        bactrian.parallelize(train, **options).trace(*arguments()).plan()


def test_neither_ranks_nor_two_kinds_of_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Path(cluster(tmp_path)).read_text().replace("\n\n", "\n")
    (two := tmp_path / "two.toml").write_text(f"[[groups]]{one}[[groups]]{one}")
    with pytest.raises(ConfigError, match="it has hosts of 2 kinds, and this host is of one"):
        bactrian.parallelize(train, cluster=two, profile=tmp_path).trace(*arguments()).plan()
    monkeypatch.setattr(World, "num_ranks", 2)
    with pytest.raises(ConfigError, match="cannot profile stages in a job of 2 ranks"):
        profiled(tmp_path)


@pytest.mark.parametrize("num_stages", [1, pytest.param(2, marks=pytest.mark.long)])
def test_processes_measure_a_plan_that_runs(
    num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process crashes, the next one measures; the plan equals the reference, and says what was left out."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(stage_profiler, "time_function", on_two_devices_it_aborts)
    monkeypatch.setattr(stage_profiler, "num_cores", lambda: 2)
    monkeypatch.setattr(stage_profiler, "SECONDS", 0.0)
    params, batch = arguments(2)
    options: dict[str, Any] = {"num_stages": num_stages, "num_microbatches": 2, "schedule": "1f1b", "donate": False}
    step = bactrian.parallelize(train, cluster=cluster(tmp_path, num_stages, 2), profile=tmp_path / "cache", **options)
    result, expected = step(params, batch), step.reference(params, batch)
    for got, want in zip(jax.tree.leaves(bactrian.gather(result)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    plan = step.compiled.plan
    assert plan.num_stages == num_stages
    assert all(stage.measured is not None and stage.num_devices == 1 for stage in plan.stages)
    is_left_out = any("its process ended with SIGABRT" in remark.message for remark in plan.remarks)
    assert is_left_out == (num_stages == 1)  # two stages would have one device each anyway

    (script := tmp_path / "train.py").write_text(
        "import bactrian, test_find_pipeline as here\n"
        f"step = bactrian.parallelize(here.train, **{options})\nexample_args = here.arguments(2)\n"
    )
    profile = ["--cluster", cluster(tmp_path, num_stages, 2), "--profile-dir", str(tmp_path / "cache")]
    assert cli.main(["plan", f"{script}:step", *profile]) == 0
    assert f"measured: {num_stages} of {num_stages} stage" in capsys.readouterr().out
