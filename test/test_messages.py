"""Messages and large neighbourhoods: bounds hold, choices keep the limit, small networks are solved."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from test_network import brute_force, random_network

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network import solver as solving
from bactrian.passes.network import trws
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reductions import ReducedNetwork


def dense(seed: int, count: int = 7, size: int = 4, tight: float = 0.6) -> CostNetwork:
    """Nodes that all have to do with each other and hold memory at the same times, so that little can be reduced."""
    random = np.random.default_rng(seed)
    costs = tuple(random.integers(0, 30, size) for _ in range(count))
    usages = tuple(random.integers(0, 20, size) for _ in range(count))
    intervals = tuple((int(a), int(a) + 3) for a in random.integers(0, 3, count))
    edges = tuple((i, j) for i in range(count) for j in range(i + 1, count))
    matrices = tuple(random.integers(0, 60, (size, size)) for _ in edges)
    least = CostNetwork(costs, usages, intervals, edges, matrices).peak([int(u.argmin()) for u in usages])
    most = CostNetwork(costs, usages, intervals, edges, matrices).peak([int(u.argmax()) for u in usages])
    return CostNetwork(costs, usages, intervals, edges, matrices, int(least + (1 - tight) * (most - least)))


def reduced(problem: CostNetwork) -> ReducedNetwork | None:
    try:
        network = ReducedNetwork(problem)
        network.reduce()
    except InfeasiblePlanError:
        return None
    return network if network.costs else None


@pytest.mark.parametrize("tight", [0.0, 0.6, 0.9])
def test_bounds_hold_under_any_prices(tight: float) -> None:
    raised = 0
    for seed in range(8):
        problem = dense(seed, tight=tight)
        best = brute_force(problem)
        network = reduced(problem)
        assert best is not None and network is not None
        passed = trws.Messages(network)
        random = np.random.default_rng(seed)
        first, bound = passed.sweep(), 0.0
        for _ in range(20):
            bound = passed.sweep()
            assert bound <= best + 1e-6
        raised += bound > first
        for _ in range(5):
            places = random.choice(len(network.memory.times), min(3, len(network.memory.times)), replace=False)
            passed.price({int(place): float(random.random() * 10) for place in places})
            for _ in range(3):
                assert passed.sweep() <= best + 1e-6
    assert raised >= 6


def test_a_tree_is_solved_by_messages_alone() -> None:
    random = np.random.default_rng(0)
    edges = tuple((int(random.integers(0, j)), j) for j in range(1, 8))
    costs = tuple(random.integers(0, 50, 3) for _ in range(8))
    matrices = tuple(random.integers(0, 50, (3, 3)) for _ in edges)
    problem = CostNetwork(costs, (np.zeros(3, int),) * 8, ((0, 1),) * 8, edges, matrices)
    passed = trws.Messages(ReducedNetwork(problem))
    for _ in range(20):
        bound = passed.sweep()
    choice = passed.decode()
    assert bound == pytest.approx(brute_force(problem))
    assert problem.cost([choice[node] for node in range(8)]) == brute_force(problem)


def test_decoding_within_memory_keeps_the_limit() -> None:
    over = 0
    for seed in range(12):
        network = reduced(dense(seed, tight=0.8))
        assert network is not None and network.limit is not None
        passed = trws.Messages(network)
        passed.sweep()
        over += bool((network.memory.profile(passed.decode()) > network.limit).any())
        within = passed.decode_within()
        assert within is not None
        assert not (network.memory.profile(within) > network.limit).any()
    assert over >= 6  # else there was nothing to keep


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_small_networks_are_solved(seed: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes all of its time, and finds the best choice; a slow machine needs more."""
    monkeypatch.setattr(trws, "num_cores", lambda: workers)
    problem = dense(seed)
    best = brute_force(problem)
    assert best is not None
    for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        network = reduced(problem)
        assert network is not None
        found = trws.search(network, time.monotonic() + seconds)
        assert found.bound <= best + 1e-6
        if found.choice is not None:
            choice = network.expand(found.choice)
            assert problem.is_allowed([choice[node] for node in sorted(choice)])
            assert best <= found.cost + 1e-6
            if found.cost == best:
                return
    raise AssertionError(f"the best choice costs {best}, the best found {found.cost}")


def test_what_threads_find_is_taken_together() -> None:
    """A part that was solved beside another choice is taken with what has been found since, if that is better."""
    network = reduced(dense(0))
    assert network is not None
    nodes = sorted(network.costs)
    found = trws.search(network, time.monotonic() + 2.0)
    assert found.choice is not None
    best, cost = dict(found.choice), found.cost
    found.choice = {**best, **{node: 1 - min(best[node], 1) for node in nodes[:2]}}
    found.cost = network.cost(found.choice)
    assert found.cost > cost
    neighbourhoods = trws.Neighbourhoods(network, found, {}, 0.0)
    neighbourhoods.take({nodes[0]: best[nodes[0]], nodes[1]: best[nodes[1]]})
    assert found.choice == best and found.cost == cost
    neighbourhoods.take({nodes[0]: 1 - min(best[nodes[0]], 1)})
    assert found.choice == best and found.cost == cost


def test_random_networks_stay_allowed() -> None:
    looked = 0
    for seed in range(60):
        problem = random_network(seed)
        network = reduced(problem)
        if network is None:
            continue
        looked += 1
        best = brute_force(problem)
        found = trws.search(network, time.monotonic() + 0.3)
        if found.choice is None:
            continue
        assert best is not None
        choice = network.expand(found.choice)
        assert problem.is_allowed([choice[node] for node in sorted(choice)])
        assert found.bound <= best * (1 + 1e-9) + 1e-6
        assert problem.cost([choice[node] for node in sorted(choice)]) >= best
    assert looked >= 3


def test_solve_says_that_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = trws.search

    def search(*arguments: Any) -> trws.Found:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(trws, "search", search)
    monkeypatch.setattr(solving, "_PROGRAM_PAIRS", 10)
    monkeypatch.setattr("bactrian.passes.network.lifted_lp.solve_lifted", lambda *_: None)
    problem = dense(3)
    solution = solving.solve(problem, 3.0)
    assert len(seen) == 1
    assert not solution.optimal and problem.is_allowed(solution.choice)
    best = brute_force(problem)
    assert best is not None and solution.bound <= best <= solution.cost == problem.cost(solution.choice)
    assert solution.figures["sweeps"] > 0
