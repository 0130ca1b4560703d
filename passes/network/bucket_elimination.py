"""Bucket elimination: exact solution of networks that are nearly trees, without a memory limit.

Nodes are eliminated one after the other. A node goes when what its neighbours choose says what it should choose: the sum of all tables that it is in, with its least
entry for each choice of the others, is a table of these (nonserial dynamic programming, Bertele and Brioschi 1972; bucket
elimination, Dechter 1999). The order is greedy: the smallest table next. What that takes is known beforehand: the product of the numbers of strategies of the node and its
neighbours of that time. Steps of deep programs are often a few nodes wide, however long they are.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.reduced_network import ReducedNetwork

MOST_ENTRIES = 20_000_000
"""Of one table, while it is there."""
MOST_WORK = 300_000_000
"""Entries of all tables: what takes a few seconds."""
_MOST_NODES_OF_A_TABLE = 30  # numpy has tables of up to 32 dims


@dataclass(frozen=True)
class _CostTable:
    """Costs by the strategies of some nodes, in ascending order."""

    nodes: tuple[int, ...]
    costs: Array


def elimination_order(
    network: ReducedNetwork, most_entries: float = MOST_ENTRIES, most_work: float = MOST_WORK
) -> list[int] | None:
    """The order in which each node is eliminated with the smallest table of that time; None where tables get too large."""
    width = {node: math.log(max(1, len(costs))) for node, costs in network.costs.items()}
    near = {node: set(network.neighbours[node]) for node in network.costs}

    def log_entries(node: int) -> float:
        return width[node] + sum(width[other] for other in sorted(near[node]))  # sums of floats depend on their order

    size = {node: log_entries(node) for node in near}
    heap = [(entries, node) for node, entries in size.items()]
    heapq.heapify(heap)
    order, work = list[int](), 0.0
    while heap:
        entries, node = heapq.heappop(heap)
        if node not in near or size[node] != entries:
            continue
        work += math.exp(entries)
        if entries > math.log(most_entries) or work > most_work or len(near[node]) >= _MOST_NODES_OF_A_TABLE:
            return None
        others = near.pop(node)
        order.append(node)
        for other in others:
            near[other] |= others
            near[other] -= {node, other}
        for other in sorted(others):
            size[other] = log_entries(other)
            heapq.heappush(heap, (size[other], other))
    return order


def solve_by_elimination(network: ReducedNetwork, order: Sequence[int]) -> dict[int, int] | None:
    """The cheapest choice for a network without a memory limit; None where every one is forbidden.

    Args:
        network: whose ``limit`` is None.
        order: of `elimination_order`.


    Of equally cheap strategies the first one is taken, from the last eliminated node to the first.
    """
    assert network.limit is None
    tables: dict[int, list[_CostTable]] = {node: [_CostTable((node,), costs)] for node, costs in network.costs.items()}
    for (i, j), costs in network.pairs.items():
        table = _CostTable((i, j), costs)
        tables[i].append(table)
        tables[j].append(table)
    best = list[tuple[int, tuple[int, ...], Array]]()  # a node, the others of its tables, its best choice by theirs
    for node in order:
        own = tables.pop(node)
        nodes = tuple(sorted({each for table in own for each in table.nodes}))
        at = nodes.index(node)
        total = np.zeros([len(network.costs[each]) for each in nodes])
        for table in own:
            shape = [len(network.costs[each]) if each in table.nodes else 1 for each in nodes]
            total += table.costs.reshape(shape)
        others = nodes[:at] + nodes[at + 1 :]
        chosen = total.argmin(axis=at)
        best.append((node, others, chosen.astype(np.int32)))
        made = _CostTable(others, np.take_along_axis(total, np.expand_dims(chosen, at), at).squeeze(at))
        for other in others:
            tables[other] = [table for table in tables[other] if node not in table.nodes]
            tables[other].append(made)
        if not others and not np.isfinite(made.costs):
            return None
    choice = dict[int, int]()
    for node, others, chosen in reversed(best):
        choice[node] = int(chosen[tuple(choice[other] for other in others)])
    return choice
