"""Large neighbourhood search: small networks are solved, choices keep the limit, and nothing is called proved."""

from __future__ import annotations

import time
from typing import Any

import pytest
from test_network import brute_force, random_network
from test_trws import dense, reduced

from bactrian.passes.network import large_neighbourhood
from bactrian.passes.network import solver as solving


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_small_networks_are_solved(seed: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes all of its time, and finds the best choice; a slow machine needs more."""
    monkeypatch.setattr(large_neighbourhood, "num_cores", lambda: workers)
    problem = dense(seed)
    best = brute_force(problem)
    assert best is not None
    for seconds in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        network = reduced(problem)
        assert network is not None
        found = large_neighbourhood.search(network, time.monotonic() + seconds)
        assert found.lower_bound <= best + 1e-6
        if found.choice is not None:
            choice = network.expand(found.choice)
            assert problem.is_feasible([choice[node] for node in sorted(choice)])
            assert best <= found.cost + 1e-6
            if found.cost == best:
                return
    raise AssertionError(f"the best choice costs {best}, the best found {found.cost}")


def test_what_threads_find_is_taken_together() -> None:
    """A part that was solved beside another choice is taken with what has been found since, if that is better."""
    network = reduced(dense(0))
    assert network is not None
    nodes = sorted(network.costs)
    found = large_neighbourhood.search(network, time.monotonic() + 2.0)
    assert found.choice is not None
    best, cost = dict(found.choice), found.cost
    found.choice = {**best, **{node: 1 - min(best[node], 1) for node in nodes[:2]}}
    found.cost = network.cost(found.choice)
    assert found.cost > cost
    neighbourhoods = large_neighbourhood.NeighbourhoodSearch(network, found, {}, 0.0)
    neighbourhoods.take({nodes[0]: best[nodes[0]], nodes[1]: best[nodes[1]]})
    assert found.choice == best and found.cost == cost
    neighbourhoods.take({nodes[0]: 1 - min(best[nodes[0]], 1)})
    assert found.choice == best and found.cost == cost


def test_choices_of_random_networks_are_feasible() -> None:
    looked = 0
    for seed in range(60):
        problem = random_network(seed)
        network = reduced(problem)
        if network is None:
            continue
        looked += 1
        best = brute_force(problem)
        found = large_neighbourhood.search(network, time.monotonic() + 0.3)
        if found.choice is None:
            continue
        assert best is not None
        choice = network.expand(found.choice)
        assert problem.is_feasible([choice[node] for node in sorted(choice)])
        assert found.lower_bound <= best * (1 + 1e-9) + 1e-6
        assert problem.cost([choice[node] for node in sorted(choice)]) >= best
    assert looked >= 3


def test_solve_says_that_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = large_neighbourhood.search

    def search(*arguments: Any) -> large_neighbourhood.SearchResult:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(large_neighbourhood, "search", search)
    monkeypatch.setattr(solving, "_MOST_PROGRAM_PAIRS", 10)
    monkeypatch.setattr("bactrian.passes.network.lifted_lp.solve_lifted", lambda *_: None)
    problem = dense(3)
    solution = solving.solve(problem, 3.0)
    assert len(seen) == 1
    assert not solution.optimal and problem.is_feasible(solution.choice)
    best = brute_force(problem)
    assert best is not None and solution.lower_bound <= best <= solution.cost == problem.cost(solution.choice)
    assert solution.figures["sweeps"] > 0
