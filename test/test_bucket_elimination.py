"""Bucket elimination, against brute force and against integer programs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from test_network import brute_force, check_against_brute_force, complete, in_order, random_network

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network import solver as solving
from bactrian.passes.network.bucket_elimination import elimination_order, solve_by_elimination
from bactrian.passes.network.problem import FORBIDDEN, CostNetwork
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import forbid
from bactrian.passes.network.solver import solve


def network_of(sizes: list[int], edges: list[tuple[int, int]], seed: int, top: float = 100) -> CostNetwork:
    random = np.random.default_rng(seed)
    costs = tuple(random.integers(0, top, size) for size in sizes)
    matrices = tuple(random.integers(0, top, (sizes[i], sizes[j])) for i, j in edges)
    return CostNetwork(
        costs, tuple(np.zeros(size, int) for size in sizes), ((0, 1),) * len(sizes), tuple(edges), matrices
    )


def ladder(length: int, width: int, size: int, seed: int) -> CostNetwork:
    """Rungs of so many nodes, each joined with all of the rung and of the next."""
    rungs = [range(width * at, width * (at + 1)) for at in range(length)]
    edges = [pair for rung in rungs for pair in itertools.combinations(rung, 2)]
    edges += [pair for one, other in itertools.pairwise(rungs) for pair in itertools.product(one, other)]
    return network_of([size] * (length * width), edges, seed)


def unreduced(problem: CostNetwork) -> ReducedNetwork:
    network = ReducedNetwork(problem)
    forbid(network)
    return network


def test_equals_brute_force() -> None:
    assert sum(check_against_brute_force(seed) for seed in range(250, 500)) > 100


def test_tables_alone_equal_brute_force() -> None:
    """Without any reduction before."""
    for seed in range(60):
        problem = (
            complete(4, 3, 0, 9, seed)
            if seed % 2
            else network_of([3, 2, 4, 3, 2], [(0, 1), (1, 3), (0, 4), (2, 3)], seed)
        )
        network = ReducedNetwork(problem)
        order = elimination_order(network)
        assert order is not None and sorted(order) == sorted(network.costs)
        choice = solve_by_elimination(network, order)
        assert choice is not None and problem.cost(in_order(choice)) == brute_force(problem)


def test_a_long_ladder_is_proved() -> None:
    """An integer program of it has a gap after a minute."""
    found = solve(ladder(40, 2, 5, seed=0), 20.0)
    assert found.optimal and found.cost == 7906


def test_equals_integer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ladder(8, 2, 4, seed=0)
    found = solve(problem)
    assert found.optimal and found.cost == problem.cost(found.choice)
    monkeypatch.setattr(solving, "elimination_order", lambda network: None)
    assert solve(problem).cost == found.cost


def test_the_order_knows_what_it_takes() -> None:
    chain = unreduced(network_of([10] * 50, list(itertools.pairwise(range(50))), seed=1))
    assert elimination_order(chain, most_entries=101) is not None
    assert elimination_order(chain, most_entries=99) is None
    assert elimination_order(chain, most_work=1000) is None
    clique = unreduced(complete(6, 10, 0, 9, seed=0))
    assert elimination_order(clique, most_entries=10**5) is None
    assert elimination_order(clique, most_entries=1.01e6) is not None


def test_nothing_is_feasible() -> None:
    forbidden = np.full((2, 2), FORBIDDEN)
    own = (np.zeros(2, int),) * 3
    clash = np.array([[0, FORBIDDEN], [FORBIDDEN, 0]])
    problem = CostNetwork(own, own, ((0, 1),) * 3, ((0, 1), (1, 2), (0, 2)), (clash, clash, forbidden - clash))
    network = ReducedNetwork(problem)
    order = elimination_order(network)
    assert order is not None and solve_by_elimination(network, order) is None
    with pytest.raises(InfeasiblePlanError, match="no combination"):
        solve(problem)


def test_a_limit_that_does_not_bind_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that hold memory cannot be eliminated; if the answer without the limit keeps it, nothing costs less."""
    problem = ladder(12, 2, 4, seed=3)
    usages = tuple(np.arange(4) for _ in problem.costs)
    limited = CostNetwork(problem.costs, usages, problem.intervals, problem.edges, problem.edge_costs, 3 * 24)
    monkeypatch.setattr("bactrian.passes.network.lifted_lp.solve_lifted", _not_called)
    assert solve(limited).cost == solve(problem).cost


def _not_called(*arguments: Any) -> None:
    raise AssertionError("a program was built")


def test_of_equal_costs_the_first_is_taken() -> None:
    problem = network_of([4] * 6, [(i, j) for i, j in itertools.combinations(range(6), 2)], seed=0, top=1)
    network = ReducedNetwork(problem)
    order = elimination_order(network)
    assert order is not None
    assert set((solve_by_elimination(network, order) or {}).values()) == {0}


def test_networks_are_read_as_they_are() -> None:
    """The order depends on sizes and edges, not on how sets are laid out in memory."""
    orders = {tuple(elimination_order(ReducedNetwork(random_network(seed))) or ()) for seed in [7] * 5}
    assert len(orders) == 1
