"""Repeated layers that do the same: a small network, whose best choice is a good one for the whole.

Members of a class (``classes.py``) take one strategy. That is a restriction and bounds nothing; but where the whole network is
too large for one program, its best layouts mostly are equal in all layers, and this one goes into a program.
"""

from __future__ import annotations

import time

from bactrian.passes.frame.errors import InfeasiblePlanError
from bactrian.passes.network.colour_refinement import Classes
from bactrian.passes.network.reduced_cost_fixing import solve_narrowing
from bactrian.passes.network.reductions import ReducedNetwork

_RADII = (4, 2)  # the first with few enough classes, and a choice that is allowed
_WORTH = 0.5  # of the nodes: with more classes, too little is repeated
_MOST_PAIRS = 600_000  # more don't go into one program


def solve_tied(network: ReducedNetwork, deadline: float) -> dict[int, int] | None:
    """A choice, by node of the problem, in which nodes that look alike do the same; None where none is found.

    Args:
        network: reduced.
        deadline: of `time.monotonic`.
    """
    for radius in _RADII:
        classes = Classes.of(network, radius, ())
        if len(classes.first) > _WORTH * len(network.costs):
            continue
        try:
            small = network.tied(classes.of_node)
            small.reduce(deadline)
            if not small.costs:
                return network.expand(small.expand({}))
            if small.num_pairs > _MOST_PAIRS:
                continue
            found = solve_narrowing(small, deadline).choice
        except InfeasiblePlanError:
            continue
        if found is not None:
            return network.expand(found)
        if time.monotonic() > deadline:
            break
    return None
