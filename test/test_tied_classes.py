"""Nodes that look alike do the same: the best of such choices, and never a worse answer than without them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.colour_refinement import ColourClasses
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import reduce_network
from bactrian.passes.network.tied_classes import solve_tied


def ring(seed: int, count: int = 12, tight: bool = False) -> CostNetwork:
    """A ring of two kinds of nodes in turn, each kind with one table of costs, and edges of two kinds."""
    random = np.random.default_rng(seed)
    own = [random.integers(0, 20, 3) for _ in "ab"]
    use = [random.integers(1, 9, 3) for _ in "ab"]
    onward = [random.integers(0, 20, (3, 3)) for _ in "ab"]
    costs, usages = tuple(own[n % 2] for n in range(count)), tuple(use[n % 2] for n in range(count))
    edges = tuple((n, (n + 1) % count) for n in range(count))
    matrices = tuple(onward[n % 2] for n in range(count))
    intervals = tuple((n, count + 1) for n in range(count))
    limit = int((random.integers(0, 3) + sum(u.min() for u in usages)) if tight else sum(u.max() for u in usages))
    return CostNetwork(costs, usages, intervals, edges, matrices, limit)


def best_tied(problem: CostNetwork) -> int | float | None:
    """All choices in which nodes of a kind do the same."""
    count = len(problem.costs) // 2
    choices = [[*pair] * count for pair in itertools.product(range(3), repeat=2)]
    return min((problem.cost(choice) for choice in choices if problem.is_feasible(choice)), default=None)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_choice_in_which_all_of_a_kind_do_the_same(seed: int, tight: bool) -> None:
    problem = ring(seed, tight=tight)
    network = ReducedNetwork(problem)
    assert len(ColourClasses.of(network, 4, ()).first) == 2
    before = network.num_strategies
    found = solve_tied(network, time.monotonic() + 60)
    best = best_tied(problem)
    if best is None:
        assert found is None
    else:
        assert found is not None
        choice = [found[node] for node in range(len(problem.costs))]
        assert problem.is_feasible(choice) and problem.cost(choice) == best
    assert network.num_strategies == before  # a copy was tied


def test_nothing_is_tied_where_little_is_repeated() -> None:
    random = np.random.default_rng(0)
    costs = tuple(random.integers(0, 20, 3) for _ in range(6))
    edges = tuple((n, n + 1) for n in range(5))
    matrices = tuple(random.integers(0, 20, (3, 3)) for _ in edges)
    problem = CostNetwork(costs, costs, ((0, 1),) * 6, edges, matrices, 1000)
    assert solve_tied(ReducedNetwork(problem), time.monotonic() + 60) is None


def test_nodes_of_a_class_that_are_neighbours() -> None:
    """What an edge inside a class costs is paid by the class; what it forbids, the class may not do."""
    costs = (np.array([0, 1, 2]),) * 4
    same = np.array([[100, 0, 0], [0, 10**18, 0], [0, 0, 1]])
    edges = tuple(itertools.combinations(range(4), 2))
    problem = CostNetwork(costs, costs, ((0, 1),) * 4, edges, (same,) * 6, 100)
    found = solve_tied(ReducedNetwork(problem), time.monotonic() + 60)
    assert found == dict.fromkeys(range(4), 2)


def test_what_no_class_can_do_is_no_error() -> None:
    costs = (np.array([0, 1]),) * 4
    other = np.array([[10**18, 0], [0, 10**18]])
    edges = ((0, 1), (1, 2), (2, 3), (0, 3))
    problem = CostNetwork(costs, costs, ((0, 1),) * 4, edges, (other,) * 4, 100)
    network = ReducedNetwork(problem)
    with pytest.raises(InfeasiblePlanError):
        reduce_network(network.tied(dict.fromkeys(range(4), 0)))
    assert solve_tied(network, time.monotonic() + 60) is None
