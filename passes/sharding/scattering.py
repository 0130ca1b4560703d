"""All-reduces whose results are only read cut become reduce-scatters, where that takes no longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bactrian.passes.network.solve import Solution
from bactrian.passes.sharding.layouts import Layout, LayoutTable
from bactrian.passes.sharding.model import ShardingModel
from bactrian.passes.sharding.strategies import Strategy

_EPSILON = 1e-12  # of a time: two that differ by less are equal


def scattered(model: ShardingModel, solution: Solution) -> Solution:
    """A solution that takes no longer, and sends less where it can.

    Where a cluster was measured, a reduce-scatter may take as long as an all-reduce, and the solver takes either. Compilers
    make a reduce-scatter of an all-reduce whose result is only cut, so what is sent would be less than what is predicted.

    Args:
        model: of the program.
        solution: of its network.

    Returns:
        The solution, with other strategies of the same ops: with the same work on the same operands.
    """
    work, made = model.work, list(solution.choice)
    node = len(work.inputs)
    shardings = model.shardings(solution.choice)
    reads: dict[int, set[Layout]] = {}
    for op, strategy in zip(work.operations, shardings.chosen, strict=True):
        if strategy is not None:
            for value, layout in zip(op.operands, strategy.operands, strict=True):
                reads.setdefault(value, set()).add(layout)
    for value, argument in work.updates:
        reads.setdefault(value, set()).add(shardings.arguments[argument])
    layouts = dict(shardings.arguments)
    for op, strategy in zip(work.operations, shardings.chosen, strict=True):
        layouts.update(zip(op.results, strategy.results, strict=True) if strategy is not None else ())
    for value, other, _ in work.carried:
        reads.setdefault(value, set()).add(layouts[other])
    for op, choices, strategy in zip(work.operations, model.strategies, shardings.chosen, strict=True):
        if choices is None or strategy is None:
            continue
        if len(op.results) == 1 and [each.kind for each in strategy.reductions] == ["all_reduce"]:
            (value,) = op.results
            made[node] = _better(model.tables[value], choices, made[node], sorted(reads.get(value, ())))
        node += 1
    choice, network = tuple(made), model.network
    if choice == tuple(solution.choice):
        return solution
    return replace(solution, choice=choice, cost=network.cost(choice), memory=network.peak(choice))


def _better(table: LayoutTable, choices: Sequence[Strategy], chosen: int, reads: Sequence[Layout]) -> int:
    """The number of the strategy that scatters what the chosen one adds up everywhere, if its readers lose nothing."""
    old, best, fewest = choices[chosen], chosen, _sent(table, choices[chosen], reads)
    for number, new in enumerate(choices):
        scatters = new.factors == old.factors and all(each.kind == "reduce_scatter" for each in new.reductions)
        if not scatters or not new.reductions or not reads:
            continue
        slack = _EPSILON * old.reduction_seconds
        if new.reduction_seconds > old.reduction_seconds + slack:
            continue
        if all(_seconds(table, new, layout) <= _seconds(table, old, layout) + slack for layout in reads):
            sent = _sent(table, new, reads)
            if sent < fewest:
                best, fewest = number, sent
    return best


def _seconds(table: LayoutTable, strategy: Strategy, layout: Layout) -> float:
    return float(table.seconds[table.number[strategy.results[0]], table.number[layout]])


def _sent(table: LayoutTable, strategy: Strategy, reads: Sequence[Layout]) -> float:
    moved = sum(move.nbytes for layout in reads for move in table.way(strategy.results[0], layout))
    return sum(each.nbytes for each in strategy.reductions) + moved
