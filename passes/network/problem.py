"""The problem: a pairwise cost network with memory limits at program points, and the contest's file format.

Without the limit it is MAP inference in a pairwise Markov random field, also called a weighted constraint network.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.fields import brief

FORBIDDEN = 10**18  # in files: a cost from here on forbids the choice
_MAX_TIME = 1 << 62  # of intervals

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

    @cached_property
    def costs_digest(self) -> bytes:
        """Equal for networks that differ in memory alone: in usages, live ranges and the limit."""
        made = hashlib.sha256()
        for array in (np.array(self.edges, np.int64), *self.costs, *self.edge_costs):
            made.update(f"{array.dtype.str}{array.shape}".encode())
            made.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        return made.digest()

    def is_tighter_than(self, other: CostNetwork) -> bool:
        """Whether another network of equal costs allows every choice that this one allows, as its memory shows at once."""
        if self.intervals != other.intervals or (other.limit is not None and self.limit is None):
            return False
        if self.limit is not None and other.limit is not None and self.limit > other.limit:
            return False
        pairs = zip(self.usages, other.usages, strict=True)
        return other.limit is None or all(bool((own >= others).all()) for own, others in pairs)

    def cost(self, choice: Sequence[int]) -> int | float:
        """The exact cost of a choice: integers stay integers, whatever their size."""
        parts = [costs[k].item() for costs, k in zip(self.costs, choice, strict=True)]
        parts += [c[choice[i], choice[j]].item() for (i, j), c in zip(self.edges, self.edge_costs, strict=True)]
        return sum(parts) if all(isinstance(part, int) for part in parts) else math.fsum(parts)

    def peak(self, choice: Sequence[int]) -> int | float:
        """The most memory at any program point."""
        return max((held for _, held in self._profile(choice)), default=0)

    def fullest(self, choice: Sequence[int]) -> tuple[int, ...]:
        """The first program point with the most memory; nothing where no node holds any."""
        return max(self._profile(choice), key=lambda each: each[1], default=())[:1]

    def _profile(self, choice: Sequence[int]) -> Iterator[tuple[int, int | float]]:
        """Program points at which memory changes, in order, and what is held from there on."""
        change: dict[int, int | float] = {}
        for (first, end), usages, k in zip(self.intervals, self.usages, choice, strict=True):
            if first < end:
                usage = usages[k].item()
                change[first] = change.get(first, 0) + usage
                change[end] = change.get(end, 0) - usage
        held = 0
        for time in sorted(change):
            held += change[time]
            yield time, held

    def least_peak(self) -> int | float:
        """The most memory at any program point if each node takes the strategy with the least: no choice has a lower peak."""
        return self.peak(self.leanest())

    def leanest(self) -> list[int]:
        """The strategy of each node with the least memory."""
        return [int(usages.argmin()) for usages in self.usages]

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
    except RecursionError:
        raise ConfigError(f"cannot read {path}", why="its lists are nested too deeply") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"cannot read {path}", why=str(error)) from None
    try:
        return _problem_of(data)
    except _WrongField as error:
        raise ConfigError(
            f"{path} is not a problem in the contest's format",
            why=str(error),
            fix='it needs {"problem": {"nodes": {"costs", "usages", "intervals"}, "edges": {"nodes", "costs"}, '
            '"usage_limit"}}',
        ) from None


class _WrongField(ValueError):
    """A field of a problem is missing, or is not what it must be."""

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field} is {brief(value)}, must be {allowed}")


def _problem_of(data: Any) -> CostNetwork:
    """The problem of what JSON has, field by field."""
    nodes, edges = ("problem", "nodes"), ("problem", "edges")
    costs, usages = (
        tuple(_numbers(row, f"problem.nodes.{name}", i) for i, row in enumerate(_list(data, *nodes, name)))
        for name in ("costs", "usages")
    )
    intervals = _pairs(data, *nodes, "intervals", least=-_MAX_TIME, most=_MAX_TIME)
    pairs = _pairs(data, *edges, "nodes", least=0, most=len(costs) - 1)
    rows = _list(data, *edges, "costs")
    if len(rows) != len(pairs):
        raise _WrongField("problem.edges.costs", rows, f"a list for each of {len(pairs)} edges")
    matrices = list[Costs]()
    for number, ((i, j), row) in enumerate(zip(pairs, rows, strict=True)):
        values, first, second = _numbers(row, "problem.edges.costs", number), len(costs[i]), len(costs[j])
        if values.size != first * second:
            allowed = f"{first} times {second} numbers, as many as pairs of strategies"
            raise _WrongField(f"problem.edges.costs[{number}]", row, allowed)
        matrices.append(values.reshape(first, second))
    limit = _object(data, "problem").get("usage_limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
        raise _WrongField("problem.usage_limit", limit, "a number")
    return CostNetwork(costs, usages, intervals, pairs, tuple(matrices), limit)


def _object(data: Any, *path: str) -> dict[str, Any]:
    """The object at a path of keys."""
    for depth in range(len(path) + 1):
        if not isinstance(data, dict):
            raise _WrongField(".".join(path[:depth]) or "the file", data, "an object")
        if depth < len(path):
            data = cast(dict[str, Any], data).get(path[depth])
    return cast(dict[str, Any], data)


def _list(data: Any, *path: str) -> list[Any]:
    value = _object(data, *path[:-1]).get(path[-1])
    if not isinstance(value, list):
        raise _WrongField(".".join(path), value, "a list")
    return cast(list[Any], value)


def _pairs(data: Any, *path: str, least: int, most: int) -> tuple[tuple[int, int], ...]:
    """A list of pairs of integers."""
    found = list[tuple[int, int]]()
    for number, row in enumerate(_list(data, *path)):
        first, second = cast(list[Any], row) if isinstance(row, list) and len(row) == 2 else (None, None)
        if (
            type(first) is not int
            or type(second) is not int
            or not (least <= first <= most and least <= second <= most)
        ):
            raise _WrongField(f"{'.'.join(path)}[{number}]", row, f"two integers from {least} to {most}")
        found.append((first, second))
    return tuple(found)


def _numbers(row: Any, field: str, number: int) -> Costs:
    """A list of numbers, the one with that number of a field. Integers that 64 bits don't hold are `FORBIDDEN`."""
    if isinstance(row, list) and row:
        try:
            values = np.array(row)
            if values.dtype.kind in "uO" or (values.dtype.kind == "f" and all(isinstance(value, int) for value in row)):
                values = np.array([min(value, FORBIDDEN) for value in row])
            if values.ndim == 1 and values.dtype.kind in "if" and values.dtype.itemsize == 8:
                return values
        except (
            TypeError,
            ValueError,
            OverflowError,
        ):  # lists of lists, texts, integers that no float holds beside floats
            pass
    raise _WrongField(f"{field}[{number}]", row, "a list of numbers of 64 bits")
