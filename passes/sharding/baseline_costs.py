"""The well-known plans as answers: what they would take, and the best of them where the solver's own is not proved."""

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
    """One that fits.

    Attributes:
        seconds: of a step.
        breakdown: of its time and memory.
        memory: bytes of a device at the fullest time.
        shardings: its layouts.
    """

    seconds: float
    breakdown: CostBreakdown
    memory: int
    shardings: Shardings


def solve_baseline(
    reading: Reading, mesh: Mesh, roles: Sequence[str], name: str, limit: int | None, time_limit: float
) -> BaselinePlan | None:
    """A known plan, solved for what it leaves open; None where it does not fit, or none was found in time."""
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
    model: ShardingModel, solution: Solution | None, known: Iterable[BaselinePlan]
) -> Solution | None:
    """A solution that is not proved, or the cheapest known plan, if that is cheaper: with the solution's bound.

    Args:
        model: of the program, with nothing decided by a known plan.
        solution: of its network; None where none was found.
        known: plans of the same program within the same memory.
    """
    best = solution
    for plan in known:
        choice = model.choice(plan.shardings)
        cost = model.network.cost(choice)
        if model.network.is_feasible(choice) and (best is None or cost < best.cost):
            old = best or Solution(choice, cost, 0.0, False, 0, 0.0, {})
            best = replace(old, choice=choice, cost=cost, memory=model.network.peak(choice))
    return best
