"""Tied classes: nodes that look alike take the same strategy. A primal heuristic for networks of repeated layers.

The members of a class (``colour_refinement.py``) are merged into one node, which makes a small network. Its best choice is a
feasible one for the whole network. It gives no lower bound, since ties only exclude choices; but where the whole network is
too large for one integer program, its best shardings are mostly equal in all layers.
"""

from __future__ import annotations

import time

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.colour_refinement import ColourClasses
from bactrian.passes.network.reduced_cost_fixing import solve_by_fixing
from bactrian.passes.network.reduced_network import ReducedNetwork
from bactrian.passes.network.reductions import reduce_network

_RADII = (4, 2)  # the first with few enough classes, and a feasible choice
_WORTH = 0.5  # of the nodes: with more classes, too little is repeated
_MOST_PAIRS = 600_000  # more don't go into one program


def solve_tied(network: ReducedNetwork, deadline: float) -> dict[int, int] | None:
    """A feasible choice, by node of the problem, in which the nodes of a class do the same; None where none is found.

    Args:
        network: reduced.
        deadline: of `time.monotonic`.
    """
    for radius in _RADII:
        classes = ColourClasses.of(network, radius, ())
        if len(classes.first) > _WORTH * len(network.costs):
            continue
        try:
            small = network.tied(classes.of_node)
            reduce_network(small, deadline)
            if not small.costs:
                return network.expand(small.expand({}))
            if small.num_pairs > _MOST_PAIRS:
                continue
            found = solve_by_fixing(small, deadline).choice
        except InfeasiblePlanError:
            continue
        if found is not None:
            return network.expand(found)
        if time.monotonic() > deadline:
            break
    return None
