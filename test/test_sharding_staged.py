"""A captured step with microbatches is sharded, and the passes after it take what comes out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sharded
from jaxlib.mlir import ir

import bactrian
from bactrian.passes import pipelines
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import GRADIENT_BOUNDARY, phase_of, stage_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.meshes import value_shardings
from bactrian.passes.ir.regions import body, custom_call_target, main_function
from bactrian.passes.machine.cluster import CPU_CLUSTER, CPU_HOST
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.stage_programs import read_stage, read_stages

MESH = "data=2,model=4"
AXES = (("data", 2), ("model", 4))


def captured(num_stages: int = 1) -> tuple[ir.Module, list[Any]]:
    """A small step of gradient descent with 4 microbatches before its shardings are chosen; the module and its arguments."""
    random = np.random.default_rng(0)
    state = [random.standard_normal((64, 64)).astype(np.float32) / 8 for _ in range(3)]
    batch = random.standard_normal((2, 512, 64)).astype(np.float32)

    def loss(weights: Any, pair: Any) -> jax.Array:
        x, y = pair
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.square(x - y).mean()

    def step(weights: Any, pair: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(weights, pair)
        return jax.tree.map(lambda p, g: p - 0.1 * g, weights, gradients), value

    parallel = bactrian.parallelize(step, num_stages=num_stages, num_microbatches=4)
    arguments = state, tuple(batch)
    module = parallel.trace(*arguments).captured.module(None)
    run_pipeline(module, [*pipelines.import_step(MESH), *pipelines.form_stages(num_stages, num_stages, mesh=MESH)])
    run_pipeline(module, [*pipelines.localize_stages(), *pipelines.prepare_shardings()])
    return module, jax.tree.leaves(arguments)


def solved() -> tuple[ir.Module, list[Any]]:
    """The same with its shardings, in one stage."""
    module, arguments = captured()
    run_pipeline(module, pipelines.shard_stages())
    return module, arguments


def test_what_comes_out_has_a_place() -> None:
    module, _ = solved()
    with module.context:
        main = main_function(module)
        for view in body(main).operations:
            op = view.operation
            if op.name != "func.return" and custom_call_target(op) != GRADIENT_BOUNDARY:
                assert phase_of(op) is not None, op
                assert stage_of(op) == 0, op
        flow = MainDataflow.of(main)
        below = range(flow.boundary + 1, len(flow.ops) - 1)
        assert all(flow.phases[i] == "update" for i in below)
        reshards = [op for i, op in enumerate(flow.ops) if i in below and op.name == "sdy.reshard"]
        sources = value_shardings(main, [op.operands[0] for op in reshards])
        assert (
            sum("unreduced" in str(sharding) for sharding in sources) == 4
        )  # partial sums of the loss and each gradient
    run_pipeline(module, pipelines.emit_stages())


def test_one_microbatch_of_it_gives_the_numbers() -> None:
    """The boundary left out, the module is a step on one microbatch that weighs a quarter: on 8 devices as on one."""
    module, arguments = solved()
    state, (x, y) = arguments[:3], arguments[3:]
    got = sharded.run(module, AXES, [*state, x[:128], y[:128]])

    def loss(weights: Any) -> jax.Array:
        value = x[:128]
        for weight in weights:
            value = jnp.tanh(value @ weight)
        return jnp.square(value - y[:128]).mean()

    value, gradients = jax.value_and_grad(loss)(state)
    expected = [*(w - 0.1 * g / 4 for w, g in zip(state, gradients, strict=True)), value / 4]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, np.asarray(other), rtol=1e-5, atol=1e-6)


def test_a_stage_is_read_and_priced_without_the_others() -> None:
    """On its own, last stage first, and beside a stage on another mesh: one and the same network."""
    module, _ = captured(num_stages=2)
    with module.context:
        wide = read_stages(module, {"stage0": AXES, "stage1": AXES}, CPU_CLUSTER, lambda op, text: None)
        long = read_stages(module, {"stage0": (("data", 8),), "stage1": AXES}, CPU_CLUSTER, lambda op, text: None)
        for stage in (1, 0):
            alone = read_stage(module, stage, CPU_HOST.mesh(AXES), CPU_HOST, lambda op, text: None)
            assert alone.reading.problem == wide[stage].reading.problem
        networks = [ShardingModel(stages[1].reading.problem, stages[1].mesh).network for stages in (wide, long)]
    assert networks[0].edges == networks[1].edges
    for name in ("costs", "usages", "edge_costs"):
        for one, other in zip(*(getattr(network, name) for network in networks), strict=True):
            np.testing.assert_array_equal(one, other)
    assert wide[0].reading.problem.received and wide[1].reading.problem.received  # gradients, and what they belong to
