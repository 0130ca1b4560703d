"""Baseline plans: their predicted cost, and the fallback when the solver has no optimality proof."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.network.solver import Solution, solve
from bactrian.passes.sharding.baselines import pin_baseline
from bactrian.passes.sharding.cost_breakdown import CostBreakdown, cost_breakdown
from bactrian.passes.sharding.sharding_model import ShardingModel, Shardings
from bactrian.passes.sharding.work_from_ir import Reading


@dataclass(frozen=True)
class BaselinePlan:
    """A baseline that fits.

    Attributes:
        seconds: of a step.
        breakdown: of its time and memory.
        memory: peak bytes of a device.
        shardings: what it chooses.
    """

    seconds: float
    breakdown: CostBreakdown
    memory: int
    shardings: Shardings


def solve_baseline(
    reading: Reading, mesh: Mesh, roles: Sequence[str], name: str, limit: int | None, time_limit: float
) -> BaselinePlan | None:
    """A baseline, solved for what it leaves open; None where it does not fit, or none was found in time."""
    plan = pin_baseline(reading, mesh, roles, name)
    model = ShardingModel(plan.problem, mesh, limit)
    try:
        solution = solve(model.network, time_limit)
    except (ConfigError, InfeasiblePlanError):
        return None
    shardings = model.shardings(solution.choice)
    taken = cost_breakdown(model, plan, roles, solution.choice, shardings)
    return BaselinePlan(float(solution.cost), taken, round(solution.memory), shardings)


def no_worse_than_baselines(
    model: ShardingModel, solution: Solution | None, baselines: Iterable[BaselinePlan]
) -> Solution | None:
    """A solution without a proof, or the cheapest baseline, if that is cheaper: with the solution's bound.

    Args:
        model: of the program, with nothing pinned by a baseline.
        solution: of its network; None where none was found.
        baselines: of the same program within the same memory.
    """
    best = solution
    for plan in baselines:
        choice = model.choice(plan.shardings)
        cost = model.network.cost(choice)
        if model.network.is_feasible(choice) and (best is None or cost < best.cost):
            old = best or Solution(choice, cost, 0.0, False, 0, 0.0, {})
            best = replace(old, choice=choice, cost=cost, memory=model.network.peak(choice))
    return best
