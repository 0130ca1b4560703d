"""Reduced-cost fixing: min-marginals are lower bounds, and the answers are the best ones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
from test_network import brute_force, check_against_brute_force, complete, in_order, random_network

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network import reduced_cost_fixing
from bactrian.passes.network import solver as solving
from bactrian.passes.network.milp import IntegerProgram
from bactrian.passes.network.min_marginals import DualMultipliers, MinMarginals
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import forbid
from bactrian.passes.network.solver import solve
from bactrian.passes.network.trws import MessagePassing, trws_multipliers


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks take the way of large ones."""
    monkeypatch.setattr(solving, "elimination_order", lambda network: None)
    monkeypatch.setattr(reduced_cost_fixing, "_FIRST_PAIRS", 3)
    monkeypatch.setattr(reduced_cost_fixing, "_FEW_PAIRS", 3)


def any_multipliers(network: ReducedNetwork, seed: int) -> DualMultipliers:
    """Any multipliers."""
    random = np.random.default_rng(seed)
    moved = {
        pair: (random.integers(-9, 9, matrix.shape[0]) / 1.0, random.integers(-9, 9, matrix.shape[1]) / 1.0)
        for pair, matrix in network.pairs.items()
    }
    times = len(network.memory.times)
    points = random.choice(times, min(2, times), replace=False).tolist()
    return DualMultipliers(moved, {point: float(random.random()) for point in points})


def feasible(count: int) -> Iterator[tuple[int, CostNetwork, ReducedNetwork]]:
    """Random networks of so many seeds, those that have a feasible choice."""
    for seed in range(count):
        problem = random_network(seed)
        if brute_force(problem) is not None:
            network = ReducedNetwork(problem)
            forbid(network)
            yield seed, problem, network


def multipliers_of(network: ReducedNetwork, source: str, seed: int) -> DualMultipliers | None:
    if source == "any":
        return any_multipliers(network, seed)
    if source == "messages":
        return trws_multipliers(network, time.monotonic() + 60)
    try:
        return IntegerProgram(network).relax(time.monotonic() + 60).duals
    except InfeasiblePlanError:
        return None


@pytest.mark.parametrize("source", ["any", "messages", "program"])
def test_no_choice_costs_less_than_its_min_marginals(source: str) -> None:
    checked = 0
    for seed, problem, network in feasible(120):
        multipliers = multipliers_of(network, source, seed)
        assert multipliers is not None
        bounds = MinMarginals(network, multipliers)
        nodes = list(network.costs)
        for values in itertools.product(*(range(len(network.costs[node])) for node in nodes)):
            choice = dict(zip(nodes, values, strict=True))
            if not problem.is_feasible(in_order(network.expand(choice))):
                continue
            above = network.cost(choice) - bounds.lower_bound
            said = [float(bounds.nodes[node][choice[node]]) for node in nodes]
            said += [float(above_bound[choice[i], choice[j]]) for (i, j), above_bound in bounds.pairs.items()]
            assert max(said, default=0.0) <= above * (1 + 1e-9) + 1e-9
            checked += 1
    assert checked > 1000


def test_the_bound_of_messages_is_that_of_their_multipliers() -> None:
    for _, _, network in feasible(60):
        messages = MessagePassing(network)
        bound = max(messages.sweep() for _ in range(3))
        assert MinMarginals(network, messages.multipliers()).lower_bound == pytest.approx(bound, rel=1e-9, abs=1e-6)


def test_equals_brute_force() -> None:
    assert sum(check_against_brute_force(seed) for seed in range(200)) > 100


@pytest.mark.parametrize("kind", [int, float])
def test_dense_networks(kind: type) -> None:
    """Nothing can be reduced, and relaxations are not tight."""
    for seed in range(12):
        problem = complete(6, 3, 0, 90, seed)
        near = np.random.default_rng(seed)
        usages = tuple(near.integers(0, 9, 3) for _ in range(6))
        limit = int(sum(usage.min() for usage in usages) + near.integers(3, 12))
        costs = [
            tuple((array / 7 if kind is float else array) for array in part)
            for part in (problem.costs, problem.edge_costs)
        ]
        problem = CostNetwork(costs[0], usages, problem.intervals, problem.edges, costs[1], limit)
        solution = solve(problem)
        assert solution.optimal and solution.cost == pytest.approx(brute_force(problem), rel=1e-9)
        assert problem.is_feasible(solution.choice)
