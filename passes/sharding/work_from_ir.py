"""From ``@main`` to what the sharding model sees of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    COUNTER,
    ONCE_PER_STEP,
    UPDATE,
)
from bactrian.passes.ir.op_costs import CostModel, trip_count
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.fusion_costs import remark_missing_rates
from bactrian.passes.sharding.loop_dataflow import END, OP, LoopFlow
from bactrian.passes.sharding.operations_from_ir import FlowFacts, FlowOp, OperationReader, forwards
from bactrian.passes.sharding.sharding_model import ShardingProblem
from bactrian.passes.sharding.strategies import Exchange, Strategy
from bactrian.passes.sharding.user_shardings import (
    constrained_values,
    fixed_arguments,
)
from bactrian.passes.spmd.op_rules import RULE

_WITHOUT_RULE = frozenset(
    f"stablehlo.{name}" for name in ("constant", "iota", "custom_call", "while", "case", "if", "optimization_barrier")
)


@dataclass(frozen=True)
class Reading:
    """A program, and where its parts come from.

    Attributes:
        problem: what the model sees.
        flow: the data flow of ``@main`` and of its loops.
        ops: one for each op of ``problem``.
        value_of: of each value of ``flow`` the one of ``problem``: what a barrier or the boundary forwards is one value,
            and so is what a loop carries, in its body and after it.
        fused: phases that are one function, whose readers of a value share its reshards.
    """

    problem: ShardingProblem
    flow: LoopFlow
    ops: tuple[FlowOp, ...]
    value_of: tuple[int, ...]
    fused: frozenset[str] = frozenset()

    def function_of(self, phase: str | None) -> str:
        """A word for the function that a phase is in; what is done for the results is part of the update."""
        phase = phase or UPDATE
        return "fused" if phase in self.fused else phase

    def new_exchanges(self, entry: FlowOp, strategy: Strategy, known: set[tuple[Hashable, ...]]) -> Iterator[Exchange]:
        """The halo exchanges of an op that no op before has made: of one value under one spec, in one function, and one
        loop in it.

        Args:
            entry, strategy: the op.
            known: those of the ops before; what is new is added.
        """
        block = self.function_of(self.flow.phases[entry.index]), self.flow.loop_of(entry.index)
        for number, exchange in enumerate(strategy.exchanges):
            operand, own = exchange.send.operand, exchange.send.key or (entry.index, number)
            key = *block, entry.reads[operand], strategy.operands[operand], own
            if key not in known:
                known.add(key)
                yield exchange


def read_program(
    main: ir.Operation,
    mesh: Mesh,
    hosts: HostGroup,
    num_microbatches: int,
    remark: Callable[[ir.Operation, str], None],
    in_flight: int = 1,
    stage: int | None = None,
    facts: FlowFacts | None = None,
    model: CostModel | None = None,
) -> Reading:
    """Read ``@main``.

    Args:
        main: with ``sdy.sharding_rule`` on its ops (``sdy-populate-op-sharding-rules``) and phases.
        mesh: the devices; shardings that are given name its axes.
        hosts: whose devices do the work.
        num_microbatches: how often forward and backward run in a step.
        remark: told of ops that nothing is known of.
        in_flight: microbatches whose activations are there at once.
        stage: only what this one does; what others send it is an input.
        facts: of ``main``, where they are known.
        model: of the costs of ops, where it is another one.

    Raises:
        PassError: no op has a rule; a sharding that is given names other axes.
        ProgramError: a sharding that is given does not cut evenly.
    """
    facts = FlowFacts.of(main) if facts is None else facts
    flow, value_of = facts.flow, facts.value_of
    _check_rules(flow)
    reader = OperationReader(facts, mesh, hosts.device, num_microbatches, remark, in_flight, model or CostModel())
    portion = _Portion.of(facts, stage)
    _remark_unknown_loops(flow, portion, remark)
    remark_missing_rates((flow.ops[index] for index in portion.entries), hosts.device, remark)
    own = [index for index in portion.entries if flow.kinds[index] != END and not forwards(flow, index)]
    parts = tuple(reader.entry(index) for index in own)
    carried = tuple(_carried(flow, value_of, portion, reader))
    made = {value for index in own for value in flow.results[index]}
    read = {value for entry in parts for value in entry.op.operands} | {value for value, _, _ in carried}
    inputs = _inputs(flow, portion, read, made)
    there = made.union(inputs)
    counted = dict(_counted(flow, own, facts.updates))
    position = {entry.index: at for at, entry in enumerate(parts)}
    problem = ShardingProblem(
        values=facts.tensors,
        inputs=inputs,
        ops=tuple(entry.op for entry in parts),
        updates=tuple(dict.fromkeys(_updates(facts, inputs, there))),
        pinned=tuple(_fixed(main, flow, mesh, f"stage{stage or 0}", inputs, counted)),
        loads=tuple(_loads(facts, hosts, inputs, num_microbatches)),
        received=tuple(_received(flow, inputs, num_microbatches)),
        live_out=tuple(value for value in dict.fromkeys(_needed_later(flow, value_of, portion)) if value in there),
        preferred=tuple((value, _whole(flow, value)) for value in counted),
        batch_instances=in_flight,
        loop_carried=tuple(dict.fromkeys(tie for tie in carried if tie[0] != tie[1])),
        live_until=tuple(_lasting(flow, value_of, position)),
        in_place=tuple(_in_place(flow, value_of)),
    )
    return Reading(problem, flow, parts, tuple(value_of))


@dataclass(frozen=True)
class _Portion:
    """What of ``@main`` a stage has.

    Attributes:
        entries: those of the flow that the stage does, in their order, without the return.
        others: those that other stages do.
        arguments: those that are pinned to the stage, whether it reads them or not.
    """

    entries: tuple[int, ...]
    others: tuple[int, ...]
    arguments: frozenset[int]

    @classmethod
    def of(cls, facts: FlowFacts, stage: int | None) -> _Portion:
        """The portion of a stage; everything where there is one stage (None)."""
        flow = facts.flow
        entries = tuple(range(len(flow.ops) - 1))
        if stage is None:
            return cls(entries, (), frozenset(range(flow.num_arguments)))
        return cls(
            entries=tuple(index for index in entries if flow.stages[index] == stage),
            others=tuple(index for index in entries if flow.stages[index] not in (None, stage)),
            arguments=frozenset(number for number, stages in facts.pinned.items() if stage in stages),
        )


def _check_rules(flow: LoopFlow) -> None:
    """Refuse a program whose ops have no rules at all."""
    ops = [op for op, kind in zip(flow.ops, flow.kinds, strict=True) if kind == OP]
    ruled = [op for op in ops if op.name.startswith("stablehlo.") and op.name not in _WITHOUT_RULE]
    if ruled and not any(RULE in op.attributes for op in ruled):
        raise error_at(
            PassError,
            ruled[0],
            "no op of @main has an sdy.sharding_rule",
            fix="run func.func(sdy-populate-op-sharding-rules) first",
        )


def _remark_unknown_loops(flow: LoopFlow, portion: _Portion, remark: Callable[[ir.Operation, str], None]) -> None:
    for loop in flow.loops:
        if loop.first in portion.entries and trip_count(loop.op) is None:
            remark(loop.op, "unknown trip count: the loop body is costed as one iteration")


def _carried(
    flow: LoopFlow, value_of: list[int], portion: _Portion, reader: OperationReader
) -> Iterator[tuple[int, int, float]]:
    """What the bodies of loops make for the next iteration, as `Work.carried`, and what they return as it was."""
    for loop in flow.loops:
        if loop.end in portion.entries:
            for value, result in zip(loop.returned, loop.results, strict=True):
                yield value_of[value], value_of[result], reader.runs_per_step(loop.end) * flow.value_iterations[value]


def _inputs(flow: LoopFlow, portion: _Portion, read: set[int], made: set[int]) -> tuple[int, ...]:
    """The arguments that a stage reads or that are pinned to it, then what other stages send."""
    arguments = (number for number in range(flow.num_arguments) if number in read or number in portion.arguments)
    return *arguments, *sorted(value for value in read - made if value >= flow.num_arguments)


def _updates(facts: FlowFacts, inputs: tuple[int, ...], there: set[int]) -> Iterator[tuple[int, int]]:
    """The next values of a stage's arguments, and these; without those that stay as they are."""
    value_of, own = facts.value_of, frozenset(inputs)
    for value, argument in zip(facts.flow.operands[-1], facts.updates, strict=True):
        if argument in own and value_of[value] in there and value_of[value] != argument:
            yield value_of[value], argument


def _loads(
    facts: FlowFacts, hosts: HostGroup, inputs: tuple[int, ...], num_microbatches: int
) -> Iterator[tuple[int, float]]:
    """Seconds of a step that batches take from the host."""
    flow = facts.flow
    for number in facts.batch:
        if number in inputs:
            yield number, num_microbatches * flow.sizes[number] / hosts.device.bytes_per_second


def _received(flow: LoopFlow, inputs: tuple[int, ...], num_microbatches: int) -> Iterator[tuple[int, int]]:
    """The inputs that other stages send, and how often in a step."""
    for number in inputs:
        if number >= flow.num_arguments:
            yield number, _times(flow, number, num_microbatches)


def _needed_later(flow: LoopFlow, value_of: list[int], portion: _Portion) -> list[int]:
    """The results of ``@main``, then what other stages read."""
    elsewhere = {value_of[value] for index in portion.others for value in flow.operands[index]}
    return [value_of[value] for value in flow.operands[-1]] + sorted(elsewhere)


def _fixed(
    main: ir.Operation,
    flow: LoopFlow,
    mesh: Mesh,
    mesh_symbol: str,
    inputs: tuple[int, ...],
    counted: dict[int, int],
) -> list[tuple[int, Spec]]:
    """The shardings of inputs that users gave; a counter is replicated."""
    own = frozenset(inputs)
    fixed = dict(fixed_arguments(main, flow, mesh, mesh_symbol, own) + constrained_values(flow, mesh, own))
    fixed |= {argument: _whole(flow, argument) for argument in counted.values() if argument in own}
    return sorted(fixed.items())


def _whole(flow: LoopFlow, value: int) -> Spec:
    return Spec.replicated(len(value_shape(flow.values[value])))


def _lasting(flow: LoopFlow, value_of: list[int], position: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Values that are there until the ends of loops, and the last ops of these."""
    for value, end in flow.lasting():
        last = next((position[index] for index in range(end, -1, -1) if index in position), None)
        if last is not None:
            yield value_of[value], last


def _in_place(flow: LoopFlow, value_of: list[int]) -> Iterator[int]:
    """What the bodies of loops make for the next turn."""
    for loop in flow.loops:
        for value in loop.returned:
            if flow.producer[value_of[value]] > loop.first + len(loop.results):
                yield value_of[value]


def _times(flow: LoopFlow, value: int, num_microbatches: int) -> int:
    """How often in a step a value is made."""
    index = flow.producer[value]
    return flow.iterations[index] * (1 if flow.phases[index] in ONCE_PER_STEP else num_microbatches)


def _counted(flow: LoopFlow, own: list[int], updates: list[int | None]) -> Iterator[tuple[int, int]]:
    """Counters that a stage brings up to date for itself: their next value, and the argument that it is one of."""
    for index in own:
        op = flow.ops[index]
        if COUNTER in op.attributes:
            for entry in ir.ArrayAttr(op.attributes[COUNTER]):
                argument = updates[ir.IntegerAttr(entry).value]
                if argument is not None:
                    yield flow.results[index][0], argument


def first_arguments(readings: Iterable[Reading]) -> list[frozenset[int]]:
    """For each stage the arguments that it is the first to read: it gives them their shardings."""
    found, claimed = list[frozenset[int]](), frozenset[int]()
    for reading in readings:
        arguments = frozenset(number for number in reading.problem.inputs if number < reading.flow.num_arguments)
        found.append(arguments - claimed)
        claimed |= arguments
    return found
