"""What a plan predicts to be sent is what the collectives of the stage functions send, also over stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from cases import chain_loss, sgd_step
from clusters import SLOW
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir

import bactrian
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.driver.xla.compile_stage import function_texts
from bactrian.passes.frame.context import make_context
from bactrian.passes.spmd.collective_bytes import count_collectives, sent_bytes

# An all-reduce is measured to take less than a reduce-scatter, as it may on CPUs.
ALIKE = """
[measured.all_reduce.2]
bytes = [1024, 1048576]
seconds = [1e-6, 1e-4]
[measured.reduce_scatter.2]
bytes = [1024, 1048576]
seconds = [1.1e-6, 1.1e-4]
"""
MESH = AbstractMesh((2, 2), ("data", "model"))


def linear(names: str, between: Callable[[Any], Any] = lambda x: x) -> Any:
    """Products only: what goes from stage to stage is what a product leaves."""

    def loss(state: Any, batch: Any) -> Any:
        x = batch["x"]
        for name in names:
            x = between(x @ state[name])
        return (x.max(1) ** 2).mean() + (x.argmax(1) * jnp.square(x - batch["y"]).sum(1)).mean()

    return loss


def constrained(x: Any) -> Any:
    return jax.lax.with_sharding_constraint(x, NamedSharding(MESH, P("data", "model")))


def shortened(state: Any, batch: Any) -> Any:
    """Weights are rounded to 16 bits, once for each step."""
    return linear("abcd")({name: w.astype(jnp.float16).astype(jnp.float32) for name, w in state.items()}, batch)


STEPS = {
    "shortened": shortened,
    "linear": linear("abcd"),
    "constrained": linear("abcd", constrained),
    "chain": chain_loss("abcd"),
}
STATE = {name: jax.ShapeDtypeStruct((64, 64), jnp.float32) for name in "abcd"}
BATCH = {name: jax.ShapeDtypeStruct((64, 64), jnp.float32) for name in "xy"}


def counted(staged: StagedPlan) -> list[dict[str, int]]:
    """Bytes that each device sends in a step, by stage and kind."""
    program = staged.program
    totals = [dict[str, float]() for _ in range(program.num_stages)]
    for symbol, text in function_texts(staged.module).items():
        stage, _, phase = symbol.removeprefix("stage").partition(".")
        runs = program.num_microbatches if phase.startswith(("forward", "backward")) else 1
        with make_context():
            total = totals[int(stage)]
            for kind, nbytes in sent_bytes(count_collectives(ir.Module.parse(text).operation)).items():
                total[kind] = total.get(kind, 0.0) + runs * nbytes
    return [{kind: round(nbytes) for kind, nbytes in sorted(total.items())} for total in totals]


@pytest.mark.parametrize("tables", ["", ALIKE], ids=["formula", "measured"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("linear", "auto"), ("linear", "zero3"), ("constrained", "auto"), ("chain", "megatron"), ("shortened", "zero3")],
)
def test_bytes_of_stages_are_those_of_their_collectives(name: str, strategy: str, tables: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(SLOW + tables)
    for options in (
        {"num_stages": 1},
        {"num_stages": 2, "num_microbatches": 2},
        {"num_stages": 4, "num_microbatches": 4},
    ):
        step = bactrian.parallelize(
            sgd_step(STEPS[name]),
            mesh="data=2,model=2",
            cluster=tmp_path / "cluster.toml",
            strategy=strategy,
            **options,
        )
        planned = step.trace(STATE, BATCH).plan()
        predicted = [dict(stage.sharding.sent_bytes) for stage in planned.plan.stages if stage.sharding is not None]
        assert any(predicted), "nothing is sent"
        assert predicted == counted(planned.staged)


def test_numbers_of_maxima_and_pairs_that_are_scattered(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(SLOW + ALIKE)
    random = np.random.default_rng(1)
    state = {name: (random.standard_normal((64, 64)) / 9).astype(np.float32) for name in "abcd"}
    batch = {name: random.standard_normal((64, 64)).astype(np.float32) for name in "xy"}
    step = bactrian.parallelize(
        sgd_step(STEPS["constrained"]),
        mesh="data=2,model=2",
        num_stages=2,
        num_microbatches=2,
        cluster=tmp_path / "cluster.toml",
    )
    numerics.assert_equal_step(bactrian.gather(step(state, batch)), step.reference(state, batch), ())


def test_what_is_cast_to_fewer_bytes_is_resharded_after_it(tmp_path: Path) -> None:
    """Once per step, in the phase that prepares; what is sent are the 16 bits, and numbers stay the same."""
    (tmp_path / "cluster.toml").write_text(SLOW)
    random = np.random.default_rng(2)
    state = {name: (random.standard_normal((64, 64)) / 9).astype(np.float32) for name in "abcd"}
    batch = {name: random.standard_normal((64, 64)).astype(np.float32) for name in "xy"}
    step = bactrian.parallelize(
        sgd_step(shortened),
        mesh="data=4",
        num_stages=2,
        num_microbatches=4,
        cluster=tmp_path / "cluster.toml",
        strategy="zero3",
    )
    texts = function_texts(step.trace(state, batch).plan().staged.module)
    with make_context():
        sent = count_collectives(ir.Module.parse(texts["stage0.prepare"]).operation)
    assert sum(sent_bytes(sent).values()) == 64 * 64 * 2 // 4 * 3 // 4, "a weight is in other shards than its state"
    (found, loss), (wanted, exact) = bactrian.gather(step(state, batch)), step.reference(state, batch)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    for name in "abcd":  # gradients are rounded to 16 bits
        np.testing.assert_allclose(
            found[name], wanted[name], atol=1e-3 * float(np.abs(wanted[name] - state[name]).max())
        )
