"""Cost networks: the solver against brute force, the reductions one by one, the file format, bad input."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bactrian.driver import cli
from bactrian.passes.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.network.problem import FORBIDDEN, CostNetwork, read_problem
from bactrian.passes.network.reduce import ReducedNetwork
from bactrian.passes.network.solve import solve

STEPS = ("forbid", "contract", "separate", "eliminate", "dominate")


def random_network(seed: int) -> CostNetwork:
    """Up to seven nodes of up to four strategies: forced pairs, forbidden ones, parallel edges, and often a tight limit."""
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
    """The least cost of an allowed choice, None where there is none."""
    choices = itertools.product(*(range(len(costs)) for costs in problem.costs))
    return min((problem.cost(choice) for choice in choices if problem.is_allowed(choice)), default=None)


def check_against_brute_force(seed: int) -> bool:
    problem = random_network(seed)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasiblePlanError, match=r"no choice fits|no strategy left"):
            solve(problem)
        return False
    solution = solve(problem)
    assert (solution.cost, solution.bound, solution.optimal) == (best, best, True)
    assert problem.is_allowed(solution.choice) and problem.cost(solution.choice) == best
    return True


def test_equals_brute_force() -> None:
    solved = sum(check_against_brute_force(seed) for seed in range(250))
    assert 100 < solved < 250, "both kinds should be there"


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
        for step in ("forbid", *steps):
            getattr(network, step)()
        changed += before != (network.num_strategies, len(network.pairs))
        nodes = list(network.costs)
        found = list[float]()
        for values in itertools.product(*(range(len(network.costs[node])) for node in nodes)):
            choice = dict(zip(nodes, values, strict=True))
            whole = network.expand(choice, len(problem.costs))
            if np.isfinite(network.cost(choice)):
                assert network.cost(choice) == problem.cost(whole)
            peak = network.profile(choice).max(initial=0.0)
            if problem.limit is not None:
                assert peak == problem.peak(whole)
            if problem.is_allowed(whole):
                found.append(network.cost(choice))
            assert problem.limit is None or network.least.max(initial=0.0) <= peak
        assert min(found) == best
    assert changed > 20


def test_large_numbers_are_exact() -> None:
    """Differences of 1 beside costs of 10^12, and a total beyond 2^53."""
    big = 10**12
    costs = tuple(np.array([big + 1, big]) for _ in range(9)) + (np.array([2**53, 2**53 + 1]),)
    problem = CostNetwork(costs, tuple(np.zeros(2) for _ in costs), ((0, 0),) * 10, (), ())
    solution = solve(problem)
    assert solution.cost == 9 * big + 2**53
    assert solution.choice == (1,) * 9 + (0,)


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
    assert not problem.is_allowed((1, 1))
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
        (_change("problem", "usage_limit", value=-1), "memory limit is -1"),
    ],
)
def test_bad_problems(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_problem(write(tmp_path / "p.json.gz", data))


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_problem(tmp_path / "missing.json.gz")
    (tmp_path / "broken.json.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(ConfigError, match="cannot read"):
        read_problem(tmp_path / "broken.json.gz")
    for limit in ("0", "-3", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            cli.main(["solve", "p.json", "--time-limit", limit])
    capsys.readouterr()
