"""Steps on meshes of several devices in one process: the numbers of one device, and where state lives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import models
import numerics
import numpy as np
import pytest
from cases import Built, Case, chain_loss, sgd_step
from meshes import check, cut
from traps import TRAPS

import bactrian
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.sharding.baselines import BASELINES

# Those that are not about stages; all run over stages too.
ONE_STAGE_TRAPS = (
    "aux-outputs",
    "random-numbers-typed-key",
    "skip-not-finite",
    "several-arguments",
    "empty-update",
    "places-exchanged",
)
MESHES = ("data=2,model=4", "data=8", "data=4,model=2")
SHORT_PIPELINES = (("mlp/plain", "gpipe"), ("gpt-tied-dropout/linen", "1f1b"))


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mlp/plain", "conv/linen") else pytest.param(name, marks=pytest.mark.long)
        for name in models.MODELS
    ],
)
def test_models_equal_one_device(name: str, slow: Path) -> None:
    number = list(models.MODELS).index(name)
    case = models.train_case(name, ("adamw", "sgd")[number % 2], microbatches=(1, 2, 4)[number % 3])
    compiled = check(case.make(), mesh=MESHES[number % len(MESHES)], cluster=slow)
    assert cut(compiled)


@pytest.mark.parametrize(
    "case",
    [case if case.name in ONE_STAGE_TRAPS else pytest.param(case, marks=pytest.mark.long) for case in TRAPS],
    ids=lambda case: case.name,
)
def test_traps_equal_one_device(case: Case, slow: Path) -> None:
    check(case.make(), mesh="data=2,model=2", cluster=slow)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=() if (name, schedule) in SHORT_PIPELINES else pytest.mark.long)
        for name in models.MODELS
        for schedule in ("1f1b", "gpipe")
    ],
)
def test_pipelines_of_meshes_equal_one_device(name: str, schedule: str, slow: Path) -> None:
    case = models.train_case(name, "adamw", microbatches=2, stages=2, schedule=schedule)
    compiled = check(case.make(), mesh="data=2,model=2", cluster=slow, num_stages=2)
    assert cut(compiled)
    assert len({device for mesh in compiled.session.devices.values() for device in mesh}) == 8


@pytest.mark.parametrize("case", TRAPS, ids=lambda case: case.name)
def test_traps_over_stages_of_two_devices(case: Case, slow: Path) -> None:
    built = case.make()
    check(built, mesh="data=2", cluster=slow, num_stages=built.options["num_stages"])


def test_three_axes_and_sizes_that_are_no_powers_of_two(slow: Path) -> None:
    random = np.random.default_rng(0)
    state = {name: random.standard_normal((24, 24)).astype(np.float32) / 5 for name in "ab"}
    data = {name: random.standard_normal((12, 24)).astype(np.float32) for name in "xy"}
    built = Built(sgd_step(chain_loss("ab")), state, [(data,)] * 3)
    for mesh in ("data=3,model=2", {"data": 2, "model": 3}, "a=2,b=2,c=2", "a=6"):
        for microbatches in (1, 2):
            assert cut(check(built, mesh=mesh, num_microbatches=microbatches, cluster=slow))


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *(("mlp/plain", name) for name in BASELINES),
        ("gpt-tied-dropout/linen", "megatron"),
        pytest.param("gpt-tied-dropout/linen", "zero2", marks=pytest.mark.long),
    ],
)
def test_baselines_equal_one_device(name: str, strategy: str, slow: Path) -> None:
    case = models.train_case(name, "adamw", microbatches=2, schedule=("gpipe", "1f1b")[len(strategy) % 2])
    compiled = check(case.make(), mesh="data=2,model=2", cluster=slow, strategy=strategy)
    shardings = cut(compiled)
    # All dims of this MLP belong together with the batch's, so there are no pairs of columns and rows.
    assert bool(shardings) == (strategy != "data" and (name, strategy) != ("mlp/plain", "megatron"))
    if strategy == "megatron":
        assert all("data" not in sharding.partition(" on ")[0] for sharding in shardings)
    sharding = compiled.plan.stages[0].sharding
    assert sharding is not None and sharding.strategy == strategy and sharding.is_optimal


def test_a_plan_is_applied_as_it_is(slow: Path, tmp_path: Path) -> None:
    """Saved, loaded, applied: the same bytes; changed by hand: the shardings that it says."""
    built = models.train_case("mlp/plain", "adamw", microbatches=2, stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow)
    planned = step.trace(built.state, *built.batches[0]).plan()
    planned.save(tmp_path)
    again = bactrian.parallelize(built.step, plan=tmp_path, cluster=slow)
    assert again.trace(built.state, *built.batches[0]).plan().plan.to_json() == planned.plan.to_json()
    stage = planned.plan.stages[0]
    assert stage.sharding is not None
    shardings = dict(stage.sharding.shardings)
    path = next(path for path, text in shardings.items() if path.endswith("['w']") and "params" in path)
    changed = dataclasses.replace(stage.sharding, shardings=((path, "-,model"),))
    plan = dataclasses.replace(planned.plan, stages=(dataclasses.replace(stage, sharding=changed),))
    compiled = check(built, plan=plan, mesh=None, cluster=slow)
    assert [p.sharding_text for p in compiled.placements if p.path == path] == [
        "dim 1 over model on mesh data=2,model=4"
    ]
    wrong = dataclasses.replace(stage.sharding, shardings=(("nothing", "-"),))
    plan = dataclasses.replace(planned.plan, stages=(dataclasses.replace(stage, sharding=wrong),))
    with pytest.raises(ConfigError, match="nothing, which is no argument"):
        check(built, plan=plan, cluster=slow)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "it has 1 dims, the argument has 2"),
        ("tensor,-", "no axis 'tensor'"),
        ("data,data", "names an axis twice"),
        ("data+,-", "no axis ''"),
        ('"x"}],[-', "no axis"),
    ],
)
def test_shardings_in_plans_that_are_none(text: str, message: str, slow: Path) -> None:
    built = models.train_case("mlp/plain", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow)
    traced = step.trace(built.state, *built.batches[0])
    plan = traced.plan().plan
    stage = plan.stages[0]
    assert stage.sharding is not None
    path = next(path for path, text in stage.sharding.shardings if path.endswith("['w']"))
    changed = dataclasses.replace(stage.sharding, shardings=((path, text),))
    with pytest.raises(ConfigError, match=message) as caught:
        traced.plan(plan=dataclasses.replace(plan, stages=(dataclasses.replace(stage, sharding=changed),)))
    assert path in str(caught.value) and caught.value.fix


def test_the_callers_arrays_stay(slow: Path) -> None:
    """State given as arrays of jax is the caller's: a replicated copy must not share its buffer, which is donated."""
    state = {"a": jnp.ones((16, 16)), "b": jnp.zeros((16, 16))}
    data = {name: np.ones((8, 16), np.float32) for name in "xy"}
    for mesh in ("data=2", "data=2,model=4"):
        for strategy in ("auto", "data", "zero3"):
            step = bactrian.parallelize(
                sgd_step(chain_loss("ab")), num_stages=1, mesh=mesh, cluster=slow, strategy=strategy
            )
            first, second = (bactrian.gather(step(state, data)) for _ in range(2))
            assert not any(leaf.is_deleted() for leaf in state.values())
            numerics.assert_equal_step(first, second)


def test_what_is_given_twice_is_refused(slow: Path) -> None:
    built = models.train_case("mlp/plain", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow)
    plan = step.trace(built.state, *built.batches[0]).plan().plan
    with pytest.raises(ConfigError, match="strategy is zero3, but a plan is given"):
        bactrian.parallelize(built.step, plan=plan, strategy="zero3")
    with pytest.raises(ConfigError, match="strategy is zero3, but there is no mesh"):
        bactrian.parallelize(built.step, strategy="zero3")
    state, _ = step(built.state, *built.batches[0])
    data = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow, strategy="data")
    with pytest.raises(ConfigError, match="strategy is data, but another step has placed the arguments"):
        data(state, *built.batches[0])
    whole = data.trace(built.state, *built.batches[0]).plan().plan
    with pytest.raises(ConfigError, match="which another step has placed as"):
        bactrian.parallelize(built.step, plan=whole, cluster=slow)(state, *built.batches[0])


def test_a_second_step_takes_the_placement_of_the_first(slow: Path) -> None:
    built = models.train_case("mlp/plain", "adamw", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow)
    state, _ = step(built.state, *built.batches[0])

    def evaluate(state: Any, batch: Any) -> Any:
        return sum(jnp.sum(jnp.square(leaf["w"])) for leaf in state["params"]) + batch["x"].sum()

    forward = bactrian.parallelize(evaluate, num_stages=1, forward_only=True, out_reduction="mean")
    value = forward(state, *built.batches[0])
    np.testing.assert_allclose(value, forward.reference(state, *built.batches[0]), rtol=1e-5)
    for number, placement in enumerate(forward.compiled.placements):
        assert placement.same_place(step.compiled.placements[number]) or not placement.stages
    other = bactrian.parallelize(evaluate, num_stages=1, forward_only=True, out_reduction="mean", mesh="data=4")
    with pytest.raises(ConfigError, match="mesh is data=4, but the arguments were placed on data=2,model=4"):
        other(state, *built.batches[0])


def test_the_choice_is_never_worse_than_a_baseline(slow: Path) -> None:
    for name in ("mlp/plain", "conv/linen"):
        built = models.train_case(name, "adamw", microbatches=1, stages=1).make()
        for cluster in (slow, None):
            step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=2", cluster=cluster)
            sharding = step.trace(built.state, *built.batches[0]).plan(compare=True).plan.stages[0].sharding
            assert sharding is not None and sharding.is_optimal
            assert [row.name for row in sharding.compared] == list(BASELINES)
            for row in sharding.compared:
                assert row.seconds is None or row.seconds >= sharding.seconds * (1 - 1e-9), row


def test_gathered_and_put_again(slow: Path) -> None:
    built = models.train_case("mlp/plain", "adamw", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=2,model=4", cluster=slow)
    state, _ = step(built.state, *built.batches[0])
    again = bactrian.put(bactrian.gather(state), step.compiled)
    assert "over" in repr(again["params"][0]["w"])
    for one, other in zip(
        *(numerics.host(bactrian.gather(step(x, *built.batches[1]))) for x in (state, again)), strict=True
    ):
        numerics.assert_equal_step(one, other)


def test_more_devices_than_there_are(slow: Path) -> None:
    built = models.train_case("mlp/plain", stages=1).make()
    step = bactrian.parallelize(built.step, **built.options, mesh="data=16", cluster=slow)
    with pytest.raises(ConfigError, match="needs 16 devices, slow has 8"):
        step(built.state, *built.batches[0])
    step = bactrian.parallelize(built.step, **built.options, mesh="data=16")
    with pytest.raises(ConfigError, match=r"mesh of 16 devices \(data=16\), this process has 8"):
        step(built.state, *built.batches[0])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data", "is not a list of axes"),
        ("data=0", "an axis of size 0"),
        ("data=2,data=2", "two axes of one name"),
        ({"data": 2.5}, "is not a list of axes"),
        ({"data=2,x": 2}, "invalid name of an axis"),
        (5, "neither a text nor a mapping"),
    ],
)
def test_what_is_no_mesh(mesh: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bactrian.parallelize(lambda state, batch: state, mesh=mesh)
