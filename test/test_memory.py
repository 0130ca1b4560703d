"""What executors really hold while a step runs, against what the schedule promises and the lists' report predicts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bactrian
from bactrian.driver.run.compiled_step import Compiled
from bactrian.passes.schedules.by_name import schedule_named
from bactrian.runtime.executor import Meter

RNG = np.random.default_rng(1)
WIDTH, ROWS = 8, 16


def measured(num_stages: int, num_microbatches: int, schedule: str) -> tuple[Compiled, Meter]:
    @bactrian.parallelize(num_stages=num_stages, num_microbatches=num_microbatches, schedule=schedule)
    def step(params: list[jax.Array], batch: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        def loss(params: list[jax.Array]) -> jax.Array:
            x = batch
            for w in params:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        value, gradients = bactrian.value_and_grad(loss)(params)
        return [w - 0.1 * g for w, g in zip(params, gradients, strict=True)], value

    params = [RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32) for _ in range(num_stages)]
    batch = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
    compiled = step.trace(params, batch).plan().compile()
    compiled.observe(meter=True)
    state, _ = compiled(params, batch)
    compiled(state, batch)
    assert compiled.session.meter is not None
    return compiled, compiled.session.meter


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 4), (4, 8), (4, 2), (3, 1)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager-1f1b"])
def test_microbatches_held(num_stages: int, num_microbatches: int, schedule: str) -> None:
    """Executors hold the activations of as many microbatches as the schedule says."""
    compiled, meter = measured(num_stages, num_microbatches, schedule)
    counts = schedule_named(schedule)
    bound = {stage: counts.in_flight(stage, num_stages, num_microbatches) for stage in range(num_stages)}
    assert meter.in_flight == compiled.session.statistics.in_flight == bound
    planned = {stage.stage: stage.microbatches_in_flight for stage in compiled.plan.stages}
    assert all(held <= planned[stage] for stage, held in bound.items())
    most_ahead = 1 + max(1, bound[0] - bound[1])  # receives posted: a backward's, and forwards of the stage before
    check_bytes(compiled, meter, ahead_bytes=most_ahead * (ROWS // num_microbatches * WIDTH * 4))


def check_bytes(compiled: Compiled, meter: Meter, ahead_bytes: int) -> None:
    """The report counts a receive from when it is posted, ahead of its reader: it may exceed by those only."""
    report = compiled.session.statistics.peak_bytes
    assert set(meter.peak_bytes) == set(range(len(report)))
    for rank, peak in enumerate(report):
        assert meter.peak_bytes[rank] <= peak <= meter.peak_bytes[rank] + ahead_bytes


def test_1f1b_holds_less_than_gpipe() -> None:
    held = {schedule: measured(2, 8, schedule)[1].peak_bytes[0] for schedule in ("1f1b", "gpipe")}
    activation = ROWS // 8 * WIDTH * 4
    assert held["gpipe"] - held["1f1b"] >= 6 * activation
