"""Shardings that users ask for: kept exactly, in every stage, with the numbers of one device; or refused with their line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bactrian
from bactrian.driver.api import Parallelized
from bactrian.driver.planning.memory_refinement import clone_unsolved
from bactrian.passes import pipelines
from bactrian.passes.frame.errors import ConfigError, ProgramError
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.split_stages import SplitStages

MESH = "data=2,model=4"
RANDOM = np.random.default_rng(0)
STATE = {name: RANDOM.standard_normal((32, 32)).astype(np.float32) / 6 for name in "ab"}
BATCH = tuple(RANDOM.standard_normal((16, 32)).astype(np.float32) for _ in "xy")
# The same axes in another order: shardings go by names.
TURNED = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("model", "data"))
ABSTRACT = AbstractMesh((2, 4), ("data", "model"))


def step_of(between: Callable[[Any], Any] = lambda x: x, weight: Callable[[Any], Any] = lambda w: w) -> Any:
    """A step of two layers; ``between`` sees what goes from one to the next, ``weight`` each weight in the loss."""

    def loss(state: Any, batch: Any) -> Any:
        x, y = batch
        x = between(jnp.tanh(x @ weight(state["a"])))
        return ((x @ weight(state["b"]) - y) ** 2).mean()

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients), value

    return step


def asked(mesh: Any, *spec: Any) -> Callable[[Any], Any]:
    """A constraint."""
    return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def scanned(x: Any) -> Any:
    """A loop with a constraint inside."""
    return jax.lax.scan(lambda c, _: (asked(ABSTRACT, "data", None)(jnp.sin(c)), None), x, None, length=2)[0]


def text_of(step: Any, state: Any = STATE, batch: Any = BATCH, **options: Any) -> str:
    """The module in stages with its shardings, before ``partition``."""
    staged = bactrian.parallelize(step, **{"mesh": MESH, **options}).trace(state, batch).plan().staged
    assert staged.unsolved is not None
    with staged.unsolved.context:
        module = clone_unsolved(staged.unsolved)
    run_pipeline(module, [*pipelines.shard_stages(), SplitStages()])
    return str(module)


def constraints(text: str) -> set[tuple[str, str, str]]:
    """Mesh, sharding and type of all constraints of a module."""
    return set(re.findall(r"sdy\.sharding_constraint %\S+ <@(\w+), (\[.*?\])> : tensor<(\w+)>", text))


def shardings(step: Any, state: Any = STATE, batch: Any = BATCH, **options: Any) -> dict[str, str]:
    """Of all arguments."""
    made = bactrian.parallelize(step, **{"mesh": MESH, **options}).trace(state, batch).plan()
    return {path: text for stage in made.plan.stages if stage.sharding for path, text in stage.sharding.shardings}


def check(step: Any, state: Any = STATE, batch: Any = BATCH, steps: int = 1, **options: Any) -> Parallelized:
    """Compare with one device."""
    ours = bactrian.parallelize(step, **{"mesh": MESH, **options})
    for _ in range(steps):
        reference = ours.reference(state, batch)
        result = ours(state, batch)
        numerics.assert_equal_step(bactrian.gather(result), reference, ())
        state = result[0]
    return ours


def test_a_constraint_stays_and_decides() -> None:
    assert not constraints(text_of(step_of()))
    free = shardings(step_of())
    between = step_of(asked(TURNED, None, ("model", "data")))
    # The activation and its cotangent.
    assert constraints(text_of(between)) == {("stage0", '[{}, {"model", "data"}]', "16x32xf32")}
    assert shardings(between) != free
    assert "replicated" not in free.values()


def test_open_dims_are_chosen_and_others_are_not() -> None:
    found = constraints(text_of(step_of(asked(ABSTRACT, P.UNCONSTRAINED, "model"))))
    assert {sharding.partition(", ")[2] for _, sharding, _ in found} == {'{"model"}]'}
    assert constraints(text_of(step_of(asked(ABSTRACT, P.UNCONSTRAINED, None)))) <= {
        ("stage0", f"[{{{rows}}}, {{}}]", "16x32xf32") for rows in ("", '"data"', '"model"', '"data", "model"')
    }
    assert constraints(text_of(step_of(asked(ABSTRACT)))) == {("stage0", "[{}, {}]", "16x32xf32")}


def test_numbers_with_constraints_on_activations_weights_and_in_loops() -> None:
    between = asked(TURNED, P.UNCONSTRAINED, "data")
    check(step_of(lambda x: scanned(between(x)), asked(ABSTRACT, "model", None)), num_microbatches=2)


def test_numbers_and_shardings_under_a_mesh_that_is_set() -> None:
    step = step_of(lambda x: jax.lax.with_sharding_constraint(x, P("model", None)))
    with jax.set_mesh(Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))):
        check(step)
        assert constraints(text_of(step)) == {("stage0", '[{"model"}, {}]', "16x32xf32")}


def test_every_stage_keeps_a_constraint() -> None:
    mesh = AbstractMesh((2, 2), ("data", "model"))
    step = step_of(asked(mesh, "model", None), asked(mesh, "data", "model"))
    text = text_of(step, mesh="data=2,model=2", num_stages=2, num_microbatches=2)
    assert constraints(text) == {
        ("stage0", '[{"data"}, {"model"}]', "32x32xf32"),
        ("stage0", '[{"model"}, {}]', "8x32xf32"),
        ("stage1", '[{"data"}, {"model"}]', "32x32xf32"),
    }
    # What the first stage constrains, the second one has so.
    assert '!mpmd.mesh_tensor<"stage1", tensor<8x32xf32>, sharding=<@stage1, [{"model"}, {}]>>' in text
    check(step, mesh="data=2,model=2", num_stages=2, num_microbatches=2)


def test_a_jitted_step_gives_arguments_and_next_state_their_shardings() -> None:
    rows, columns = NamedSharding(TURNED, P("model")), NamedSharding(ABSTRACT, P(None, ("data", "model")))
    step = jax.jit(step_of(), in_shardings=({"a": rows, "b": columns}, None), donate_argnums=0)
    ours = check(step, steps=2)
    assert [str(p.specs[0]) for p in ours.compiled.placements] == ["model,-", "-,data+model"]
    out = jax.jit(step_of(), out_shardings=({"a": columns, "b": None}, None))
    assert shardings(out)["state['a']"] == "-,data+model"


def test_two_shardings_of_one_argument_are_a_reshard() -> None:
    def weight(w: Any) -> Any:
        return asked(ABSTRACT, "model", None)(w) + asked(ABSTRACT, None, "model")(w)

    found = {sharding for _, sharding, _ in constraints(text_of(step_of(weight=weight)))}
    assert found == {'[{"model"}, {}]', '[{}, {"model"}]'}
    check(step_of(weight=weight))


def test_arguments_that_are_sharded_stay_so() -> None:
    rows = NamedSharding(TURNED, P("model"))
    state = {"a": jax.device_put(STATE["a"], rows), "b": jax.device_put(STATE["b"], NamedSharding(TURNED, P()))}
    batch = (jax.device_put(BATCH[0], NamedSharding(TURNED, P(None, "data"))), BATCH[1])
    ours = check(step_of(), state, batch)
    assert str(ours.compiled.placements[0].specs[0]) == "model,-"
    found = shardings(step_of(), state, batch)
    assert found["batch[0]"] == "-,data"
    abstract = {name: jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=rows) for name in "ab"}
    assert shardings(step_of(), abstract)["state['b']"] == "model,-"
    assert shardings(step_of())["state['a']"] != "model,-"  # traced again, not remembered


def test_one_device_drops_them() -> None:
    between = asked(ABSTRACT, "data", None)
    step = jax.jit(step_of(lambda x: scanned(between(x))), in_shardings=(NamedSharding(TURNED, P("model")), None))
    ours = check(step, mesh=None, num_stages=2)
    planned = ours.trace(STATE, BATCH).plan()
    assert "sharding_constraint" not in planned.staged_text
    (remark,) = planned.plan.remarks
    assert remark.message == "6 sharding constraints dropped: each stage has one device"


def line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the line in a function that has a text."""
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(number for number, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("mesh", "spec", "reason"),
    [
        (AbstractMesh((4, 2), ("data", "model")), P("data"), "axis data has size 4 there, and 2 in a stage's mesh"),
        (AbstractMesh((2, 4), ("data", "tensor")), P("data"), "no axis of a stage's mesh is called tensor"),
    ],
)
def test_a_mesh_that_does_not_fit(mesh: AbstractMesh, spec: P, reason: str) -> None:
    def between(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    with pytest.raises(ProgramError) as error:
        text_of(step_of(between))
    text = str(error.value)
    assert text.startswith(f"a sharding constraint is over a mesh {mesh.axis_names[0]}=")
    assert "each stage has the mesh data=2,model=4" in text
    assert reason in text
    assert line_of(between, "return jax") in text
    assert text.count("where:") == 1  # the cotangent's is not said again


def test_an_axis_of_one_device_shards_nothing() -> None:
    mesh = AbstractMesh((1, 4), ("data", "model"))

    def between(h: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P("data", "model")))

    found = constraints(text_of(step_of(between)))
    assert {sharding for _, sharding, _ in found} == {'[{}, {"model"}]'}
    step = bactrian.parallelize(step_of(between), mesh=MESH)
    numerics.assert_equal_step(bactrian.gather(step(STATE, BATCH)), step.reference(STATE, BATCH))


def test_bad_shardings() -> None:
    step = jax.jit(step_of(), in_shardings=(None, NamedSharding(ABSTRACT, P(("data", "model")))))
    with pytest.raises(ProgramError, match=r"(?s)does not split a value into equal shards.*8 times.*size is 4.*1 of 4"):
        text_of(step, num_microbatches=4)
    open_ = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(ABSTRACT, P(P.UNCONSTRAINED)))
    with pytest.raises(ProgramError, match=r"(?s)comes with the sharding.*test_user_layouts.py"):
        text_of(step_of(), {"a": open_, "b": STATE["b"]})
    mapped = step_of(jax.shard_map(jnp.sin, mesh=TURNED, in_specs=P("model"), out_specs=P("model")))
    with pytest.raises(ProgramError, match=r"(?s)shard_map is not supported yet.*test_user_layouts.py"):
        text_of(mapped)
    explicit = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(explicit), pytest.raises(ProgramError, match="axes of type Explicit: data, model"):
        text_of(step_of())


@pytest.mark.parametrize("options", [{}, {"mesh": "data=1"}])
def test_a_constraint_on_explicit_axes_says_how_to_make_the_mesh(options: dict[str, Any]) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"))  # JAX's default

    def between(h: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P("data")))

    with pytest.raises(ProgramError, match="a sharding constraint is over a mesh with axes of type Explicit") as error:
        text_of(step_of(between), **options)
    assert line_of(between, "return jax") in error.value.where and "AxisType.Auto" in error.value.fix
    with jax.set_mesh(mesh), pytest.raises(ProgramError, match="axes of type Explicit"):
        text_of(step_of(between), **options)


def test_a_plan_that_says_otherwise_is_refused() -> None:
    free = bactrian.parallelize(step_of(), mesh=MESH)
    state, _ = free(STATE, BATCH)
    rows = jax.jit(step_of(), in_shardings=(NamedSharding(ABSTRACT, P("model", "data")), None))
    with pytest.raises(ConfigError, match=r"state\['a'\] is .* from another step.* asks for model,data"):
        bactrian.parallelize(rows, mesh=MESH).trace(state, BATCH).plan()
    planned = bactrian.parallelize(rows, mesh=MESH).trace(STATE, BATCH).plan()
    again = bactrian.parallelize(rows, plan=planned.plan).trace(STATE, BATCH).plan()
    assert again.staged.program == planned.staged.program
