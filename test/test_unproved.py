"""Where the solver has no proof in time, the plan is no worse than any baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bactrian
from bactrian.passes import solve_shardings
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.network import solver
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.network.solver import Solution, solve
from bactrian.passes.sharding.baselines import BASELINES

CLUSTER = """
hosts = 1
devices_per_host = 8
memory_gib = {}
intra_host_gb_per_s = 10
intra_host_latency_us = 1
peak_tflops = {{ f32 = 0.05 }}
"""
WEIGHTS = [jax.ShapeDtypeStruct((256, 256), "float32")] * 3
X = jax.ShapeDtypeStruct((512, 256), "float32")


def sharding(tmp_path: Path, compare: bool, mebibytes: float = 64) -> Any:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER.format(mebibytes / 1024))

    def loss(weights: Any, x: Any) -> Any:
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x**2)

    @bactrian.parallelize(mesh="data=2,model=4", num_stages=1, cluster=str(path))
    def step(weights: Any, x: Any) -> Any:
        value, gradients = bactrian.value_and_grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - g, weights, gradients), value

    return step.trace(WEIGHTS, X).plan(compare=compare).plan.stages[0].sharding


def everything_whole(problem: CostNetwork, time_limit: float = 60.0, tolerance: float = 0.0) -> Solution:
    """The first strategy of each node: all devices do everything."""
    choice = (0,) * len(problem.costs)
    return Solution(choice, problem.cost(choice), 0.0, False, problem.peak(choice), 0.0, {})


def nothing(problem: CostNetwork, time_limit: float = 60.0, tolerance: float = 0.0) -> Solution:
    raise ConfigError("no feasible choice was found")


def answer_with(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the solver."""
    for module in (solver, solve_shardings):
        monkeypatch.setattr(module, "solve", answer)


@pytest.mark.parametrize("answer", [everything_whole, nothing])
@pytest.mark.parametrize("compare", [False, True], ids=["alone", "compared"])
def test_the_best_baseline_is_taken(
    answer: Any, compare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = min(row.seconds for row in sharding(tmp_path, compare=True).compared)
    answer_with(answer, monkeypatch)
    found = sharding(tmp_path, compare)
    assert found.seconds == pytest.approx(best, rel=1e-9)
    assert found.bound_seconds == 0.0  # nothing is proved by that


def test_a_better_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimal = sharding(tmp_path, compare=False)
    assert optimal.bound_seconds == optimal.seconds

    def unproved(problem: CostNetwork, time_limit: float = 60.0, tolerance: float = 0.0) -> Solution:
        found = solve(problem, time_limit)
        return Solution(found.choice, found.cost, 0.9 * float(found.cost), False, found.memory, 0.0, {})

    answer_with(unproved, monkeypatch)
    found = sharding(tmp_path, compare=False)
    assert found.seconds == optimal.seconds and found.bound_seconds == pytest.approx(0.9 * optimal.seconds)


def test_nothing_found_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(nothing, monkeypatch)
    monkeypatch.setattr(solve_shardings, "solve_baseline", lambda *arguments: None)
    with pytest.raises(ConfigError, match="no feasible choice was found"):
        sharding(tmp_path, compare=False)


def test_the_baselines_take_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = list[float]()

    def solve_baseline(*arguments: Any) -> None:
        limits.append(arguments[-1])

    given = list[float]()

    def unproved(problem: CostNetwork, time_limit: float = 60.0, tolerance: float = 0.0) -> Solution:
        given.append(time_limit)
        return everything_whole(problem)

    answer_with(unproved, monkeypatch)
    monkeypatch.setattr(solve_shardings, "solve_baseline", solve_baseline)
    sharding(tmp_path, compare=False)
    assert len(given) == 1 and len(limits) == len(BASELINES) + 1  # one more, since the whole work is repeated
    assert sum(limits) <= 0.2 * given[0] * (1 + 1e-9)


def test_large_networks_are_solved_to_half_a_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is so near to the bound is taken as it is: no baseline is solved beside it."""
    exact, asked = sharding(tmp_path, compare=False), list[float]()

    def nearly(problem: CostNetwork, time_limit: float = 60.0, tolerance: float = 0.0) -> Solution:
        asked.append(tolerance)
        found = solve(problem, time_limit)
        return replace(found, optimal=False, lower_bound=found.cost * (1 - tolerance))

    answer_with(nearly, monkeypatch)
    monkeypatch.setattr(solve_shardings, "_MOST_STRATEGIES", 0)
    monkeypatch.delattr(solve_shardings, "no_worse_than_baselines")
    large = sharding(tmp_path, compare=False)
    assert asked == [0.005]
    assert large.seconds == exact.seconds and not large.is_optimal
    assert large.bound_seconds == pytest.approx(0.995 * large.seconds)
