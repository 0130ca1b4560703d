"""Stages with meshes of their own: decided, planned, and read from a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir

import bactrian
from bactrian.driver.planning.decisions import Decisions
from bactrian.driver.planning.plan_program import plan_program
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.passes.adopt_shardings import AdoptShardings
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.plan.schema import Plan, StagePlan

MESHES = ((("data", 2), ("model", 2)), (("data", 2),))
State = tuple[jax.Array, jax.Array]


def constrained(value: jax.Array, *axes: str | None) -> jax.Array:
    """The value, asked to be sharded over axes of size 2."""
    names = tuple(axis for axis in axes if axis is not None)
    mesh = AbstractMesh((2,) * len(names), names)
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, P(*axes)))


def loss(state: State, batch: jax.Array) -> jax.Array:
    """Of two layers, the second of which is asked to be sharded."""
    return jnp.square(jnp.tanh(batch @ state[0]) @ constrained(state[1], "data", None)).mean()


def step_of(loss: Any) -> Any:
    """A step of gradient descent."""

    def train(state: State, batch: jax.Array) -> tuple[State, jax.Array]:
        value, (first, second) = bactrian.value_and_grad(loss)(state, batch)
        return (state[0] - 0.1 * first, state[1] - 0.1 * second), value

    return train


def traced(loss: Any = loss, **options: Any) -> bactrian.Traced:
    """The step, traced for two microbatches."""
    step: Any = bactrian.parallelize(step_of(loss), num_stages=2, num_microbatches=2, **options)
    return step.trace((jnp.ones((16, 16)), jnp.ones((16, 16))), jnp.ones((8, 16)))


def staged_on(meshes: tuple[MeshAxes, ...], loss: Any = loss) -> StagedPlan:
    """The step in stages on such meshes."""
    captured = traced(loss).captured
    return plan_program(
        captured.module(),
        Decisions(2, meshes),
        fingerprint=captured.fingerprint,
        platform="cpu",
        schedule=captured.schedule,
        num_microbatches=2,
        paths=[argument.path for argument in captured.arguments],
    )


def shardings(stage: StagePlan) -> dict[str, str]:
    """Of a stage's arguments, by path."""
    assert stage.sharding is not None
    return dict(stage.sharding.shardings)


def test_each_stage_is_planned_on_its_own_mesh() -> None:
    staged = staged_on(MESHES)
    assert tuple(stage.mesh for stage in staged.plan.stages) == MESHES == staged.program.meshes
    assert Decisions.of_plan(staged.plan, donate=True).meshes == MESHES
    assert "@user" not in staged.text
    assert shardings(staged.plan.stages[1])["state[1]"] == "data,-"
    assert staged.unsolved is not None
    assert '<@user, [{"data"}, {}]>' in str(staged.unsolved)


def test_equal_meshes_are_what_one_mesh_is() -> None:
    assert staged_on((MESHES[1],) * 2).text == traced(mesh="data=2").plan().staged_text


def test_an_axis_that_only_another_stage_has_shards_nothing() -> None:
    def on_both(state: State, batch: jax.Array) -> jax.Array:
        first, second = constrained(state[0], "model", None), constrained(state[1], "model", None)
        return jnp.square(jnp.tanh(batch @ first) @ second).mean()

    staged = staged_on(MESHES, on_both)
    first, second = staged.plan.stages
    assert shardings(first)["state[0]"] == "model,-"
    assert shardings(second)["state[1]"] == "-,-"
    # The plan says so, and the program, which asks for more, does not refuse it.
    applied = traced(on_both).plan(plan=staged.plan)
    assert [shardings(stage) for stage in applied.plan.stages] == [shardings(first), shardings(second)]


def test_a_constraint_in_a_branch_of_a_stage_with_fewer_axes() -> None:
    def branching(state: State, batch: jax.Array) -> jax.Array:
        hidden = jnp.tanh(batch @ state[0])
        out = hidden @ state[1]
        out = jax.lax.cond(out[0, 0] > 0, lambda x: constrained(x, "data", "model"), lambda x: -x, out)
        return jnp.square(out).mean()

    staged = staged_on(MESHES, branching)
    assert "@user" not in staged.text and "stablehlo.case" in staged.text
    assert "sdy.sharding_constraint" not in staged.text  # every device takes the whole branch


def test_a_plan_with_several_meshes_is_applied() -> None:
    plan = Plan.from_json(staged_on(MESHES).plan.to_json())
    planned = traced().plan(plan=plan)
    assert tuple(stage.mesh for stage in planned.plan.stages) == MESHES
    assert list(map(shardings, plan.stages)) == list(map(shardings, planned.plan.stages))


def test_a_mesh_for_each_stage_says_how_many_stages_there_are() -> None:
    for mesh in ("data=2,model=2;data=2", [{"data": 2, "model": 2}, {"data": 2}]):
        step: Any = bactrian.parallelize(step_of(loss), mesh=mesh)
        assert step.options.meshes == MESHES
        planned = step.trace((jnp.ones((16, 16)), jnp.ones((16, 16))), jnp.ones((8, 16))).plan()
        assert tuple(stage.mesh for stage in planned.plan.stages) == MESHES


def test_more_stages_than_meshes() -> None:
    with pytest.raises(ConfigError, match="mesh is data=2;data=4: 2 meshes for 3 stages"):
        bactrian.parallelize(step_of(loss), mesh="data=2;data=4", num_stages=3)
    with pytest.raises(ConfigError, match="mesh is data=2;data=4: 2 meshes for 3 stages"):
        traced(mesh="data=2;data=4").plan(num_stages=3)


def test_a_stage_of_one_device_beside_one_of_two_is_predicted_and_not_warned_of() -> None:
    planned = traced(mesh="data=2;data=1").plan()
    sharding = planned.plan.stages[1].sharding
    assert sharding is not None and sharding.communication_seconds == 0
    assert planned.plan.stages[1].predicted_seconds == pytest.approx(sharding.seconds)
    assert sharding.seconds > 0
    assert not any("of stage 1 repeats all of its work" in remark.message for remark in planned.plan.remarks)


def test_a_stage_is_sharded_the_same_whatever_the_others_are() -> None:
    """Its neighbours' meshes and shardings change nothing: each element that they send crosses once, wherever it was."""

    def plain(state: State, batch: jax.Array) -> jax.Array:
        return jnp.square(jnp.tanh(batch @ state[0]) @ state[1]).mean()

    def pinned(state: State, batch: jax.Array) -> jax.Array:
        return plain((constrained(state[0], None, "data"), state[1]), batch)

    own = (("x", 2), ("y", 2))
    last = [
        staged_on((mesh, own), loss).plan.stages[1].sharding
        for loss in (plain, pinned)
        for mesh in ((("data", 2),), (("data", 2), ("model", 2)))
    ]
    assert last[0] is not None
    assert all((s.shardings, s.seconds) == (last[0].shardings, last[0].seconds) for s in last if s is not None)


def test_options_read_the_meshes_of_a_plan() -> None:
    plan = staged_on(MESHES).plan
    step: Any = bactrian.parallelize(step_of(loss), plan=plan)
    assert step.options.meshes == MESHES
    with pytest.raises(ConfigError, match="mesh is data=2,model=2, but the plan has data=2,model=2;data=2"):
        bactrian.parallelize(step_of(loss), mesh="data=2,model=2", plan=plan)


def test_an_axis_that_stages_have_in_two_sizes_cannot_be_named() -> None:
    with pytest.raises(ProgramError, match="axis data has size 2 there, and 4 in a stage's mesh") as raised:
        staged_on(((("data", 2), ("model", 2)), (("data", 4), ("model", 2))))
    assert "stages have the meshes data=2,model=2; data=4,model=2" in raised.value.message
    assert __file__ in raised.value.where


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=2;data=4;data=2", "mesh is data=2;data=4;data=2, but the module has 2 stages"),
        ("data=2;data=8", "mesh is data=2;data=8, but the module has @stage1 = data=4"),
        ("data=2", "mesh is data=2, but the module has @stage1 = data=4"),
    ],
)
def test_meshes_differ_from_those_of_the_module(mesh: str, message: str) -> None:
    with make_context(), ir.Location.unknown():
        module = ir.Module.parse("""
            sdy.mesh @users = <["data"=2]>
            sdy.mesh @stage0 = <["data"=2]>
            sdy.mesh @stage1 = <["data"=4]>
            func.func public @main() { return }""")
        with pytest.raises(ConfigError, match=message):
            run_pipeline(module, (AdoptShardings(mesh=mesh),), verify_contracts=False)


def test_an_axis_in_two_sizes_that_nobody_names_is_planned_and_applied() -> None:
    def plain(state: State, batch: jax.Array) -> jax.Array:
        return jnp.square(jnp.tanh(batch @ state[0]) @ state[1]).mean()

    meshes = (("data", 2),), (("data", 4),)
    staged = staged_on(meshes, plain)
    applied = traced(plain).plan(plan=staged.plan)
    assert tuple(stage.mesh for stage in applied.plan.stages) == meshes
    assert [shardings(stage) for stage in applied.plan.stages] == [shardings(stage) for stage in staged.plan.stages]


def test_shardings_of_a_plan_are_checked_on_the_mesh_of_their_stage() -> None:
    first, second = staged_on(MESHES).plan.stages
    assert second.sharding is not None
    sharding = dataclasses.replace(second.sharding, shardings=(("state[1]", "model,-"),))
    plan = dataclasses.replace(staged_on(MESHES).plan, stages=(first, dataclasses.replace(second, sharding=sharding)))
    with pytest.raises(ConfigError, match="the mesh has no axis 'model'"):
        traced().plan(plan=plan)
