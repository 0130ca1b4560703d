"""Repeated layers solved as one: the bound is one, and what is called proved is the best."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest

from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.network import lifted_lp
from bactrian.passes.network import solver as solving
from bactrian.passes.network.hash_consing import HashConsing
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import contract, forbid, forbid_by_memory, normalise
from bactrian.passes.network.solver import Solution, solve


@pytest.fixture(autouse=True)
def by_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are not solved by tables here (test_bucket_elimination.py)."""
    monkeypatch.setattr(solving, "elimination_order", lambda network: None)


def layers(seed: int) -> CostNetwork:
    """Equal layers in a chain, with edges inside, to the next layer and back from a last node; other nodes at the ends."""
    random = np.random.default_rng(seed)
    inside, strategies, count = int(random.integers(2, 5)), int(random.integers(2, 5)), int(random.integers(4, 12))
    kind: Any = random.choice([int, float])

    def draw(*shape: int) -> Any:
        values = random.integers(0, 30, shape)
        values[random.random(shape) < 0.3] = 0
        return values if kind is int else values / 7

    own = [draw(strategies) for _ in range(inside)]
    within = [(i, j, draw(strategies, strategies)) for i in range(inside) for j in range(i) if random.random() < 0.8]
    onward = [(int(random.integers(inside)), int(random.integers(inside)), draw(strategies, strategies)) for _ in "ab"]
    use = [random.integers(0, 9, strategies) for _ in range(inside)]
    costs, usages, intervals = list[Any](), list[Any](), list[tuple[int, int]]()
    edges, matrices = list[tuple[int, int]](), list[Any]()
    for layer in range(count):
        base = layer * inside
        for node in range(inside):
            costs.append(own[node])
            usages.append(use[node])
            intervals.append((base + node, 2 * count * inside - base - node))
        for i, j, matrix in within:
            edges.append((base + i, base + j))
            matrices.append(matrix)
        for i, j, matrix in onward if layer else ():
            edges.append((base - inside + i, base + j))
            matrices.append(matrix)
    for end in (0, (count - 1) * inside):
        costs.append(draw(strategies))
        usages.append(np.zeros(strategies, int))
        intervals.append((0, 0))
        edges.append((end, len(costs) - 1))
        matrices.append(draw(strategies, strategies))
    problem = CostNetwork(tuple(costs), tuple(usages), tuple(intervals), tuple(edges), tuple(matrices))
    if random.random() < 0.5:
        return problem
    least = CostNetwork(tuple(usages), tuple(usages), tuple(intervals), (), (), None)
    low = least.peak([int(np.argmin(usage)) for usage in usages])
    high = problem.peak(list(solve(problem).choice))
    limit = int(low + random.random() * max(high - low, 0))
    return CostNetwork(tuple(costs), tuple(usages), tuple(intervals), tuple(edges), tuple(matrices), limit)


def plainly(problem: CostNetwork, monkeypatch: pytest.MonkeyPatch) -> Solution | None:
    """The answer without classes."""
    with monkeypatch.context() as patch:
        patch.setattr(lifted_lp, "solve_lifted", lambda *_: None)
        try:
            return solve(problem)
        except InfeasiblePlanError:
            return None


@pytest.mark.parametrize(
    "seeds", [range(60), *(pytest.param(range(n, n + 100), marks=pytest.mark.long) for n in range(60, 2060, 100))]
)
def test_bounds_and_proofs(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    proved = tried = quick = 0
    for seed in seeds:
        problem = layers(seed)
        best = plainly(problem, monkeypatch)
        if best is None:
            with pytest.raises(InfeasiblePlanError):
                solve(problem)
            continue
        assert best.optimal
        tolerance = 0 if isinstance(best.cost, int) else 1e-8 * abs(best.cost)
        network = ReducedNetwork(problem)
        forbid(network)
        forbid_by_memory(network)
        normalise(network)
        found = lifted_lp.solve_lifted(network, time.monotonic() + 30)
        if found is not None:
            tried += 1
            assert found.lower_bound <= best.cost + tolerance
            if found.choice is not None:
                choice = [found.choice[node] for node in range(len(problem.costs))]
                assert problem.is_feasible(choice)
                assert problem.cost(choice) >= best.cost - tolerance
                if found.optimal:
                    proved += 1
                    assert problem.cost(choice) <= best.cost + tolerance
        whole = solve(problem)
        assert whole.optimal
        assert abs(whole.cost - best.cost) <= tolerance
        near = solve(problem, tolerance=0.05)
        assert near.is_near(0.05) and problem.is_feasible(near.choice)
        assert near.lower_bound <= best.cost + tolerance and near.cost * 0.95 <= best.cost + tolerance
        quick += not near.optimal
    assert tried > 0.4 * len(seeds)
    assert proved > 0.5 * tried
    assert quick > 0


def test_equal_arrays_are_one() -> None:
    arrays = HashConsing()
    first, second = arrays.unique(np.arange(6.0).reshape(2, 3)), arrays.unique(np.arange(6.0).reshape(2, 3))
    assert first is second
    assert arrays.transposed(arrays.transposed(first)) is first
    assert arrays.unique(np.arange(6).reshape(2, 3)) is not first  # integers are others
    calls = list[int]()
    for _ in range(2):
        made = arrays.apply("double", lambda values: calls.append(1) or 2 * values, first)
        assert made is arrays.unique(2 * np.arange(6.0).reshape(2, 3))
    assert len(calls) == 1


def test_a_restricted_copy_leaves_the_network_alone() -> None:
    """Its memory too: an edge that becomes a bijection is contracted in the copy."""
    pair = np.array([[0.0, np.inf, 3.0], [np.inf, 0.0, 4.0]])
    usages = np.array([1, 7]), np.array([2, 9, 4])
    problem = CostNetwork((np.zeros(2), np.zeros(3)), usages, ((0, 2), (1, 3)), ((0, 1),), (pair,), 100)
    network = ReducedNetwork(problem)
    before = network.memory.profile({0: 1, 1: 1})
    small = network.restricted({1: np.array([0, 1])})
    contract(small)
    assert len(small.costs) == 1
    np.testing.assert_array_equal(network.memory.profile({0: 1, 1: 1}), before)
    assert before.max() == problem.peak([1, 1])


def test_no_time_after_a_choice_without_proof() -> None:
    """Large costs and hardly any time: an answer, or that there was no time."""
    for seed in range(10_000, 10_040):
        problem = layers(seed)
        scale = 10**11 if problem.costs[0].dtype.kind == "i" else 1e11
        problem = dataclasses.replace(
            problem,
            costs=tuple(costs * scale for costs in problem.costs),
            edge_costs=tuple(costs * scale for costs in problem.edge_costs),
        )
        try:
            solution = solve(problem, 0.02 + 0.002 * (seed % 40))
        except (ConfigError, InfeasiblePlanError):
            continue
        assert problem.is_feasible(solution.choice)
        assert solution.lower_bound <= solution.cost * (1 + 1e-9)
