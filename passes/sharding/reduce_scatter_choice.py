"""All-reduces whose results are only read sharded become reduce-scatters, where that takes no longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bactrian.passes.machine.spec import Spec
from bactrian.passes.network.solver import Solution
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.strategies import Strategy
from bactrian.passes.spmd.reshard_paths import ReshardTable

_EPSILON = 1e-12  # of a time: two that differ by less are equal
_Result = tuple[ReshardTable, list[Spec]]  # of a value, and the specs with which it is read


def prefer_reduce_scatters(model: ShardingModel, solution: Solution) -> Solution:
    """A solution that takes no longer, and sends less where it can.

    Where a cluster was measured, a reduce-scatter may take as long as an all-reduce, and the solver takes either.
    Compilers make a reduce-scatter of an all-reduce whose result is only sliced, so what is sent would be less than
    what is predicted.

    Args:
        model: of the program.
        solution: of its network.

    Returns:
        The solution, with other strategies of the same ops: with the same work on the same operands.
    """
    problem, made = model.problem, list(solution.choice)
    shardings = model.shardings(solution.choice)
    reads: dict[int, set[Spec]] = {}
    for op, strategy in zip(problem.ops, shardings.chosen, strict=True):
        if strategy is not None:
            for value, spec in zip(op.operands, strategy.operands, strict=True):
                reads.setdefault(value, set()).add(spec)
    for value, argument in problem.updates:
        reads.setdefault(value, set()).add(shardings.arguments[argument])
    specs = dict(shardings.arguments)
    for op, strategy in zip(problem.ops, shardings.chosen, strict=True):
        specs.update(zip(op.results, strategy.results, strict=True) if strategy is not None else ())
    for value, other, _ in problem.loop_carried:
        reads.setdefault(value, set()).add(specs[other])
    for node, position, choices in model.op_nodes():
        if any(each.kind == "all_reduce" for each in choices[made[node]].reductions):
            tables = [(model.tables[value], reads.get(value, ())) for value in problem.ops[position].results]
            results = [(table, sorted(read, key=table.number.__getitem__)) for table, read in tables]
            made[node] = _better(results, choices, made[node])
    choice, network = tuple(made), model.network
    if choice == tuple(solution.choice):
        return solution
    return replace(solution, choice=choice, cost=network.cost(choice), memory=network.peak(choice))


def _better(results: Sequence[_Result], choices: Sequence[Strategy], chosen: int) -> int:
    """The number of the strategy that scatters what the chosen one adds up everywhere, if its readers lose nothing."""
    old, best, fewest = choices[chosen], chosen, _sent(results, choices[chosen])
    slack = _EPSILON * old.reduction_seconds
    for number, new in enumerate(choices):
        if new.factors != old.factors or new.reduction_seconds > old.reduction_seconds + slack:
            continue
        if all(
            spec == before or (reads and all(_seconds(table, spec, x) <= _seconds(table, before, x) for x in reads))
            for (table, reads), spec, before in zip(results, new.results, old.results, strict=True)
        ):
            sent = _sent(results, new)
            if sent < fewest:
                best, fewest = number, sent
    return best


def _seconds(table: ReshardTable, source: Spec, target: Spec) -> float:
    return float(table.seconds[table.number[source], table.number[target]])


def _sent(results: Sequence[_Result], strategy: Strategy) -> float:
    moved = sum(
        step.nbytes
        for (table, reads), spec in zip(results, strategy.results, strict=True)
        for target in reads
        for step in table.path(spec, target)
    )
    return sum(each.nbytes for each in strategy.reductions) + moved
