"""Cost networks: the solver against brute force, the reductions one by one, the file format, bad input."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bactrian.driver import cli
from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.network import reductions
from bactrian.passes.network import solver as solving
from bactrian.passes.network.local_search import LocalSearch
from bactrian.passes.network.problem import FORBIDDEN, CostNetwork, read_problem
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.solver import Solved, solve


@pytest.fixture(autouse=True)
def by_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are not solved by tables here (test_bucket_elimination.py)."""
    monkeypatch.setattr(solving, "elimination_order", lambda network: None)


STEPS = ("forbid", "contract", "separate", "drop_program_points", "forbid_by_memory", "eliminate", "dominate")


def in_order(choice: dict[int, int]) -> list[int]:
    """A choice by node as a list."""
    return [choice[node] for node in sorted(choice)]


def random_network(seed: int) -> CostNetwork:
    """Up to seven nodes of up to four strategies; forced, forbidden and parallel pairs; often a tight limit."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5, random.integers(1, 8)).tolist()
    count, top = len(sizes), int(random.choice([3, 30, 10**9]))
    costs = [random.integers(0, top, size) for size in sizes]
    if random.random() < 0.2:
        costs[0][0] = FORBIDDEN
    edges, matrices = list[tuple[int, int]](), list[np.ndarray]()
    for _ in range(int(random.integers(0, 2 * count + 1)) if count > 1 else 0):
        i, j = random.choice(count, 2, replace=False).tolist()
        kind = random.random()
        if kind < 0.25 and sizes[i] == sizes[j]:
            matrix = np.full((sizes[i], sizes[j]), FORBIDDEN)
            matrix[np.arange(sizes[i]), random.permutation(sizes[i])] = random.integers(0, top, sizes[i])
        elif kind < 0.4:
            matrix = random.integers(0, top, (sizes[i], 1)) + random.integers(0, top, (1, sizes[j]))
        else:
            matrix = random.integers(0, top, (sizes[i], sizes[j]))
            matrix[random.random(matrix.shape) < 0.15] = FORBIDDEN
        edges.append((i, j))
        matrices.append(matrix)
    usages = [random.integers(0, 20, size) for size in sizes]
    first = random.integers(0, 6, count)
    intervals = tuple((int(a), int(a + d)) for a, d in zip(first, random.integers(0, 4, count), strict=True))
    limit = None if random.random() < 0.3 else int(random.integers(5, 60))
    return CostNetwork(tuple(costs), tuple(usages), intervals, tuple(edges), tuple(matrices), limit)


def brute_force(problem: CostNetwork) -> int | float | None:
    """The least cost of an allowed choice, None where there is none: of a table with an entry for each choice."""
    count = len(problem.costs)
    shape = tuple(len(costs) for costs in problem.costs)
    allowed, totals = np.ones(shape, bool), np.zeros(shape)

    def spread(values: np.ndarray[Any, Any], *nodes: int) -> np.ndarray:
        """A table of some nodes, given in ascending order, as one of all nodes."""
        return np.expand_dims(values, tuple(node for node in range(count) if node not in nodes))

    tables = [spread(costs, node) for node, costs in enumerate(problem.costs)]
    for (i, j), costs in zip(problem.edges, problem.edge_costs, strict=True):
        tables.append(spread(costs if i < j else costs.T, *sorted((i, j))))
    for table in tables:
        allowed &= table < FORBIDDEN
        totals += table
    if problem.limit is not None:
        for time in {first for first, _ in problem.intervals}:
            alive = [node for node, (first, end) in enumerate(problem.intervals) if first <= time < end]
            held = sum((spread(problem.usages[node], node) for node in alive), np.zeros((1,) * count, int))
            allowed &= held <= problem.limit
    if not allowed.any():
        return None
    # Floating point adds up to within 1e-14 or so: what may be the least is added up exactly.
    totals[~allowed] = np.inf
    least = totals <= totals.min() * (1 + 1e-12) + 1e-9
    return min(problem.cost([int(k) for k in choice]) for choice in np.argwhere(least))


def check_against_brute_force(seed: int) -> bool:
    problem = random_network(seed)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasiblePlanError, match=r"no choice fits|no combination"):
            solve(problem)
        return False
    solution = solve(problem)
    assert (solution.cost, solution.lower_bound, solution.optimal) == (best, best, True)
    assert problem.is_feasible(solution.choice) and problem.cost(solution.choice) == best
    return True


def test_equals_brute_force() -> None:
    # The last two were once a crash and a forbidden choice: nodes whose costs all become infinite while others go.
    solved = sum(check_against_brute_force(seed) for seed in (*range(250), 1671, 2076))
    assert 100 < solved < 250, "both kinds should be there"


def test_an_optimum_is_that_of_a_tighter_network_where_it_fits() -> None:
    used = refused = 0
    for seed in range(60):
        problem = random_network(seed)
        usages = tuple(2 * usages for usages in problem.usages)
        loose = replace(problem, limit=None if seed % 2 or problem.limit is None else 2 * problem.limit)
        other = replace(problem, usages=usages)
        costs = replace(problem, costs=(problem.costs[0] + 1, *problem.costs[1:]))
        try:
            solved, found = Solved(), solve(loose)
        except InfeasiblePlanError:
            continue
        solved.add(loose, found)
        assert solved.find(costs) is None
        assert solved.find(loose) == replace(found, seconds=0.0)
        solved = Solved()
        solved.add(loose, replace(found, optimal=False, lower_bound=0.0))
        assert solved.find(loose) is not None, "equal networks have equal solutions"
        assert loose.limit is None or solved.find(other) is None, "it may not be the best one"
        solved.add(loose, found)
        taken = solved.find(other)
        if taken is None:
            assert not other.is_feasible(found.choice)
            refused += 1
        else:
            assert taken.cost == brute_force(other) and taken.memory == 2 * found.memory
            used += 1
        if problem.limit is not None and loose.limit is None:
            solved = Solved()
            solved.add(other, replace(found, optimal=True))
            assert solved.find(loose) is None, "the limit may have decided"
    assert used and refused


def complete(num_nodes: int, size: int, offset: int, spread: int, seed: int) -> CostNetwork:
    """Every pair of nodes is an edge, and nothing can be reduced: all depends on the integer program."""
    random = np.random.default_rng(seed)
    edges = tuple(itertools.combinations(range(num_nodes), 2))
    costs = tuple(offset + random.integers(0, spread, size) for _ in range(num_nodes))
    matrices = tuple(offset + random.integers(0, spread, (size, size)) for _ in edges)
    return CostNetwork(costs, (np.zeros(size, int),) * num_nodes, ((0, 1),) * num_nodes, edges, matrices)


@pytest.mark.parametrize(("offset", "spread"), [(0, 5), (10**9, 5), (10**11, 50), (10**12, 500), (10**14, 5)])
def test_small_differences_between_large_costs(offset: int, spread: int) -> None:
    for seed in range(8):
        problem = complete(5, 3, offset, spread, seed)
        solution = solve(problem)
        assert (solution.cost, solution.optimal) == (brute_force(problem), True)


@pytest.mark.parametrize("penalty", [10**8, 10**12, 10**14])
def test_one_large_cost_hides_no_small_ones(penalty: int) -> None:
    for seed in range(8):
        problem = complete(5, 3, 0, 90, seed)
        problem.edge_costs[0][seed % 3, 1] = penalty
        solution = solve(problem)
        assert (solution.cost, solution.optimal) == (brute_force(problem), True)


@pytest.mark.parametrize("limit", [0, 1, 40, 80 * 10**9, 640 * 10**9, 10**13])
def test_memory_to_the_byte(limit: int) -> None:
    """Combinations that fit exactly and those that are one too much, at any size."""
    solved = 0
    for seed in range(10):
        problem = complete(4, 3, 0, 20, seed)
        near = np.random.default_rng(seed)
        usages = tuple(limit // 4 + near.integers(0, 4, 3) for _ in range(4))
        problem = CostNetwork(problem.costs, usages, problem.intervals, problem.edges, problem.edge_costs, limit)
        best = brute_force(problem)
        if best is None:
            with pytest.raises(InfeasiblePlanError, match="no choice fits"):
                solve(problem)
        else:
            solution = solve(problem)
            solved += 1
            assert (solution.cost, solution.optimal) == (best, True)
            assert problem.is_feasible(solution.choice)
    assert solved or limit < 2


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize(("num_nodes", "colours"), [(3, 2), (4, 3)])
def test_what_forbidden_pairs_exclude(num_nodes: int, colours: int, limit: int | None) -> None:
    """One colour too few for a complete graph; with one more there is an answer."""
    for more, error in ((0, True), (1, False)):
        problem = complete(num_nodes, colours + more, 0, 9, 1)
        matrices = tuple(np.where(np.eye(len(m), dtype=bool), FORBIDDEN, m) for m in problem.edge_costs)
        problem = CostNetwork(problem.costs, problem.usages, problem.intervals, problem.edges, matrices, limit)
        if error:
            with pytest.raises(InfeasiblePlanError, match="no combination of strategies is allowed"):
                solve(problem)
        else:
            assert solve(problem).cost == brute_force(problem)


def test_what_is_forbidden_is_told_by_each_cost() -> None:
    """Two costs below 10^18 whose sum is above it are allowed; one less than it is."""
    costs = (np.array([6 * 10**17, 10**18]), np.array([6 * 10**17, 7 * 10**17]), np.array([10**18 - 1]))
    usages = tuple(np.zeros(len(c), int) for c in costs)
    solution = solve(CostNetwork(costs, usages, ((0, 0),) * 3, (), ()))
    assert solution.cost == 12 * 10**17 + 10**18 - 1 and solution.choice == (0, 0, 0)


@pytest.mark.parametrize("costs", [[2**54 + 1, 0, 2**54], [0, 2**59, 2**59 + 1]])
def test_sums_that_are_rounded_prove_nothing(costs: list[int]) -> None:
    pair = np.array([[0, 2**55], [1, 2**55 + 1]])
    problem = CostNetwork(
        (np.array(costs), np.array([1, 0])), (np.zeros(3, int), np.zeros(2, int)), ((0, 0),) * 2, (), ()
    )
    assert not solve(problem).optimal
    problem = CostNetwork((np.zeros(2, int),) * 2, (np.zeros(2, int),) * 2, ((0, 0),) * 2, ((0, 1),), (pair,))
    assert not solve(problem).optimal


def test_little_time_gives_an_answer_or_a_clear_error() -> None:
    problem = complete(8, 150, 0, 10**6, 0)
    try:
        solution = solve(problem, time_limit=2.0)
    except ConfigError as error:
        assert "no feasible choice was found in 2 s" in str(error)
    else:
        assert problem.is_feasible(solution.choice) and solution.lower_bound <= solution.cost


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_equals_brute_force_many_times(part: int) -> None:
    for seed in range(1000 + 500 * part, 1500 + 500 * part):
        check_against_brute_force(seed)


@pytest.mark.parametrize("steps", [*((step,) for step in STEPS), STEPS, STEPS[::-1]], ids=" ".join)
def test_each_reduction_keeps_the_optimum(steps: tuple[str, ...]) -> None:
    changed = 0
    for seed in range(120):
        problem = random_network(seed)
        best = brute_force(problem)
        if best is None:
            continue
        network = ReducedNetwork(problem)
        before = network.num_strategies, len(network.pairs)
        for step in steps:
            reductions.forbid(network)  # what is eliminated may forbid more, and comes before dominance
            getattr(reductions, step)(network)
        changed += before != (network.num_strategies, len(network.pairs))
        nodes = list(network.costs)
        found = list[float]()
        for values in itertools.product(*(range(len(network.costs[node])) for node in nodes)):
            choice = dict(zip(nodes, values, strict=True))
            whole = in_order(network.expand(choice))
            if np.isfinite(network.cost(choice)):
                assert network.cost(choice) == problem.cost(whole)
            peak = network.memory.profile(choice).max(initial=0.0)
            if problem.limit is not None:
                real = problem.peak(whole)
                assert peak == real or (peak < real and real <= problem.limit)  # places that can't bind are left out
            if problem.is_feasible(whole):
                found.append(network.cost(choice))
            assert problem.limit is None or network.memory.least.max(initial=0.0) <= peak
        assert min(found) == best
    assert changed > 20


def test_large_numbers_are_exact() -> None:
    """Differences of 1 beside costs of 10^12, and a total beyond 2^53."""
    big = 10**12
    costs = tuple(np.array([big + 1, big]) for _ in range(9)) + (np.array([2**53 + 1, 2**53]),)
    problem = CostNetwork(costs, tuple(np.zeros(2, int) for _ in costs), ((0, 0),) * 10, (), ())
    solution = solve(problem)
    assert solution.cost == 9 * big + 2**53
    assert solution.choice == (1,) * 10 and solution.optimal


def test_the_search_without_proof_finds_allowed_choices() -> None:
    tried = found = 0
    ratios = list[float]()
    for seed in range(150):
        problem = random_network(seed)
        best = brute_force(problem)
        if best is None:
            continue
        network = ReducedNetwork(problem)
        reductions.forbid(network)
        choice = LocalSearch(network).search(time.monotonic() + 10)
        tried += 1
        if choice is not None and problem.is_feasible(whole := in_order(network.expand(choice))):
            found += 1
            assert problem.cost(whole) >= best
            ratios.append(problem.cost(whole) / best if best else 1.0)
    assert found > 0.8 * tried
    assert float(np.median(ratios)) == 1.0


def test_no_time_for_the_program_gives_a_choice_without_proof() -> None:
    """The answer is feasible, its bound is one, and nothing is said to be proved; a busy machine needs more time for it."""
    random = np.random.default_rng(5)
    costs = tuple(random.integers(1, 1000, 6) for _ in range(60))
    edges = tuple((int(i), int(j)) for i, j in (random.choice(60, 2, replace=False) for _ in range(400)))
    matrices = tuple(random.integers(0, 1000, (6, 6)) for _ in edges)
    usages = tuple(random.integers(0, 50, 6) for _ in costs)
    problem = CostNetwork(costs, usages, ((0, 9),) * 60, edges, matrices, 1200)
    for seconds in (6.0, 12.0, 24.0):
        try:
            solution = solve(problem, time_limit=seconds)
            break
        except ConfigError as error:  # no choice yet
            assert "no feasible choice was found" in str(error)
    else:
        pytest.fail("no choice was found in 24 s")
    assert problem.is_feasible(solution.choice)
    assert not solution.optimal
    assert solution.lower_bound < solution.cost


def example() -> dict[str, Any]:
    nodes = {"costs": [[1, 5], [4, 2]], "usages": [[10, 3], [4, 4]], "intervals": [[0, 4], [2, 6]]}
    edges = {"nodes": [[0, 1], [1, 0]], "costs": [[0, 3, 7, 0], [1, 1, 1, FORBIDDEN]]}
    return {"problem": {"name": "example", "nodes": nodes, "edges": edges, "usage_limit": 14}}


def write(path: Path, data: Any) -> Path:
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    return path


def test_the_contests_format(tmp_path: Path) -> None:
    problem = read_problem(write(tmp_path / "p.json.gz", example()))
    # costs: (0,0) 1+4+0+1, (0,1) 1+2+3+1, (1,0) 5+4+7+1, (1,1) is forbidden by the second edge
    assert [problem.cost(choice) for choice in ((0, 0), (0, 1), (1, 0))] == [6, 7, 17]
    assert not problem.is_feasible((1, 1))
    assert [problem.peak(choice) for choice in ((0, 0), (1, 0))] == [14, 7]
    assert solve(problem).choice == (0, 0)
    (tmp_path / "plain.json").write_text(json.dumps(example()))
    assert solve(read_problem(tmp_path / "plain.json")).cost == 6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "p.json.gz", example()))
    assert cli.main(["solve", path, "--time-limit", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cost": 6, "bound": 6.0, "optimal": True, "choice": [0, 0]}
    assert cli.main(["solve", path]) == 0
    shown = capsys.readouterr().out
    assert "proved optimal" in shown and "14 of 14" in shown
    tight = example()
    tight["problem"]["usage_limit"] = 6
    assert cli.main(["solve", str(write(tmp_path / "tight.json.gz", tight))]) == 4
    assert "no choice fits into a memory of 6" in capsys.readouterr().err


def test_integers_beyond_64_bits_are_forbidden(tmp_path: Path) -> None:
    data = _change("problem", "nodes", "costs", 0, value=[2**63 + 5, 3])
    problem = read_problem(write(tmp_path / "p.json.gz", data))
    assert problem.costs[0].tolist() == [FORBIDDEN, 3]
    data = _change("problem", "nodes", "costs", 0, value=[-3, 2**70])
    assert read_problem(write(tmp_path / "p.json.gz", data)).costs[0].tolist() == [-3, FORBIDDEN]


def _change(*path: Any, value: Any) -> Any:
    data = example()
    where: Any = data
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "not a problem in the contest's format"),
        (_change("problem", "edges", "costs", 0, value=[1, 2, 3]), "not a problem in the contest's format"),
        (_change("problem", "edges", "nodes", 0, value=[0, 0]), "edge 0 joins nodes 0 and 0"),
        (_change("problem", "edges", "nodes", 0, value=[0, 5]), "not a problem in the contest's format"),
        (_change("problem", "nodes", "costs", 0, value=[]), "not a problem in the contest's format"),
        (_change("problem", "nodes", "costs", 0, value=["a", "b"]), "not a problem in the contest's format"),
        (_change("problem", "nodes", "usages", 0, value=[1]), "node 0 has 2 costs and 1 usages"),
        (_change("problem", "nodes", "usages", 1, value=[-1, 0]), "node 1 has a negative usage"),
        (_change("problem", "nodes", "costs", 0, value=[1.0, float("nan")]), "costs of node 0 are not all numbers"),
        (_change("problem", "nodes", "intervals", value=[[0, 1]]), "2 nodes have costs, 2 have usages, 1 have"),
        (
            _change("problem", "nodes", "intervals", 0, value=[0, float("inf")]),
            r"problem\.nodes\.intervals\[0\] is \[0, inf\], must be two integers from",
        ),
        (_change("problem", "nodes", "intervals", 0, value=[0, 1.5]), r"is \[0, 1\.5\], must be two integers"),
        (_change("problem", "usage_limit", value=-1), "memory limit is -1"),
        (
            _change("problem", "usage_limit", value="12"),
            "not a problem in the contest's format\n  why: problem.usage_limit is '12', must be a number",
        ),
    ],
)
def test_bad_problems(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_problem(write(tmp_path / "p.json.gz", data))


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_problem(tmp_path / "missing.json.gz")
    whole = write(tmp_path / "whole.json.gz", example()).read_bytes()
    for broken in (b"\x1f\x8bnothing", whole[:40], whole[:20] + b"\xff" * 30 + whole[50:]):
        (tmp_path / "broken.json.gz").write_bytes(broken)
        with pytest.raises(ConfigError, match="cannot read"):
            read_problem(tmp_path / "broken.json.gz")
    for limit in ("0", "-3", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            cli.main(["solve", "p.json", "--time-limit", limit])
    capsys.readouterr()
