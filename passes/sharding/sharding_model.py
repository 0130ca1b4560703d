"""From a program and a mesh to a cost network, and back from a choice to specs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.sharding.reshard_paths import ReshardTable, local_bytes, reshard_table
from bactrian.passes.sharding.sharding_rules import Rule
from bactrian.passes.sharding.strategies import Defers, Strategy, strategies

_Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tensor:
    """One value of a program: its shape, the bytes of the whole of it, and whether it may stay unreduced."""

    shape: tuple[int, ...]
    nbytes: int
    partial: bool = False


@dataclass(frozen=True)
class Operation:
    """One op.

    Attributes:
        operands, results: numbers of values.
        rule: how their dims belong together; None for an op that gives its results in any sharding for nothing
            (constants, and what is computed from them alone).
        seconds: of all its work on one device.
        weight: how often it runs in a step.
        keeps: whether its results take memory; what is fused into its readers does not.
        given: of an op that only says how its operand is sharded, the specs that both may have: one, or those with
            what was asked for where dims were left open.
        lasts: whether its results are there during the whole step, as sums over microbatches are.
        copies: how many of its results are there at once: one for each microbatch in flight.
        defers: whether it can leave its result unreduced, or forwards what is unreduced.
        repack_seconds: for each byte of the operands' pieces, on top of ``seconds``, of which each device has its part.
        moves: for each operand, how often in a step it is resharded to what the op needs; as often as the op
            runs by default. What a loop reads from outside is brought there once.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule | None
    seconds: float = 0.0
    weight: float = 1.0
    keeps: bool = True
    given: tuple[Spec, ...] = ()
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
        updates: pairs (value, argument): the value is the argument's next one, in its place and with its sharding.
        fixed: specs that were given, by input.
        loads: for inputs that come from the host or from other stages, the seconds of a step that all of one takes one
            device.
        kept: values that must be there when the program ends; with any spec.
        wanted: values (no arguments) and the specs that their ops leave them with, where these can.
        batch_copies: how many microbatches of an input that comes anew with each are there at once.
        carried: triples (value, other, weight): a loop's body makes the value for the next iteration, where it is ``other``, with
            its spec; how often in a step it is resharded to it.
        lasting: values, and the ops that they must be there for though these do not read them.
        in_place: values that take the place of others: the next ones of what loops carry.
    """

    values: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    operations: tuple[Operation, ...]
    updates: tuple[tuple[int, int], ...] = ()
    fixed: tuple[tuple[int, Spec], ...] = ()
    loads: tuple[tuple[int, float], ...] = ()
    kept: tuple[int, ...] = ()
    wanted: tuple[tuple[int, Spec], ...] = ()
    batch_copies: int = 1
    carried: tuple[tuple[int, int, float], ...] = ()
    lasting: tuple[tuple[int, int], ...] = ()
    in_place: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shardings:
    """What was chosen.

    Attributes:
        arguments: the spec of each input, by its number.
        chosen: of each op its strategy; None where it is free.
        seconds: predicted, of a step.
    """

    arguments: dict[int, Spec]
    chosen: tuple[Strategy | None, ...]
    seconds: float


@dataclass
class ShardingModel:
    """The cost network of a program on a mesh.

    Nodes are the inputs, then the ops that are not free; the cost of an op is its share of the work, its halo
    exchanges and its reductions, the cost of an edge the cheapest path from the spec that a value has to that in which it is read. Memory
    is that of arguments and results; resharded copies are not counted (``passes/peak`` does, when the stage functions are
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
    _numbers: dict[tuple[int, int, bool, int], _Matrix] = field(default_factory=dict[Any, _Matrix], repr=False)

    @cached_property
    def tables(self) -> tuple[ReshardTable, ...]:
        """Of every value."""
        return tuple(
            reshard_table(value.shape, float(value.nbytes), self.mesh, value.partial) for value in self.work.values
        )

    @cached_property
    def input_specs(self) -> tuple[tuple[Spec, ...], ...]:
        """The specs to choose from for every input: axes of one dim in the mesh's order, or what is given."""
        fixed = dict(self.work.fixed)
        return tuple(
            (fixed[number],) if number in fixed else self._in_order(self.tables[number].specs)
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
                Strategy(nothing, (each,), (each,), (each,), (), each.num_shards(self.mesh.sizes)) for each in op.given
            )
        sizes = tuple(float(self.work.values[value].nbytes) for value in op.results)
        shapes = tuple(self.work.values[value].shape if value in self._read else None for value in op.results)
        choices = strategies(op.rule, sizes, self.mesh, shapes, op.defers)
        for position, value in enumerate(op.results):
            if value in self._wanted:
                fitting = tuple(s for s in choices if s.results[position] == self._wanted[value])
                choices = fitting or choices
        return choices

    def _in_order(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        """Those with the axes of each dim in the mesh's order."""
        position = self.mesh.position
        return tuple(s for s in specs if all(list(axes) == sorted(axes, key=position.__getitem__) for axes in s.dims))

    def computing(self, op: Operation, strategy: Strategy) -> float:
        """Seconds of one run of an op on a device, without what is exchanged."""
        seconds = op.seconds / strategy.parts
        if op.repack_seconds:
            values = [self.work.values[value] for value in op.operands]
            held = zip(values, strategy.operands, strict=True)
            seconds += op.repack_seconds * sum(local_bytes(value.nbytes, spec, self.mesh) for value, spec in held)
        return seconds

    @cached_property
    def _read(self) -> set[int]:
        """Values that somebody reads: what nobody reads is not sharded further."""
        returned = (value for value, _, _ in self.work.carried)
        return {value for op in self.work.operations for value in op.operands}.union(self.work.kept, returned)

    @cached_property
    def _wanted(self) -> dict[int, Spec]:
        return dict(self.work.wanted)

    @cached_property
    def network(self) -> CostNetwork:
        """The cost network."""
        work = self.work
        end = len(work.operations) + 1
        last = self._last_reads(end)
        own, loads = {value for value, _ in work.updates}.union(work.in_place), dict(work.loads)
        costs, usages, intervals = list[_Matrix](), list[_Matrix](), list[tuple[int, int]]()
        specs_of: dict[int, tuple[int, _Matrix]] = {}  # value -> node, number of its spec by strategy
        for number, specs in zip(work.inputs, self.input_specs, strict=True):
            table = self.tables[number]
            index = np.array([table.number[spec] for spec in specs])
            specs_of[number] = len(costs), index
            costs.append(loads.get(number, 0.0) * table.shares[index])
            usages.append(_whole_bytes((work.batch_copies if number in loads else 1) * table.local[index]))
            intervals.append((0, end))
        edges, matrices = list[tuple[int, int]](), list[_Matrix]()

        def connect(value: int, node: int, needed: _Matrix, weight: float) -> None:
            if value not in specs_of or not (work.values[value].shape or work.values[value].partial):
                return
            source, index = specs_of[value]
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
                index = self._spec_numbers(value, choices, position, is_result=True)
                specs_of[value] = node, index
                if op.keeps and value not in own:
                    held = held + self.tables[value].local[index]
            usages.append(_whole_bytes(op.copies * held))
            until = max((last[value] for value in op.results), default=at) + 1
            intervals.append((0, end) if op.lasts else (at, until))
            for position, value in enumerate(op.operands):
                if value not in specs_of:
                    continue  # constants are available in every sharding
                needed = self._spec_numbers(value, choices, position, is_result=False)
                connect(value, node, needed, op.moved(position))
        for value, number, weight in (*((value, number, 1.0) for value, number in work.updates), *work.carried):
            node, index = specs_of[number]
            connect(value, node, index, weight)
        return CostNetwork(tuple(costs), tuple(usages), tuple(intervals), tuple(edges), tuple(matrices), self.memory)

    def shardings(self, choice: Sequence[int]) -> Shardings:
        """What a choice of the network means."""
        rest = iter(choice)
        specs_of = zip(self.work.inputs, self.input_specs, strict=True)
        arguments = {number: specs[next(rest)] for number, specs in specs_of}
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

    def _spec_numbers(self, value: int, choices: tuple[Strategy, ...], position: int, *, is_result: bool) -> _Matrix:
        """The number of a value's spec by strategy of an op that reads or makes it; equal ops share one array."""
        table = self.tables[value]
        key = id(table), id(choices), is_result, position
        if key not in self._numbers:
            specs = ((s.results if is_result else s.operands)[position] for s in choices)
            self._numbers[key] = np.array([table.number[spec] for spec in specs])
        return self._numbers[key]

    def _block(self, value: int, source: _Matrix, target: _Matrix) -> _Matrix:
        """Seconds from each of the source's specs to each of the target's."""
        table = self.tables[value]
        key = id(table), source.tobytes(), target.tobytes()
        if key not in self._blocks:
            self._blocks[key] = table.seconds[np.ix_(source, target)]
        return self._blocks[key]


def seconds_of(model: ShardingModel, shardings: Shardings) -> float:
    """The predicted seconds of shardings, added up op by op: what the network's cost must equal."""
    work = model.work
    specs: dict[int, Spec] = dict(shardings.arguments)
    total = sum(seconds / specs[number].num_shards(model.mesh.sizes) for number, seconds in work.loads)
    for op, strategy in zip(work.operations, shardings.chosen, strict=True):
        if strategy is None:
            continue
        total += op.weight * (model.computing(op, strategy) + strategy.sending_seconds)
        for position, (value, needed) in enumerate(zip(op.operands, strategy.operands, strict=True)):
            if value in specs:
                path = model.tables[value].path(specs[value], needed)
                total += op.moved(position) * sum(step.seconds for step in path)
        specs.update(zip(op.results, strategy.results, strict=True))
    for value, number in work.updates:
        if value in specs:
            path = model.tables[value].path(specs[value], shardings.arguments[number])
            total += sum(step.seconds for step in path)
    for value, number, weight in work.carried:
        if value in specs:
            path = model.tables[value].path(specs[value], specs[number])
            total += weight * sum(step.seconds for step in path)
    return total


def _whole_bytes(usage: _Matrix) -> _Matrix:
    """Equal pieces of whole bytes are whole bytes: as integers they add up without rounding."""
    return np.rint(usage).astype(np.int64)
