"""Message passing: lower bounds hold, trees are solved, decoded choices keep the limit."""

from __future__ import annotations

import numpy as np
import pytest
from test_network import brute_force

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import reduce_network
from bactrian.passes.network.trws import MessagePassing


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
        reduce_network(network)
    except InfeasiblePlanError:
        return None
    return network if network.costs else None


@pytest.mark.parametrize("tight", [0.0, 0.6, 0.9])
def test_bounds_hold_under_any_multipliers(tight: float) -> None:
    raised = 0
    for seed in range(8):
        problem = dense(seed, tight=tight)
        best = brute_force(problem)
        network = reduced(problem)
        assert best is not None and network is not None
        messages = MessagePassing(network)
        random = np.random.default_rng(seed)
        first, bound = messages.sweep(), 0.0
        for _ in range(20):
            bound = messages.sweep()
            assert bound <= best + 1e-6
        raised += bound > first
        for _ in range(5):
            points = random.choice(len(network.memory.times), min(3, len(network.memory.times)), replace=False)
            messages.set_multipliers({int(point): float(random.random() * 10) for point in points})
            for _ in range(3):
                assert messages.sweep() <= best + 1e-6
    assert raised >= 6


def test_a_tree_is_solved_by_messages_alone() -> None:
    random = np.random.default_rng(0)
    edges = tuple((int(random.integers(0, j)), j) for j in range(1, 8))
    costs = tuple(random.integers(0, 50, 3) for _ in range(8))
    matrices = tuple(random.integers(0, 50, (3, 3)) for _ in edges)
    problem = CostNetwork(costs, (np.zeros(3, int),) * 8, ((0, 1),) * 8, edges, matrices)
    messages = MessagePassing(ReducedNetwork(problem))
    for _ in range(20):
        bound = messages.sweep()
    choice = messages.decode()
    assert bound == pytest.approx(brute_force(problem))
    assert problem.cost([choice[node] for node in range(8)]) == brute_force(problem)


def test_decoding_within_memory_keeps_the_limit() -> None:
    over = 0
    for seed in range(12):
        network = reduced(dense(seed, tight=0.8))
        assert network is not None and network.limit is not None
        messages = MessagePassing(network)
        messages.sweep()
        over += bool((network.memory.profile(messages.decode()) > network.limit).any())
        within = messages.decode_within_limit()
        assert within is not None
        assert not (network.memory.profile(within) > network.limit).any()
    assert over >= 6  # else there was nothing to keep
