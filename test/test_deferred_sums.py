"""Gradients stay in parts while they are accumulated: the numbers, the bytes, and which sums may wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded
from jaxlib.mlir import ir

import bactrian
from bactrian.passes import pipelines
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster_file import cluster_of
from bactrian.passes.machine.spec import MeshAxes
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.solver import solve
from bactrian.passes.sharding.sharding_model import ShardingModel, step_seconds
from bactrian.passes.sharding.shardings_to_ir import Writer, write_stages
from bactrian.passes.sharding.strategies import Defers
from bactrian.passes.sharding.work_from_ir import read_program
from bactrian.passes.spmd.collective_bytes import count_collectives, sent_bytes

MESH = "data=2,model=4"
BEFORE = (*pipelines.import_step(MESH), *pipelines.form_stages(1, 1, mesh=MESH), *pipelines.localize_stages())
AXES = ((("data", 2), ("model", 4)), (("data", 8),), (("a", 2), ("b", 2), ("c", 2)))
MICROBATCHES = 4
ROWS = 16  # of a microbatch
# Hardly any latency: of models so small it would decide everything.
FAST = cluster_of(
    {
        "hosts": 1,
        "devices_per_host": 8,
        "memory_gib": 1,
        "peak_tflops": {"f32": 0.001},
        "memory_gb_per_s": 10,
        "intra_host_gb_per_s": 100,
        "intra_host_latency_us": 0.001,
    },
    name="test",
).only_group("a test")
Layer = tuple[dict[str, tuple[int, ...]], Callable[[dict[str, jax.Array], jax.Array, jax.Array], jax.Array]]


def _half(p: dict[str, jax.Array], x: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.tanh((x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32))


LAYERS: tuple[Layer, ...] = (
    ({"w": (16, 16), "b": (16,)}, lambda p, x, _: jnp.tanh(x @ p["w"] + p["b"])),
    ({"w": (16, 16)}, lambda p, x, _: x + jnp.tanh(jnp.swapaxes(x, 0, 1) @ p["w"].T).swapaxes(0, 1)),
    ({"w": (8, 16, 16)}, lambda p, x, _: jnp.einsum("btd,tde->bte", x, p["w"])),
    ({"w": (16, 4, 4)}, lambda p, x, _: jnp.einsum("btd,dhk->bthk", x, p["w"]).reshape(x.shape)),
    ({"s": (16,), "w": (16, 16)}, lambda p, x, _: x * (2 * p["s"]) @ (p["w"] + p["w"].T)),
    ({"e": (16, 16)}, lambda p, x, tokens: (x + p["e"][tokens]) @ p["e"].T),
    ({"e": (16, 16)}, lambda p, x, tokens: x + p["e"][tokens]),
    ({"w": (16, 16)}, _half),
)


def layers_of(seed: int) -> list[Layer]:
    """What a random model is made of."""
    random = np.random.default_rng(seed)
    return [LAYERS[i] for i in random.integers(len(LAYERS), size=random.integers(1, 4))]


def step_of(seed: int) -> tuple[ir.Module, list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """A random train step with accumulators, its arguments for one microbatch, and what it gives on one device."""
    random, layers = np.random.default_rng(seed), layers_of(seed)
    state = [
        {name: random.uniform(-0.5, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
        for shapes, _ in layers
    ]
    x = random.uniform(-1, 1, (MICROBATCHES * ROWS, 8, 16)).astype(np.float32)
    tokens = random.integers(0, 16, (MICROBATCHES * ROWS, 8)).astype(np.int32)

    def loss(state: Any, batch: Any) -> jax.Array:
        x, tokens = batch
        for (_, layer), weights in zip(layers, state, strict=True):
            x = layer(weights, x, tokens)
        return jnp.square(x).mean()

    def step(state: Any, batch: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - g, state, gradients), value

    parallel = bactrian.parallelize(step, num_stages=1, num_microbatches=MICROBATCHES, schedule="gpipe")
    module = parallel.trace(state, (x, tokens)).captured.module(None)
    run_pipeline(module, BEFORE)
    one = x[:ROWS], tokens[:ROWS]
    value, gradients = jax.jit(jax.value_and_grad(loss))(state, one)
    expected = jax.tree.map(lambda p, g: p - g / MICROBATCHES, state, gradients), value / MICROBATCHES
    return module, jax.tree.leaves((state, one)), [np.asarray(leaf) for leaf in jax.tree.leaves(expected)]


def read(
    module: ir.Module, axes: MeshAxes, memory: int | None = None, *, is_step: bool = False
) -> tuple[ir.Module, Any, ShardingModel]:
    """A step on another mesh; as a function, or as a step that can be split into functions."""
    module = sharded.prepared(str(module.operation.get_asm()), axes, is_step=is_step)
    mesh = FAST.mesh(axes)
    with module.context:
        reading = read_program(main_function(module), mesh, FAST, MICROBATCHES, lambda op, text: None)
    return module, reading, ShardingModel(reading.problem, mesh, memory)


def drawn(model: ShardingModel, seed: int) -> list[int]:
    """A random choice that is allowed; sums that may wait mostly do."""
    random, network = np.random.default_rng(seed), model.network
    waits = {
        node: np.array([bool(strategy.results[0].unreduced) for strategy in choices])
        for node, _, choices in model.op_nodes()
    }
    into: dict[int, list[tuple[int, Any]]] = {}
    for (i, j), costs in zip(network.edges, network.edge_costs, strict=True):
        first, second, matrix = (i, j, costs) if i < j else (j, i, costs.T)
        into.setdefault(second, []).append((first, matrix))
    choice = list[int]()
    for node, costs in enumerate(network.costs):
        allowed = np.isfinite(costs)
        for first, matrix in into.get(node, []):
            allowed &= np.isfinite(matrix[choice[first]])
        if node in waits and random.random() < 0.8 and (allowed & waits[node]).any():
            allowed &= waits[node]
        choice.append(int(random.choice(np.flatnonzero(allowed))))
    return choice


def waits(model: ShardingModel, number: int, strategy: Any) -> bool:
    """Whether an op begins a sum with this strategy that is left unreduced."""
    op = model.problem.ops[number]
    return op.defers is Defers.STARTS and strategy is not None and bool(strategy.results[0].unreduced)


def waiting(model: ShardingModel, choice: Sequence[int]) -> list[int]:
    """The ops that begin sums that are left in parts."""
    chosen = model.shardings(choice).chosen
    return [number for number, strategy in enumerate(chosen) if waits(model, number, strategy)]


def kept_waiting(model: ShardingModel, numbers: Sequence[int]) -> CostNetwork:
    """The model's network with these ops' sums left in parts, whatever that costs."""
    network = model.network
    for node, number, choices in model.op_nodes():
        if number in numbers:
            network = network.restricted(node, [k for k, s in enumerate(choices) if waits(model, number, s)])
    return network


def check_numbers(seed: int) -> int:
    """A random step with a random choice; how many of its sums wait."""
    axes = AXES[seed % len(AXES)]
    module, arguments, expected = step_of(seed)
    module, reading, model = read(module, axes)
    choice = drawn(model, seed)
    sharded.write(module, reading, model, choice)
    got = sharded.run(module, axes, arguments)
    halved = any(layer is _half for _, layer in layers_of(seed))  # parts are rounded to 8 bits each on their own
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=5e-3 if halved else 1e-5)
    return len(waiting(model, choice))


def test_parts_added_up_later_give_the_same_numbers() -> None:
    assert sum(check_numbers(seed) for seed in range(5)) > 6


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_parts_of_many_programs_added_up_later_give_the_same_numbers(block: int) -> None:
    for seed in range(30 * block, 30 * (block + 1)):
        check_numbers(seed)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_reduced_once_per_step(seed: int) -> None:
    """The best choice, its bytes counted in the stage functions, and its cost."""
    module, _, _ = step_of(seed)
    module, reading, model = read(module, AXES[seed % 2], is_step=True)  # of two axes, and of one
    choice = solve(model.network, 30.0).choice
    assert waiting(model, choice)
    shardings = model.shardings(choice)
    assert step_seconds(model, shardings).total == pytest.approx(shardings.seconds)
    with module.context, ir.Location.unknown():
        writer = Writer(main_function(module), reading, model, shardings, "stage0", MICROBATCHES)
        write_stages([writer])
    run_pipeline(module, pipelines.emit_stages())
    assert sent_bytes(count_collectives(module.operation)) == pytest.approx(writer.sent)
    if seed % 2:  # all devices along one axis: data parallelism
        assert writer.sent_in_step["all_reduce"] == pytest.approx(writer.sent["all_reduce"])


def test_memory_decides_when_to_add_up() -> None:
    """Accumulators that are cut take less memory, and a reduction in every microbatch."""
    _, _, model = read(step_of(13)[0], AXES[1])
    best = solve(model.network, 30.0)
    halfway = int(best.memory + model.network.least_peak()) // 2
    _, _, tight = read(step_of(13)[0], AXES[1], halfway)
    kept = solve(tight.network, 30.0)
    assert kept.memory < best.memory
    assert kept.cost > best.cost
    held = solve(kept_waiting(tight, waiting(model, best.choice)), 30.0)
    assert held.optimal and held.cost > kept.cost * (1 + 1e-6)  # what fits and waits as before is no best choice


def test_only_what_the_update_alone_reads_waits() -> None:
    """A gradient that is a result of the step, a maximum, and one that goes through a function that is not linear."""

    def step(state: Any, x: jax.Array) -> Any:
        def loss(state: Any) -> tuple[jax.Array, jax.Array]:
            y = x @ state["w"]
            return jnp.square(y @ state["v"]).mean(), jnp.max(y, axis=0)

        (value, most), gradients = bactrian.value_and_grad(loss, has_aux=True, reduction="sum", aux_reduction="sum")(
            state
        )
        return jax.tree.map(lambda p, g: p - g, state, gradients), value, most, gradients["v"]

    state = {name: jnp.ones((16, 16)) for name in "vw"}
    parallel = bactrian.parallelize(step, num_stages=1, num_microbatches=MICROBATCHES)
    module = parallel.trace(state, jnp.ones((64, 16))).captured.module(None)
    run_pipeline(module, BEFORE)
    _, reading, model = read(module, AXES[1])
    begun = [entry.op for entry in reading.ops if entry.op.defers is Defers.STARTS]
    assert [model.problem.values[op.results[0]].shape for op in begun] == [(16, 16)]  # of w alone
