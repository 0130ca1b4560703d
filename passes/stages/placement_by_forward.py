"""Layers of backward and update ops: near the layers of the forward ops that they belong to, where the fewest bytes travel."""

from __future__ import annotations

from bactrian.passes.ir.attributes import BACKWARD, FORWARD, UPDATE
from bactrian.passes.stages.layer_graph import LayeredProgram
from bactrian.passes.stages.layer_placement import LayerPlacement
from bactrian.passes.stages.pinned_arguments import PinnedArguments


def place_by_forward(
    program: LayeredProgram,
    pinned: PinnedArguments | None,
    layers: list[int | None],
    num_layers: int,
) -> int:
    """Place backward and update ops that are not free; returns how many there are.

    Args:
        program: the program.
        pinned: arguments that are on layers already, whoever reads them.
        layers: of each op; those of the forward ops are known, those of backward and update ops are written.
        num_layers: how many there are.

    What travels in the backward phase counts as often as a step has microbatches, what travels in the update once.
    """
    problem = LayerPlacement(num_layers)
    nodes: dict[int, int] = {}
    for index, phase in enumerate(program.phases):
        if phase in (BACKWARD, UPDATE) and not program.free[index] and not program.marker[index]:
            nodes[index] = problem.node()
    ends = _argument_ends(program, pinned, layers, problem)
    for value in range(len(program.flow.values)):
        _pay_for_value(program, layers, problem, nodes, ends, value)
    solution = problem.solve()
    for op, node in nodes.items():
        layers[op] = solution[node]
    return len(nodes)


def _argument_ends(
    program: LayeredProgram, pinned: PinnedArguments | None, layers: list[int | None], problem: LayerPlacement
) -> dict[int, list[int]]:
    """The layers that have each argument: the lowest and highest that hold it or read it forward, else a variable.

    A batch argument stands there as well: other stages could load it, too, but then the gradient of the first layer's
    weight would be computed on the second whenever it is smaller than the cotangent.
    """
    ends: dict[int, list[int]] = {}
    for argument in range(len(program.roles)):
        forward = [
            layer
            for reader in program.readers[argument]
            if program.phases[reader] == FORWARD and (layer := layers[reader]) is not None
        ]
        forward.extend(pinned.of.get(argument, ()) if pinned is not None else ())
        ends[argument] = [problem.at(min(forward)), problem.at(max(forward))] if forward else [problem.node()]
    return ends


def _pay_for_value(
    program: LayeredProgram,
    layers: list[int | None],
    problem: LayerPlacement,
    nodes: dict[int, int],
    ends: dict[int, list[int]],
    value: int,
) -> None:
    """Add one value's travels to the problem."""
    if program.same[value] != value:
        return
    op = program.flow.producer[value]
    if op >= 0 and (op == program.boundary or program.free[op]):
        return
    size, microbatches = program.bytes[value], program.microbatches
    backward = [nodes[r] for r in program.readers[value] if program.phases[r] == BACKWARD and r in nodes]
    update = _update_ends(program, nodes, ends, value)
    if op < 0:
        problem.pay_span([*ends[value], *backward], size * microbatches)
        problem.pay_span([*ends[value], *update], size)
    elif program.phases[op] == FORWARD:
        own = layers[op]
        assert own is not None
        last = max((layers[r] or 0 for r in program.readers[value] if program.phases[r] == FORWARD), default=own)
        problem.pay_span([problem.at(own), problem.at(max(own, last)), *backward], size * microbatches)
        problem.pay_span([problem.at(own), *update], size)
    elif program.phases[op] == BACKWARD:
        for reader in backward:
            problem.require(nodes[op], reader)
        if backward:
            problem.pay(nodes[op], problem.lowest(backward), size * microbatches)
        problem.pay_span([nodes[op], *update], size)
    else:
        problem.pay_span([nodes[op], *update], size)


def _update_ends(program: LayeredProgram, nodes: dict[int, int], ends: dict[int, list[int]], value: int) -> list[int]:
    """What a value travels to once per step: update ops, and the layers of the argument that it is the next value of.

    A value that passes the boundary is the same value behind it.
    """
    same = [value]
    boundary = program.boundary
    if boundary is not None and boundary in program.readers[value]:
        passed = zip(program.flow.operands[boundary], program.flow.results[boundary], strict=True)
        same.extend(result for operand, result in passed if program.same[operand] == value)
    readers = [nodes[r] for v in same for r in program.readers[v] if program.phases[r] == UPDATE and r in nodes]
    return readers + [end for v in same for argument in program.next_of.get(v, ()) for end in ends.get(argument, ())]
