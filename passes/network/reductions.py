"""Exact reductions of a cost network: what is left has the same optimum.

Each reduction is a known one:

* arc consistency: a strategy without an allowed partner on some edge goes (`forbid`);
* the same for memory: a strategy that does not fit beside the leanest ones of all other nodes goes (`forbid_by_memory`), and
  so do program points at which the limit can't bind (`drop_program_points`);
* contraction of edges that force a bijection between the strategies of their ends (`contract`);
* edges that are the sum of a row and a column become costs of their ends (`separate`);
* min-plus elimination of nodes with at most two neighbours, a step of bucket elimination (`eliminate`);
* dominance: Goldstein's dead-end elimination (1994), here with memory (`dominate`);
* the least cost of each node and edge goes to the constant (`normalise`).

``ReducedNetwork.expand`` leads from a choice of what is left to one of the whole problem.
"""

from __future__ import annotations

import itertools
import time
from typing import TypeVar

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network import reduction_kernels
from bactrian.passes.network.hash_consing import Array
from bactrian.passes.network.reduced_network import ReducedNetwork, no_allowed_strategy

_MOST_PAIRS = 4096  # entries of an edge that an elimination may make
_ROUNDS_OF_POINTS = 2  # of all reductions, in which program points are left out; later ones leave out few
_MOST_DOMINANCE = 300  # strategies of a node for which dominance is looked at: the test is cubic

_Key = TypeVar("_Key", int, tuple[int, int])  # a node or an edge


def reduce_network(network: ReducedNetwork, deadline: float = float("inf")) -> None:
    """All reductions, until nothing changes or the deadline (`time.monotonic`): what is left is equal at any time.

    Raises:
        InfeasiblePlanError: no choice is allowed.
    """
    contract(network)  # mostly leaves little to look at
    forbid(network)
    contract(network)
    for number in itertools.count():
        before = len(network.costs), network.num_strategies, len(network.pairs)
        forbid(network)
        if number < _ROUNDS_OF_POINTS:
            drop_program_points(network)
        forbid_by_memory(network)
        separate(network)
        eliminate(network)
        forbid(network)
        dominate(network, deadline)
        normalise(network)
        if before == (len(network.costs), network.num_strategies, len(network.pairs)) or time.monotonic() > deadline:
            return


def forbid(network: ReducedNetwork) -> None:
    """Drop strategies without a finite partner on some edge (arc consistency).

    Raises:
        InfeasiblePlanError: a node has no other strategies.
    """
    todo = reduction_kernels.Queue(network.costs)
    while todo:
        node = todo.take()
        around = _around(network, node)
        keep = network.arrays.cached("possible", reduction_kernels.possible, network.costs[node], *around)
        if keep is not None:
            if not len(keep):
                raise no_allowed_strategy(node)
            network.restrict(node, keep)
            todo.add(network.neighbours[node])


def drop_program_points(network: ReducedNetwork) -> None:
    """Look at memory only where it can exceed the limit; if it never can, there is no limit any more."""
    if network.limit is None:
        return
    network.memory.drop_points(network.limit)
    if not network.memory.times:
        network.limit = None


def forbid_by_memory(network: ReducedNetwork) -> None:
    """Drop strategies that don't fit even if every other node takes its leanest one.

    Raises:
        InfeasiblePlanError: not even the leanest strategies fit; the message says how much is missing.
    """
    if network.limit is None:
        return
    slack = network.limit - network.memory.least
    if slack.min() < 0:
        raise InfeasiblePlanError(
            f"no choice fits into a memory of {network.limit:,}",
            why=f"at the worst time even the leanest strategies need {-slack.min():,.0f} more",
            fix="raise the limit, or allow strategies that use less memory",
        )
    for node in list(network.memory.nodes):
        keep = network.memory.fitting(node, slack)
        if not keep.any():
            raise InfeasiblePlanError(
                f"no choice fits into a memory of {network.limit:,}",
                why=f"each strategy of node {node} is too much at some time, whatever the other nodes choose",
                fix="raise the limit, or allow strategies that use less memory",
            )
        if not keep.all():
            network.restrict(node, np.flatnonzero(keep))


def contract(network: ReducedNetwork) -> None:
    """Merge the ends of edges on which each strategy goes with exactly one of the other end."""
    todo = reduction_kernels.Queue(network.pairs)
    while todo:
        i, j = todo.take()
        if (i, j) not in network.pairs:
            continue
        if len(network.neighbours[i]) < len(network.neighbours[j]):
            i, j = j, i  # the one with fewer neighbours goes
        partner = network.arrays.cached("partners", reduction_kernels.partners, network.matrix(i, j))
        if partner is not None:
            near = [other for other in network.neighbours[j] if other != i]
            network.merge(i, j, network.arrays.unique(partner))
            todo.add((min(i, other), max(i, other)) for other in near)


def separate(network: ReducedNetwork) -> None:
    """Give edges that are sums of a row and a column to their ends."""
    arrays = network.arrays
    for i, j in list(network.pairs):
        parts = arrays.cached("separated", reduction_kernels.separated, network.pairs[i, j], int(network.whole))
        if parts is not None:
            for node, part in zip((i, j), parts, strict=True):
                network.add_costs(node, arrays.unique(part))
            network.drop_pair(i, j)


def eliminate(network: ReducedNetwork) -> None:
    """Decide nodes that hold no memory of their own and have at most two neighbours, as functions of these.

    A node with two neighbours stays where the matrix between these would have more entries than it saves.

    Raises:
        InfeasiblePlanError: a node is left with forbidden strategies only.
    """
    todo = reduction_kernels.Queue(network.costs)
    while todo:
        node = todo.take()
        if node not in network.costs:
            continue
        if len(network.costs[node]) == 1:
            near = list(network.neighbours[node])
            network.decide(node)
            todo.add(near)
            continue
        near = sorted(network.neighbours[node])
        if node in network.memory.nodes or len(near) > 2:
            continue
        if len(near) == 2:
            made = len(network.costs[near[0]]) * len(network.costs[near[1]])
            paid = network.matrix(node, near[0]).size + network.matrix(node, near[1]).size
            if made > max(paid, 64) and (made > _MOST_PAIRS or tuple(near) not in network.pairs):
                continue
        network.eliminate(node, near)
        todo.add(near)


def dominate(network: ReducedNetwork, deadline: float = float("inf")) -> None:
    """Drop strategies that another one of the same node can always replace, at no more cost and memory.

    Args:
        network: is changed.
        deadline: of `time.monotonic`; what was dropped until then stays dropped.
    """
    todo = reduction_kernels.Queue(network.costs)
    while todo and time.monotonic() < deadline:
        node = todo.take()
        keep = _undominated(network, node)
        if keep is not None:
            network.restrict(node, keep)
            todo.add(network.neighbours[node])


def _undominated(network: ReducedNetwork, node: int) -> Array | None:
    costs, arrays = network.costs[node], network.arrays
    if not 1 < len(costs) <= _MOST_DOMINANCE:
        return None
    usages = [arrays.unique(usage) for usage in network.memory.usages(node)]
    around = _around(network, node)
    return arrays.cached("undominated", reduction_kernels.undominated, len(usages), costs, *usages, *around)


def _around(network: ReducedNetwork, node: int) -> list[Array]:
    """The matrices to a node's neighbours, in an order that is equal where they are."""
    found = [network.matrix(node, other) for other in network.neighbours[node]]
    return sorted(found, key=network.arrays.number) if len(found) > 1 else found


def normalise(network: ReducedNetwork) -> None:
    """Take the least cost of every node and edge to the constant: what is left is what a choice can save."""
    _take_least(network, network.costs)
    _take_least(network, network.pairs)


def _take_least(network: ReducedNetwork, table: dict[_Key, Array]) -> None:
    for key, values in table.items():
        least = network.arrays.cached("least", reduction_kernels.least, values)
        network.constant += least
        if least:
            table[key] = network.arrays.apply("above least", reduction_kernels.above_least, values)
