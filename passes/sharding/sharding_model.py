"""From a program and a mesh to a cost network, and back from a choice to specs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.mesh_transfers import replication_seconds
from bactrian.passes.machine.spec import Spec
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.sharding.network_nodes import NetworkNodes
from bactrian.passes.sharding.strategies import Defers, Strategy, strategies
from bactrian.passes.spmd.reshard_paths import ReshardTable, local_bytes, reshard_table
from bactrian.passes.spmd.sharding_rules import Rule

_Matrix = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tensor:
    """One value of a program: its shape, the bytes of the whole of it, and whether it may stay unreduced."""

    shape: tuple[int, ...]
    nbytes: int
    partial: bool = False


@dataclass(frozen=True)
class ShardedOp:
    """One op.

    Attributes:
        operands, results: numbers of values.
        rule: how their dims belong together; None for an op that gives its results in any sharding for nothing
            (constants, and what is computed from them alone).
        seconds: of all its work on one device.
        runs_per_step: how often it runs in a step.
        materialized: whether its results take memory; what is fused into its readers does not.
        constraint_specs: of an op that only says how its operand is sharded, the specs that both may have: one, or
            those with what was asked for where dims were left open.
        live_whole_step: whether its results are there during the whole step, as sums over microbatches are.
        live_instances: how many of its results are there at once: one for each microbatch in flight.
        defers: whether it can leave its result unreduced, or forwards what is unreduced.
        repack_seconds: for each byte of the operands' shards, on top of ``seconds``, of which each device has its part.
        narrows: whether it has one operand, of which its result is a copy with fewer bytes, as a cast to a shorter type
            makes: its result is resharded in the place of the operand.
        reshards_per_step: for each operand, how often in a step it is resharded to what the op needs; as often as the
            op runs by default. What a loop reads from outside is brought there once.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule | None
    seconds: float = 0.0
    runs_per_step: float = 1.0
    materialized: bool = True
    constraint_specs: tuple[Spec, ...] = ()
    live_whole_step: bool = False
    live_instances: int = 1
    defers: Defers = Defers.NOT
    repack_seconds: float = 0.0
    narrows: bool = False
    reshards_per_step: tuple[float, ...] | None = None

    def reshards_of(self, position: int) -> float:
        """How often in a step the operand at a position is resharded."""
        return self.runs_per_step if self.reshards_per_step is None else self.reshards_per_step[position]

    def resharded(self, position: int) -> int:
        """The value that is resharded where the operand at a position has not the spec that the op needs."""
        return self.results[0] if self.narrows else self.operands[position]


@dataclass(frozen=True)
class ShardingProblem:
    """A program as the solver sees it.

    Attributes:
        values: arguments first, then what the ops give, in their order.
        inputs: values that are there before any op: arguments, and what other stages send.
        ops: in program order.
        updates: pairs (value, argument): the value is the argument's next one, in its place and with its sharding.
        pinned: specs that are decided already, by input: what users ask for, and what a baseline says.
        loads: for inputs that come from the host, the seconds of a step that all of one takes one device.
        received: inputs that other stages send, and how often in a step. Each element arrives once, in equal parts on all
            devices, whatever the sharding there and here; what more a sharding needs of it, devices gather from each
            other (`replication_seconds`).
        live_out: values that must be there when the program ends, with any spec.
        preferred: values (no arguments) and the specs that their ops leave them with, where these can.
        batch_instances: how many microbatches of an input that comes anew with each are there at once.
        loop_carried: triples (value, other, reshards per step): a loop's body makes the value for the next iteration,
            where it is ``other``, with its spec; how often in a step it is resharded to it.
        live_until: values, and the ops that they must be there for though these do not read them.
        in_place: values that take the place of others: the next ones of what loops carry.
    """

    values: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    ops: tuple[ShardedOp, ...]
    updates: tuple[tuple[int, int], ...] = ()
    pinned: tuple[tuple[int, Spec], ...] = ()
    loads: tuple[tuple[int, float], ...] = ()
    received: tuple[tuple[int, float], ...] = ()
    live_out: tuple[int, ...] = ()
    preferred: tuple[tuple[int, Spec], ...] = ()
    batch_instances: int = 1
    loop_carried: tuple[tuple[int, int, float], ...] = ()
    live_until: tuple[tuple[int, int], ...] = ()
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

    Nodes are the inputs, then the ops that are not free; the cost of an op is its share of the work, its halo exchanges
    and its reductions, the cost of an edge the cheapest path from the spec that a value has to that in which it is
    read. Memory is that of arguments and results; resharded copies are not counted (``passes/peak`` does, when the
    stage functions are there), and the next value of a state is in its place.

    Args:
        work: the program.
        mesh: the devices.
        memory: bytes of each device; None where they don't matter.
    """

    problem: ShardingProblem
    mesh: Mesh
    memory: int | None = None
    _blocks: dict[tuple[int, bytes, bytes], _Matrix] = field(default_factory=dict[Any, _Matrix], repr=False)
    _numbers: dict[tuple[int, int, bool, int], _Matrix] = field(default_factory=dict[Any, _Matrix], repr=False)

    @cached_property
    def tables(self) -> tuple[ReshardTable, ...]:
        """Of every value."""
        return tuple(
            reshard_table(value.shape, float(value.nbytes), self.mesh, value.partial) for value in self.problem.values
        )

    @cached_property
    def input_specs(self) -> tuple[tuple[Spec, ...], ...]:
        """The specs to choose from for every input: axes of one dim in the mesh's order, or what is given."""
        fixed = dict(self.problem.pinned)
        return tuple(
            (fixed[number],) if number in fixed else self._in_order(self.tables[number].specs)
            for number in self.problem.inputs
        )

    @cached_property
    def nodes(self) -> NetworkNodes:
        """What each node of the network decides."""
        operations = enumerate(self.problem.ops)
        return NetworkNodes(self.problem.inputs, {at: op.results for at, op in operations if op.rule is not None})

    @cached_property
    def strategies(self) -> tuple[tuple[Strategy, ...] | None, ...]:
        """The strategies of every op; None for a free one."""
        return tuple(self._strategies_of(op) for op in self.problem.ops)

    def _strategies_of(self, op: ShardedOp) -> tuple[Strategy, ...] | None:
        if op.rule is None:
            return None
        if op.constraint_specs:
            nothing = (None,) * len(self.mesh.axes)
            return tuple(
                Strategy(nothing, (each,), (each,), (each,), (), each.num_shards(self.mesh.sizes))
                for each in op.constraint_specs
            )
        sizes = tuple(float(self.problem.values[value].nbytes) for value in op.results)
        shapes = tuple(self.problem.values[value].shape if value in self._read else None for value in op.results)
        choices = strategies(op.rule, sizes, self.mesh, shapes, op.defers)
        for position, value in enumerate(op.results):
            if value in self._preferred:
                fitting = tuple(s for s in choices if s.results[position] == self._preferred[value])
                choices = fitting or choices
        return choices

    def _in_order(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        """Those with the axes of each dim in the mesh's order."""
        position = self.mesh.position
        return tuple(s for s in specs if all(list(axes) == sorted(axes, key=position.__getitem__) for axes in s.dims))

    def computing(self, op: ShardedOp, strategy: Strategy) -> float:
        """Seconds of one run of an op on a device, without what is exchanged."""
        seconds = op.seconds / strategy.num_shards
        if op.repack_seconds:
            values = [self.problem.values[value] for value in op.operands]
            held = zip(values, strategy.operands, strict=True)
            seconds += op.repack_seconds * sum(local_bytes(value.nbytes, spec, self.mesh) for value, spec in held)
        return seconds

    @cached_property
    def _read(self) -> set[int]:
        """Values that somebody reads: what nobody reads is not sharded further."""
        returned = (value for value, _, _ in self.problem.loop_carried)
        return {value for op in self.problem.ops for value in op.operands}.union(self.problem.live_out, returned)

    @cached_property
    def _preferred(self) -> dict[int, Spec]:
        return dict(self.problem.preferred)

    @cached_property
    def network(self) -> CostNetwork:
        """The cost network."""
        problem = self.problem
        end = len(problem.ops) + 1
        last = self._last_reads(end)
        own = {value for value, _ in problem.updates}.union(problem.in_place)
        loads, received = dict(problem.loads), dict(problem.received)
        costs, usages, intervals = list[_Matrix](), list[_Matrix](), list[tuple[int, int]]()
        specs_of: dict[int, tuple[int, _Matrix]] = {}  # value -> node, number of its spec by strategy
        for number, specs in zip(problem.inputs, self.input_specs, strict=True):
            table = self.tables[number]
            index = np.array([table.number[spec] for spec in specs])
            specs_of[number] = len(costs), index
            if number in received:
                costs.append(received[number] * self._replications(number, specs))
            else:
                costs.append(loads.get(number, 0.0) * table.shares[index])
            each_microbatch = number in loads or number in received
            usages.append(_whole_bytes((problem.batch_instances if each_microbatch else 1) * table.local[index]))
            intervals.append((0, end))
        edges, matrices = list[tuple[int, int]](), list[_Matrix]()

        def connect(value: int, node: int, needed: _Matrix, per_step: float, resharded: int) -> None:
            if value not in specs_of or not (problem.values[value].shape or problem.values[value].partial):
                return
            source, index = specs_of[value]
            block = self._block(resharded, index, needed)
            if source == node:
                costs[node] = costs[node] + per_step * np.diagonal(block)
            elif block.any():
                edges.append((source, node))
                matrices.append(per_step * block)

        for node, at, choices in self.op_nodes():
            op = problem.ops[at]
            costs.append(np.array([op.runs_per_step * (self.computing(op, s) + s.sending_seconds) for s in choices]))
            held = np.zeros(len(choices))
            for position, value in enumerate(op.results):
                index = self._spec_numbers(value, choices, position, is_result=True)
                specs_of[value] = node, index
                if op.materialized and value not in own:
                    held = held + self.tables[value].local[index]
            usages.append(_whole_bytes(op.live_instances * held))
            until = max((last[value] for value in op.results), default=at) + 1
            intervals.append((0, end) if op.live_whole_step else (at, until))
            for position, value in enumerate(op.operands):
                if value not in specs_of:
                    continue  # constants are available in every sharding
                needed = self._spec_numbers(value, choices, position, is_result=False)
                connect(value, node, needed, op.reshards_of(position), op.resharded(position))
        for value, number, per_step in (
            *((value, number, 1.0) for value, number in problem.updates),
            *problem.loop_carried,
        ):
            node, index = specs_of[number]
            connect(value, node, index, per_step, value)
        return CostNetwork(tuple(costs), tuple(usages), tuple(intervals), tuple(edges), tuple(matrices), self.memory)

    def _replications(self, value: int, specs: Sequence[Spec]) -> _Matrix:
        """Seconds until a received value is there with each of some specs, behind its transfer."""
        nbytes = float(self.problem.values[value].nbytes)
        return np.array([replication_seconds(self.mesh, spec, nbytes) for spec in specs])

    def op_nodes(self) -> Iterator[tuple[int, int, tuple[Strategy, ...]]]:
        """The node, the position and the strategies of each op that is not free."""
        for node, position in enumerate(self.nodes.ops, len(self.problem.inputs)):
            choices = self.strategies[position]
            assert choices is not None  # it has a node
            yield node, position, choices

    def specs_of(self, value: int) -> tuple[int, list[Spec]] | None:
        """The node that decides the sharding of a value, and the spec that each of its strategies gives the value; None
        for what is free."""
        node = self.nodes.of_value(value)
        if node is None:
            return None
        position = self.nodes.op(node)
        if position is None:
            return node, list(self.input_specs[node])
        number = self.problem.ops[position].results.index(value)
        return node, [strategy.results[number] for strategy in self.strategies[position] or ()]

    def shardings(self, choice: Sequence[int]) -> Shardings:
        """What a choice of the network means."""
        pairs = zip(self.problem.inputs, self.input_specs, strict=True)
        arguments = {number: specs[choice[node]] for node, (number, specs) in enumerate(pairs)}
        chosen: list[Strategy | None] = [None] * len(self.problem.ops)
        for node, position, choices in self.op_nodes():
            chosen[position] = choices[choice[node]]
        return Shardings(arguments, tuple(chosen), float(self.network.cost(choice)))

    def choice(self, shardings: Shardings) -> tuple[int, ...]:
        """The choice of the network that means these shardings; each must be among its strategies."""
        pairs = zip(self.problem.inputs, self.input_specs, strict=True)
        inputs = [specs.index(shardings.arguments[number]) for number, specs in pairs]
        return *inputs, *(choices.index(shardings.chosen[at]) for _, at, choices in self.op_nodes())

    def _last_reads(self, end: int) -> list[int]:
        last = [0] * len(self.problem.values)
        for at, op in enumerate(self.problem.ops):
            for value in (*op.operands, *op.results):
                last[value] = at
        for value, at in self.problem.live_until:
            last[value] = max(last[value], at)
        for value in self.problem.live_out:
            last[value] = end - 1
        for op in reversed(self.problem.ops):
            if op.constraint_specs and not op.materialized:  # its result is its operand
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


@dataclass(frozen=True)
class StepSeconds:
    """The predicted seconds of a step, by what takes them.

    Attributes:
        loads: of each entry of the problem's ``loads``.
        received: of each entry of its ``received``.
        ops: of each op: its work, its reductions and exchanges, and bringing its operands to it; 0 of a free one.
        updates: bringing the next values of arguments to the shardings of these.
        loops: of each entry of ``loop_carried``.
    """

    loads: tuple[float, ...]
    received: tuple[float, ...]
    ops: tuple[float, ...]
    updates: float
    loops: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of the step: what the network's cost must equal."""
        return sum(self.loads) + sum(self.received) + sum(self.ops) + self.updates + sum(self.loops)


def step_seconds(model: ShardingModel, shardings: Shardings) -> StepSeconds:
    """The predicted seconds of shardings, op by op."""
    problem, arguments = model.problem, shardings.arguments
    specs: dict[int, Spec] = dict(arguments)

    def reshard(value: int, needed: Spec, resharded: int | None = None) -> float:
        table = model.tables[value if resharded is None else resharded]
        return sum(step.seconds for step in table.path(specs[value], needed)) if value in specs else 0.0

    ops = list[float]()
    for op, strategy in zip(problem.ops, shardings.chosen, strict=True):
        if strategy is None:
            ops.append(0.0)
            continue
        seconds = op.runs_per_step * (model.computing(op, strategy) + strategy.sending_seconds)
        for position, (value, needed) in enumerate(zip(op.operands, strategy.operands, strict=True)):
            seconds += op.reshards_of(position) * reshard(value, needed, op.resharded(position))
        ops.append(seconds)
        specs.update(zip(op.results, strategy.results, strict=True))
    return StepSeconds(
        loads=tuple(seconds / arguments[number].num_shards(model.mesh.sizes) for number, seconds in problem.loads),
        received=tuple(
            per_step * replication_seconds(model.mesh, arguments[number], float(problem.values[number].nbytes))
            for number, per_step in problem.received
        ),
        ops=tuple(ops),
        updates=sum(reshard(value, arguments[number]) for value, number in problem.updates),
        loops=tuple(
            per_step * reshard(value, specs[number]) if value in specs else 0.0
            for value, number, per_step in problem.loop_carried
        ),
    )


def _whole_bytes(usage: _Matrix) -> _Matrix:
    """Usage as integers: equal shards are whole bytes, and integers add up without rounding."""
    return np.rint(usage).astype(np.int64)
