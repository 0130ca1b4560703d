"""The problem: a pairwise cost network with memory limits at program points, and the contest's file format.

Without the limit it is MAP inference in a pairwise Markov random field, also called a weighted constraint network.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bactrian.passes.frame.errors import ConfigError

FORBIDDEN = 10**18  # in files: a cost from here on forbids the choice

Costs = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class CostNetwork:
    """Choose one strategy for every node, at the least total cost, with memory within the limit at every program point.

    The form of the ASPLOS 2025 / EuroSys 2025 contest on intra-operator parallelism (repository ``google/iopddl``).

    Attributes:
        costs: of each node, the cost of each of its strategies, shape (K_i,); infinite where it is forbidden.
        usages: of each node, the memory of each strategy, shape (K_i,).
        intervals: of each node, ``(first, end)``: its live range: it holds its memory at the program points ``first <= t < end``.
        edges: pairs of different nodes; those that occur more than once add up.
        edge_costs: of each edge (i, j), the cost of each pair, shape (K_i, K_j); infinite where it is forbidden.
        limit: the most memory at any program point; None where memory does not matter.
    """

    costs: tuple[Costs, ...]
    usages: tuple[Costs, ...]
    intervals: tuple[tuple[int, int], ...]
    edges: tuple[tuple[int, int], ...]
    edge_costs: tuple[Costs, ...]
    limit: int | float | None = None

    def __post_init__(self) -> None:
        """Refuse arrays of the wrong shape and costs that are not numbers."""
        count = len(self.costs)
        if not len(self.usages) == len(self.intervals) == count:
            raise ConfigError(
                f"{count} nodes have costs, {len(self.usages)} have usages, {len(self.intervals)} have intervals"
            )
        for node, (costs, usages) in enumerate(zip(self.costs, self.usages, strict=True)):
            _check_values(costs, f"costs of node {node}", infinite=True)
            _check_values(usages, f"usages of node {node}", infinite=False)
            if costs.ndim != 1 or costs.shape != usages.shape or not costs.size:
                raise ConfigError(
                    f"node {node} has {costs.size} costs and {usages.size} usages", fix="give one of each per strategy"
                )
            if usages.min() < 0:
                raise ConfigError(f"node {node} has a negative usage: {usages.min()}")
        if len(self.edges) != len(self.edge_costs):
            raise ConfigError(f"{len(self.edges)} edges have {len(self.edge_costs)} cost matrices")
        for number, ((i, j), costs) in enumerate(zip(self.edges, self.edge_costs, strict=True)):
            if not (0 <= i < count and 0 <= j < count and i != j):
                raise ConfigError(f"edge {number} joins nodes {i} and {j}", why=f"nodes go from 0 to {count - 1}")
            wanted = len(self.costs[i]), len(self.costs[j])
            if costs.shape != wanted:
                raise ConfigError(f"edge {number} has costs of shape {costs.shape}, its nodes need {wanted}")
            _check_values(costs, f"costs of edge {number}", infinite=True)
        if self.limit is not None and not self.limit >= 0:
            raise ConfigError(f"the memory limit is {self.limit}, must not be negative")

    @property
    def num_strategies(self) -> int:
        """Strategies of all nodes together."""
        return sum(map(len, self.costs))

    def cost(self, choice: Sequence[int]) -> int | float:
        """The exact cost of a choice: integers stay integers, whatever their size."""
        parts = [costs[k].item() for costs, k in zip(self.costs, choice, strict=True)]
        parts += [c[choice[i], choice[j]].item() for (i, j), c in zip(self.edges, self.edge_costs, strict=True)]
        return sum(parts) if all(isinstance(part, int) for part in parts) else math.fsum(parts)

    def peak(self, choice: Sequence[int]) -> int | float:
        """The most memory at any program point."""
        change: dict[int, int | float] = {}
        for (first, end), usages, k in zip(self.intervals, self.usages, choice, strict=True):
            if first < end:
                usage = usages[k].item()
                change[first] = change.get(first, 0) + usage
                change[end] = change.get(end, 0) - usage
        held = most = 0
        for time in sorted(change):
            held += change[time]
            most = max(most, held)
        return most

    def least_peak(self) -> int | float:
        """The most memory at any program point if each node takes the strategy with the least: no choice has a lower peak."""
        return self.peak([int(usages.argmin()) for usages in self.usages])

    def restricted(self, node: int, strategies: Sequence[int]) -> CostNetwork:
        """The same problem with only some strategies of a node, numbered as they are listed."""
        kept = list(strategies)
        matrices = list[Costs]()
        for (i, j), costs in zip(self.edges, self.edge_costs, strict=True):
            matrices.append(costs[kept] if i == node else costs[:, kept] if j == node else costs)

        def changed(arrays: tuple[Costs, ...]) -> tuple[Costs, ...]:
            return (*arrays[:node], arrays[node][kept], *arrays[node + 1 :])

        return replace(self, costs=changed(self.costs), usages=changed(self.usages), edge_costs=tuple(matrices))

    def is_feasible(self, choice: Sequence[int]) -> bool:
        """Whether a choice has no forbidden cost and keeps the memory limit."""
        own = all(costs[k] < FORBIDDEN for costs, k in zip(self.costs, choice, strict=True))
        pairs = zip(self.edges, self.edge_costs, strict=True)
        if not own or any(costs[choice[i], choice[j]] >= FORBIDDEN for (i, j), costs in pairs):
            return False
        return self.limit is None or self.peak(choice) <= self.limit


def _check_values(values: Costs, what: str, *, infinite: bool) -> None:
    if values.dtype.kind == "f" and (np.isnan(values).any() or (not infinite and np.isinf(values).any())):
        raise ConfigError(f"the {what} are not all numbers", why="NaN and infinite values can't be compared")
    if values.dtype.kind == "f" and np.isneginf(values).any():
        raise ConfigError(f"the {what} have minus infinity among them")


def read_problem(path: str | Path) -> CostNetwork:
    """Read a problem in the contest's format: JSON, or JSON under gzip.

    ``problem.nodes.costs[i]``, ``.usages[i]``, ``.intervals[i] = [lower, upper]``; ``problem.edges.nodes[e] = [i, j]``,
    ``problem.edges.costs[e]`` row by row; ``problem.usage_limit``. Costs are integers; 10^18 and more forbid.

    Raises:
        ConfigError: the file can't be read or has another form.
    """
    try:
        raw = Path(path).read_bytes()
        data: Any = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"cannot read {path}", why=str(error)) from None
    try:
        problem = data["problem"]
        nodes, edges = problem["nodes"], problem["edges"]
        costs = tuple(_numbers(row, "node") for row in nodes["costs"])
        usages = tuple(_numbers(row, "usage") for row in nodes["usages"])
        intervals = tuple((int(first), int(end)) for first, end in nodes["intervals"])
        pairs = tuple((int(i), int(j)) for i, j in edges["nodes"])
        matrices = tuple(
            _numbers(row, "edge").reshape(len(costs[i]), len(costs[j]))
            for (i, j), row in zip(pairs, edges["costs"], strict=True)
        )
        limit: Any = problem.get("usage_limit")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
            raise ValueError(f"usage_limit is {limit!r}, not a number")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a problem in the contest's format",
            why=f"{type(error).__name__}: {error}",
            fix='it needs {"problem": {"nodes": {"costs", "usages", "intervals"}, "edges": {"nodes", "costs"}, '
            '"usage_limit"}}',
        ) from None
    return CostNetwork(costs, usages, intervals, pairs, matrices, limit)


def _numbers(row: Any, what: str) -> Costs:
    values = np.array(row)
    if values.dtype.kind in "uO" or (values.dtype.kind == "f" and all(isinstance(value, int) for value in row)):
        values = np.array([min(value, FORBIDDEN) for value in row])  # integers that 64 bits don't hold are forbidden
    if values.dtype.kind not in "if" or (values.dtype.kind == "i" and values.dtype.itemsize < 8):
        raise ValueError(f"{what} costs are no numbers of 64 bits: {str(row)[:60]}")
    return values
