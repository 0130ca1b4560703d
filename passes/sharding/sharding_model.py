"""From a program and a mesh to a cost network, and back from a choice to layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.sharding.reshard_paths import Layout, LayoutTable, local_bytes, table_of
from bactrian.passes.sharding.sharding_rules import Rule
from bactrian.passes.sharding.strategies import Defers, Strategy, strategies

_Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tensor:
    """One value of a program: its shape, the bytes of the whole of it, and whether it may stay in parts of a sum."""

    shape: tuple[int, ...]
    nbytes: int
    partial: bool = False


@dataclass(frozen=True)
class Operation:
    """One op.

    Attributes:
        operands, results: numbers of values.
        rule: how their dims belong together; None for an op that gives its results in any layout for nothing
            (constants, and what is computed from them alone).
        seconds: of all its work on one device.
        weight: how often it runs in a step.
        keeps: whether its results take memory; what is fused into its readers does not.
        given: of an op that only says how its operand is laid out, the layouts that both may have: one, or those with
            what was asked for where dims were left open.
        lasts: whether its results are there during the whole step, as sums over microbatches are.
        copies: how many of its results are there at once: one for each microbatch in flight.
        defers: whether it can leave parts of a sum, or hand them on.
        repack_seconds: for each byte of the operands' pieces, on top of ``seconds``, of which each device has its part.
        moves: for each operand, how often in a step it is brought to the layout that the op needs; as often as the op
            runs by default. What a loop reads from outside is brought there once.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule | None
    seconds: float = 0.0
    weight: float = 1.0
    keeps: bool = True
    given: tuple[Layout, ...] = ()
    lasts: bool = False
    copies: int = 1
    defers: Defers = Defers.NOT
    repack_seconds: float = 0.0
    moves: tuple[float, ...] | None = None

    def moved(self, position: int) -> float:
        """How often in a step the operand at a position is moved."""
        return self.weight if self.moves is None else self.moves[position]


@dataclass(frozen=True)
class Work:
    """A program as the solver sees it.

    Attributes:
        values: arguments first, then what the ops give, in their order.
        inputs: values that are there before any op: arguments, and what other stages send.
        operations: in the order of work.
        updates: pairs (value, argument): the value is the argument's next one, in its place and its layout.
        fixed: layouts that were given, by input.
        loads: for inputs that come from the host or from other stages, the seconds of a step that all of one takes one
            device.
        kept: values that must be there when the program ends; they may have any layout.
        wanted: values (no arguments) and the layouts that they are left in by their ops, where these can.
        batch_copies: how many microbatches of an input that comes anew with each are there at once.
        carried: triples (value, other, weight): a loop's body makes the value for the next turn, where it is ``other``, in
            its layout; how often in a step it is moved there.
        lasting: values, and the ops that they must be there for though these do not read them.
        in_place: values that take the place of others: the next ones of what loops carry.
    """

    values: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    operations: tuple[Operation, ...]
    updates: tuple[tuple[int, int], ...] = ()
    fixed: tuple[tuple[int, Layout], ...] = ()
    loads: tuple[tuple[int, float], ...] = ()
    kept: tuple[int, ...] = ()
    wanted: tuple[tuple[int, Layout], ...] = ()
    batch_copies: int = 1
    carried: tuple[tuple[int, int, float], ...] = ()
    lasting: tuple[tuple[int, int], ...] = ()
    in_place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shardings:
    """What was chosen.

    Attributes:
        arguments: the layout of each input, by its number.
        chosen: of each op its strategy; None where it is free.
        seconds: predicted, of a step.
    """

    arguments: dict[int, Layout]
    chosen: tuple[Strategy | None, ...]
    seconds: float


@dataclass
class ShardingModel:
    """The cost network of a program on a mesh.

    Nodes are the inputs, then the ops that are not free; the cost of an op is its share of the work, its exchanges of
    borders and its reductions, the cost of an edge the cheapest way from the layout that a value has to that in which it is read. Memory
    is that of arguments and results; copies in other layouts are not counted (``passes/peak`` does, when the stage functions are
    there), and the next value of a state is in its place.

    Args:
        work: the program.
        mesh: the devices.
        memory: bytes of each device; None where they don't matter.
    """

    work: Work
    mesh: Mesh
    memory: int | None = None
    _blocks: dict[tuple[int, bytes, bytes], _Matrix] = field(default_factory=dict[Any, _Matrix], repr=False)

    @cached_property
    def tables(self) -> tuple[LayoutTable, ...]:
        """Of every value."""
        return tuple(table_of(value.shape, float(value.nbytes), self.mesh, value.partial) for value in self.work.values)

    @cached_property
    def argument_layouts(self) -> tuple[tuple[Layout, ...], ...]:
        """The layouts to choose from for every input: axes of one dim in the mesh's order, or what is given."""
        fixed = dict(self.work.fixed)
        return tuple(
            (fixed[number],) if number in fixed else tuple(x for x in self.tables[number].layouts if _in_order(x))
            for number in self.work.inputs
        )

    @cached_property
    def strategies(self) -> tuple[tuple[Strategy, ...] | None, ...]:
        """The strategies of every op; None for a free one."""
        return tuple(self._strategies_of(op) for op in self.work.operations)

    def _strategies_of(self, op: Operation) -> tuple[Strategy, ...] | None:
        if op.rule is None:
            return None
        if op.given:
            nothing = (None,) * len(self.mesh.axes)
            return tuple(
                Strategy(nothing, (each,), (each,), (each,), (), self.mesh.parts(sum(each, ()))) for each in op.given
            )
        sizes = tuple(float(self.work.values[value].nbytes) for value in op.results)
        shapes = tuple(self.work.values[value].shape if value in self._read else None for value in op.results)
        choices = strategies(op.rule, sizes, self.mesh, shapes, op.defers)
        for position, value in enumerate(op.results):
            if value in self._wanted:
                fitting = tuple(s for s in choices if s.results[position] == self._wanted[value])
                choices = fitting or choices
        return choices

    def computing(self, op: Operation, strategy: Strategy) -> float:
        """Seconds of one run of an op on a device, without what is exchanged."""
        seconds = op.seconds / strategy.parts
        if op.repack_seconds:
            values = [self.work.values[value] for value in op.operands]
            held = zip(values, strategy.operands, strict=True)
            seconds += op.repack_seconds * sum(local_bytes(value.nbytes, layout, self.mesh) for value, layout in held)
        return seconds

    @cached_property
    def _read(self) -> set[int]:
        """Values that somebody reads: what nobody does, nobody cuts."""
        returned = (value for value, _, _ in self.work.carried)
        return {value for op in self.work.operations for value in op.operands}.union(self.work.kept, returned)

    @cached_property
    def _wanted(self) -> dict[int, Layout]:
        return dict(self.work.wanted)

    @cached_property
    def network(self) -> CostNetwork:
        """The cost network."""
        work = self.work
        end = len(work.operations) + 1
        last = self._last_reads(end)
        own, loads = {value for value, _ in work.updates}.union(work.in_place), dict(work.loads)
        costs, usages, intervals = list[_Matrix](), list[_Matrix](), list[tuple[int, int]]()
        layouts_of: dict[int, tuple[int, _Matrix]] = {}  # value -> node, number of its layout by strategy
        for number, layouts in zip(work.inputs, self.argument_layouts, strict=True):
            table = self.tables[number]
            index = np.array([table.number[layout] for layout in layouts])
            layouts_of[number] = len(costs), index
            costs.append(loads.get(number, 0.0) * table.shares[index])
            usages.append(_whole_bytes((work.batch_copies if number in loads else 1) * table.local[index]))
            intervals.append((0, end))
        edges, matrices = list[tuple[int, int]](), list[_Matrix]()

        def connect(value: int, node: int, needed: _Matrix, weight: float) -> None:
            if value not in layouts_of or not (work.values[value].shape or work.values[value].partial):
                return
            source, index = layouts_of[value]
            block = self._block(value, index, needed)
            if source == node:
                costs[node] = costs[node] + weight * np.diagonal(block)
            elif block.any():
                edges.append((source, node))
                matrices.append(weight * block)

        for at, (op, choices) in enumerate(zip(work.operations, self.strategies, strict=True)):
            if choices is None:
                continue
            node = len(costs)
            costs.append(np.array([op.weight * (self.computing(op, s) + s.sending_seconds) for s in choices]))
            held = np.zeros(len(choices))
            for position, value in enumerate(op.results):
                index = np.array([self.tables[value].number[s.results[position]] for s in choices])
                layouts_of[value] = node, index
                if op.keeps and value not in own:
                    held = held + self.tables[value].local[index]
            usages.append(_whole_bytes(op.copies * held))
            until = max((last[value] for value in op.results), default=at) + 1
            intervals.append((0, end) if op.lasts else (at, until))
            for position, value in enumerate(op.operands):
                if value not in layouts_of:
                    continue  # of constants any layout is there, also those that their tables don't have
                table = self.tables[value]
                needed = np.array([table.number[s.operands[position]] for s in choices])
                connect(value, node, needed, op.moved(position))
        for value, number, weight in (*((value, number, 1.0) for value, number in work.updates), *work.carried):
            node, index = layouts_of[number]
            connect(value, node, index, weight)
        return CostNetwork(tuple(costs), tuple(usages), tuple(intervals), tuple(edges), tuple(matrices), self.memory)

    def shardings(self, choice: Sequence[int]) -> Shardings:
        """What a choice of the network means."""
        rest = iter(choice)
        layouts_of = zip(self.work.inputs, self.argument_layouts, strict=True)
        arguments = {number: layouts[next(rest)] for number, layouts in layouts_of}
        chosen = tuple(None if choices is None else choices[next(rest)] for choices in self.strategies)
        return Shardings(arguments, chosen, float(self.network.cost(choice)))

    def _last_reads(self, end: int) -> list[int]:
        last = [0] * len(self.work.values)
        for at, op in enumerate(self.work.operations):
            for value in (*op.operands, *op.results):
                last[value] = at
        for value, at in self.work.lasting:
            last[value] = max(last[value], at)
        for value in self.work.kept:
            last[value] = end - 1
        for op in reversed(self.work.operations):
            if op.given and not op.keeps:  # its result is its operand
                last[op.operands[0]] = max(last[op.operands[0]], last[op.results[0]])
        return last

    def _block(self, value: int, source: _Matrix, target: _Matrix) -> _Matrix:
        """Seconds from each of the source's layouts to each of the target's."""
        table = self.tables[value]
        key = id(table), source.tobytes(), target.tobytes()
        if key not in self._blocks:
            self._blocks[key] = table.seconds[np.ix_(source, target)]
        return self._blocks[key]


def seconds_of(model: ShardingModel, shardings: Shardings) -> float:
    """The predicted seconds of shardings, added up op by op: what the network's cost must equal."""
    work = model.work
    layouts: dict[int, Layout] = dict(shardings.arguments)
    total = sum(seconds / model.mesh.parts(sum(layouts[number], ())) for number, seconds in work.loads)
    for op, strategy in zip(work.operations, shardings.chosen, strict=True):
        if strategy is None:
            continue
        total += op.weight * (model.computing(op, strategy) + strategy.sending_seconds)
        for position, (value, needed) in enumerate(zip(op.operands, strategy.operands, strict=True)):
            if value in layouts:
                way = model.tables[value].way(layouts[value], needed)
                total += op.moved(position) * sum(move.seconds for move in way)
        layouts.update(zip(op.results, strategy.results, strict=True))
    for value, number in work.updates:
        if value in layouts:
            way = model.tables[value].way(layouts[value], shardings.arguments[number])
            total += sum(move.seconds for move in way)
    for value, number, weight in work.carried:
        if value in layouts:
            way = model.tables[value].way(layouts[value], layouts[number])
            total += weight * sum(move.seconds for move in way)
    return total


def _whole_bytes(usage: _Matrix) -> _Matrix:
    """Equal pieces of whole bytes are whole bytes: as integers they add up without rounding."""
    return np.rint(usage).astype(np.int64)


def _in_order(layout: Layout) -> bool:
    return all(list(axes) == sorted(axes) for axes in layout)
