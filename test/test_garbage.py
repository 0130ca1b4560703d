"""Collection pauses while a step is traced and planned, and only then; a plan that is kept keeps no threads."""

from __future__ import annotations

import gc
from typing import Any

import jax
import numpy as np
import pytest

import bactrian
from bactrian.driver import traced_step
from bactrian.driver.gc_pause import paused_collection


def test_collection_is_as_it_was_afterwards() -> None:
    with pytest.raises(ValueError, match="on purpose"), paused_collection():
        assert not gc.isenabled()
        with paused_collection():
            pass
        assert not gc.isenabled()
        raise ValueError("on purpose")
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_tracing_and_planning_pause_it(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, planned = list[bool](), list[bool]()
    plain = traced_step.plan_program

    def plan_program(*args: Any, **kwargs: Any) -> Any:
        planned.append(gc.isenabled())
        return plain(*args, **kwargs)

    monkeypatch.setattr(traced_step, "plan_program", plan_program)

    def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        traced.append(gc.isenabled())
        loss, gradient = bactrian.value_and_grad(lambda w: ((x @ w) ** 2).mean())(w)
        return w - 0.1 * gradient, loss

    parallel = bactrian.parallelize(step, num_stages=1)
    parallel.trace(np.ones((4, 2), np.float32), np.ones((8, 4), np.float32)).plan()
    assert set(traced) == {False}
    assert planned == [False]
    assert gc.isenabled()


def test_a_plan_keeps_no_threads() -> None:
    """A context of MLIR has as many as there are cores, and each shape of the batch has a plan."""
    planned = bactrian.parallelize(lambda w, x: x @ w, forward_only=True).trace(np.ones((4, 2)), np.ones((8, 4))).plan()
    assert planned.staged.module.context.get_num_threads() == 1
