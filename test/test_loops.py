"""Loops on a mesh: steps that scan over layers, with their bodies cut, give the numbers of one device."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from cases import Built
from jax import lax
from jaxlib.mlir import ir
from meshes import check, cut

import bactrian
from bactrian.driver.xla.compare_bytes import compare
from bactrian.passes.ir.attributes import result_updates
from bactrian.passes.ir.meshes import spec_of, value_shardings
from bactrian.passes.ir.regions import main_function, nested_operations
from bactrian.passes.machine.cluster import CPU_HOST
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.network.solver import solve
from bactrian.passes.sharding.cost_breakdown import bytes_sent, phase_seconds
from bactrian.passes.sharding.loop_dataflow import capture_unchanged
from bactrian.passes.sharding.sharding_model import step_seconds
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.work_from_ir import read_program

LAYERS, WIDTH, HIDDEN = 4, 256, 1024
MESHES = ((("data", 2), ("model", 4)), (("data", 8),))


def layer(x: jax.Array, weights: Any) -> jax.Array:
    return x + jnp.tanh(x @ weights["in"]) @ weights["out"]


def step(weights: Any, x: jax.Array, *, unroll: bool = False) -> Any:
    """One step of gradient descent of a chain of layers, scanned or not."""

    def loss(weights: Any) -> jax.Array:
        if not unroll:
            return jnp.mean(lax.scan(lambda h, w: (layer(h, w), None), x, weights)[0] ** 2)
        h = x
        for number in range(LAYERS):
            h = layer(h, jax.tree.map(operator.itemgetter(number), weights))
        return jnp.mean(h**2)

    value, gradients = jax.value_and_grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), value


def inputs(batch: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"in": (LAYERS, WIDTH, HIDDEN), "out": (LAYERS, HIDDEN, WIDTH)}
    weights = {name: random.standard_normal(shape, np.float32) / 20 for name, shape in shapes.items()}
    return weights, random.standard_normal((batch, WIDTH), np.float32)


def loops(module: ir.Module) -> list[ir.Operation]:
    return [op for op in nested_operations(main_function(module)) if op.name == "stablehlo.while"]


def cuts(module: ir.Module, name: str) -> list[set[str]]:
    """For each op of a name in a loop, the axes over which its operands or its result are cut."""
    main = main_function(module)
    ops = [op for loop in loops(module) for op in nested_operations(loop) if op.name == name]
    found = [value_shardings(main, [*op.operands, op.results[0]]) for op in ops]
    return [{axis for sharding in each if sharding is not None for axis in spec_of(sharding).axes} for each in found]


def solved(function: Any, arguments: Any, axes: MeshAxes) -> tuple[ir.Module, Writer, float]:
    """A module with the best shardings; what is predicted agrees with all other accounts of it."""
    module = sharded.lowered(function, arguments, axes)
    reading, model = sharded.read(module, axes)
    solution = solve(model.network, 60.0)
    shardings = model.shardings(solution.choice)
    assert step_seconds(model, shardings).total == pytest.approx(solution.cost, rel=1e-9)
    assert sum(phase_seconds(model, reading, shardings).values()) == pytest.approx(solution.cost, rel=1e-9)
    with module.context, ir.Location.unknown():
        writer = Writer(main_function(module), reading, model, shardings, "stage0")
        expected = bytes_sent(model, reading, shardings, 1, result_updates(main_function(module)), shardings.arguments)
        write_stages([writer])
        assert module.operation.verify()
        assert expected == {kind: round(nbytes) for kind, nbytes in sorted(writer.sent_in_step.items())}
    assert sharded.counted_bytes(module, axes) == pytest.approx(writer.sent)
    return module, writer, solution.cost


@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(f"{name}{size}" for name, size in axes))
@pytest.mark.parametrize("batch", [64, 4096])
def test_layers_in_a_loop_are_cut_as_they_are_without(axes: MeshAxes, batch: int) -> None:
    arguments = inputs(batch)
    module, writer, seconds = solved(step, arguments, axes)
    with module.context:
        assert cuts(module, "stablehlo.dot_general") == [{name for name, _ in axes}] * 6
    _, flat, unrolled = solved(lambda w, x: step(w, x, unroll=True), arguments, axes)
    assert unrolled < seconds < 1.2 * unrolled  # a loop stacks what it keeps
    assert sum(writer.sent.values()) < 2 * sum(flat.sent.values())
    if batch == 64:
        got = sharded.run(module, axes, jax.tree.leaves(arguments))
        for one, other in zip(got, jax.tree.leaves(jax.jit(step)(*arguments)), strict=True):
            np.testing.assert_allclose(one, np.asarray(other), rtol=1e-5, atol=1e-5)


def weights_of(function: Any, arguments: Any) -> tuple[list[tuple[str, float, tuple[float, ...]]], list[str]]:
    """Of the products and sums of a function with two microbatches: how often they run, and their operands are moved;
    and what is remarked."""
    axes, remarks = MESHES[0], list[str]()
    module = sharded.lowered(function, arguments, axes)
    with module.context:
        capture_unchanged(main_function(module))
        mesh = CPU_HOST.mesh(axes)
        reading = read_program(main_function(module), mesh, CPU_HOST, 2, lambda op, text: remarks.append(text))
        names = {"stablehlo.dot_general": "dot", "stablehlo.reduce": "reduce"}
        return [
            (names[op.name], entry.op.runs_per_step, entry.op.reshards_per_step or ())
            for entry in reading.ops
            if (op := reading.flow.ops[entry.index]).name in names
        ], remarks


def test_loops_in_loops_multiply_and_what_is_outside_is_moved_once() -> None:
    def function(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        def outer(i: int, z: jax.Array) -> jax.Array:
            y = z @ w  # reads w from outside
            return lax.fori_loop(0, 5, lambda j, u: u @ y @ v, z)

        return lax.fori_loop(0, 3, outer, x)

    square = np.ones((8, 8), np.float32)
    found, remarks = weights_of(function, [square] * 3)
    assert found == [("dot", 6.0, (6.0, 2.0)), ("dot", 30.0, (30.0, 6.0)), ("dot", 30.0, (30.0, 2.0))]
    assert remarks == []


def test_a_loop_of_unknown_length_counts_once_and_is_remarked() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.while_loop(lambda z: jnp.max(z) > 1, lambda z: z @ w, x)

    found, remarks = weights_of(function, [np.ones((8, 8), np.float32)] * 2)
    assert found == [("reduce", 2.0, (2.0,)), ("dot", 2.0, (2.0, 2.0))]  # first what the condition reads
    assert remarks == ["unknown trip count: the loop body is costed as one iteration"]


def test_memory_of_a_loop_lasts_until_its_end() -> None:
    """What is carried once, its next value in its place; what is read from outside for as long as the loop runs."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        big = w @ w  # 64 KiB
        return lax.fori_loop(0, 4, lambda i, z: jnp.sin(z @ (big[:, :8] @ big[:8]).T), x)

    axes = (("x", 1),)
    module = sharded.lowered(function, [np.ones((8, 128), np.float32), np.ones((128, 128), np.float32)], axes)
    reading, model = sharded.read(module, axes)
    flow, network = reading.flow, model.network
    (loop,) = flow.loops
    inside = [at for at, entry in enumerate(reading.ops) if loop.first <= entry.index < loop.end]
    until = {
        flow.ops[reading.ops[at].index].name: network.intervals[node][1]
        for node, at, _ in model.op_nodes()
        if at < inside[0] or flow.kinds[reading.ops[at].index] == "carry"
    }
    assert until["stablehlo.dot_general"] == inside[-1] + 1
    assert until["stablehlo.while"] == len(reading.ops) + 1
    made = reading.value_of[loop.returned[-1]]
    assert made in model.problem.in_place


def scanned(names: str, width: int = 64) -> Built:
    """A step with a loop over layers for each name, a loop in it over the blocks of a matrix that no turn changes, and
    one in the update that runs until a value says so."""
    random = np.random.default_rng(0)
    state = {name: random.standard_normal((3, width, width), np.float32) / 10 for name in names}
    state["fixed"] = random.standard_normal((width, width), np.float32) / 10
    data = {name: random.standard_normal((32, width), np.float32) for name in "xy"}

    def loss(state: Any, batch: Any) -> jax.Array:
        def layer(h: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            blocks = state["fixed"].reshape(2, width // 2, width)
            mixed = lax.scan(lambda z, block: (jnp.tanh(z @ block.T @ block + z), None), h, blocks)[0]
            return h + jnp.tanh(mixed @ weight), None

        h = batch["x"]
        for name in names:
            h = lax.scan(layer, h, state[name])[0]
        return jnp.mean((h - batch["y"]) ** 2)

    def train(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state, batch)

        def halved(gradient: jax.Array) -> jax.Array:
            return lax.while_loop(lambda g: jnp.sum(g * g) > 1e-4, lambda g: 0.5 * g, gradient)

        return jax.tree.map(lambda w, g: w - halved(g), state, gradients), value

    return Built(train, state, [(data,)])


def test_steps_with_loops_equal_one_device(slow: Path) -> None:
    compiled = check(scanned("a"), mesh="data=2,model=2", num_microbatches=2, cluster=slow)
    assert cut(compiled)


def test_stages_with_loops_equal_one_device(slow: Path) -> None:
    built = scanned("ab")
    options: dict[str, Any] = {"mesh": "data=2,model=2", "num_stages": 2, "num_microbatches": 2, "cluster": slow}
    module = bactrian.parallelize(built.step, **options).trace(built.state, *built.batches[0]).plan().staged.module
    with module.context:
        functions = [view.operation for view in module.body.operations if view.operation.name == "func.func"]
        for stage in (0, 1):
            own = [f for f in functions if str(f.attributes["sym_name"]).startswith(f'"stage{stage}.')]
            ops = [op for function in own for op in nested_operations(function) if op.name == "stablehlo.while"]
            assert any("tensor<8x" in str(result.type) for op in ops for result in op.results)  # half of 16 rows
    assert cut(check(built, **options))


def test_xla_sends_in_loops_what_is_planned(slow: Path) -> None:
    weights, x = inputs(64)

    def train(state: Any, batch: Any) -> Any:
        def loss(state: Any, batch: Any) -> jax.Array:
            return jnp.mean(lax.scan(lambda h, w: (layer(h, w), None), batch, state)[0] ** 2)

        value, gradients = bactrian.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda w, g: w - 0.1 * g, state, gradients), value

    parallel = bactrian.parallelize(
        train, num_stages=1, num_microbatches=1, mesh="data=4", cluster=slow, strategy="data"
    )
    planned = parallel.trace(weights, x).plan()
    comparison = compare(planned.staged)
    assert not comparison.differences
    (stage,) = planned.plan.stages
    assert stage.sharding is not None
    assert comparison.compiled == comparison.planned == pytest.approx(dict(stage.sharding.sent_bytes))
    assert sum(comparison.planned.values()) > 0
