"""What to tell where every device of a mesh does all of a stage's work."""

from __future__ import annotations

import math

from bactrian.passes.frame.units import human_seconds
from bactrian.passes.sharding.baseline_costs import BaselinePlan
from bactrian.passes.sharding.cost_breakdown import CostBreakdown
from bactrian.passes.sharding.work_from_ir import Reading

_ALL = 0.99  # of the work of one device


def whole_seconds(reading: Reading) -> float:
    """Computing of a step on one device that does all of it."""
    problem = reading.problem
    return sum(
        op.runs_per_step * (op.seconds + op.repack_seconds * sum(problem.values[value].nbytes for value in op.operands))
        for op in problem.ops
    )


def is_repeated(reading: Reading, chosen: CostBreakdown) -> bool:
    """Whether a device computes as long as one alone would."""
    whole = whole_seconds(reading)
    return whole > 0 and chosen.computing_seconds >= _ALL * whole


def what_would_pay(devices: int, chosen: CostBreakdown, by_rows: BaselinePlan | None) -> tuple[str, str]:
    """Why nothing is sharded, and from when on it would be.

    Sharding by rows of the batch leaves the computing of ``n`` devices ``c / n`` and adds exchanges that take ``x``,
    mostly of gradients, which are as large for more rows. So it pays where ``k c > k c / n + x``, for ``k`` times as
    many rows. Example: 1 ms of computing on 4 devices and 3 ms of exchanges: 4 times as many.

    Args:
        devices: of its mesh.
        chosen: what it takes.
        by_rows: the baseline that shards the batch; None where it does not fit.
    """
    fewer = "or use fewer devices for each stage"
    if by_rows is None:
        return "sharded by rows of the batch, it does not fit", f"use a cluster with more memory, {fewer}"
    saved = chosen.computing_seconds - by_rows.breakdown.computing_seconds
    if saved <= (1 - _ALL) * chosen.computing_seconds:
        return (
            f"no batch has rows that divide by {devices}",
            f"make the rows of a microbatch a multiple of {devices}, {fewer}",
        )
    exchanged = by_rows.breakdown.communication_seconds
    why = (
        f"sharded by rows of the batch, it computes {human_seconds(saved)} of a step less and exchanges values for "
        f"{human_seconds(exchanged)} more"
    )
    times = exchanged / saved
    return (
        why,
        f"use about {math.ceil(times) if times < 10 else round(times, -1):.0f} times as many rows in a microbatch, {fewer}",
    )
