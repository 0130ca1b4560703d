"""Steps on meshes of several devices, compared with one device."""

from __future__ import annotations

from typing import Any

import numerics
from cases import Built

import bactrian
from bactrian.driver.run.compiled_step import Compiled


def check(built: Built, **options: Any) -> Compiled:
    """Run every batch, each step from where ours stands, and compare with one device."""
    step = bactrian.parallelize(built.step, **{**built.options, "num_stages": 1, **options})
    state = built.state
    for batch in built.batches:
        reference = step.reference(state, *batch)
        result = step(state, *batch)
        numerics.assert_equal_step(bactrian.gather(result), reference, built.zero_gradient_leaves)
        state = built.next_state(result)
    return step.compiled


def cut(compiled: Compiled) -> list[str]:
    """Where the state is that is not whole everywhere."""
    return [p.sharding_text for p in compiled.placements if any(spec.axes for spec in p.specs.values())]
