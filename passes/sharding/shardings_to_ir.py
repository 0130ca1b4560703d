"""From chosen specs to ``sdy.sharding`` on every value, and every reshard step as an op."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.ir.attributes import (
    ONCE_PER_STEP,
    PHASE,
    PLACEMENT,
    STAGE,
    UPDATE,
    argument_attributes,
    phase_of,
    result_attributes,
    result_updates,
)
from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.meshes import SHARDING, sharding_attribute
from bactrian.passes.ir.regions import body, nested_operations, set_operand, terminator, top_level
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.loop_dataflow import CARRY, CONDITION, INSIDE, Loop, condition_ops
from bactrian.passes.sharding.operations_from_ir import FlowOp
from bactrian.passes.sharding.sharding_model import ShardingModel, Shardings
from bactrian.passes.sharding.strategies import Strategy, strategies
from bactrian.passes.sharding.user_shardings import CONSTRAINT
from bactrian.passes.sharding.work_from_ir import Reading, first_arguments
from bactrian.passes.spmd.op_rules import drop_rules


@dataclass(frozen=True)
class OtherStages:
    """What a stage needs to know of the others to be written. It is read and priced without them.

    Attributes:
        claimed: the inputs that other stages give their sharding: arguments that an earlier stage reads, and what stages
            make. The stage receives these.
        scattered: of all stages, values that are sharded further right after their reduction, as they are read.
    """

    claimed: frozenset[int]
    scattered: Mapping[int, ir.Value]


class Writer:
    """Writes shardings into ``@main``.

    A result has the spec with which its op leaves it once partial results are added up; every other spec is reached
    by a chain of ``sdy.reshard``, each of which is one collective. Readers in one function share a chain.

    Args:
        main: the function.
        reading: what was read of it.
        model: its tables.
        shardings: what was chosen.
        mesh_name: the symbol of the mesh.
        num_microbatches: how often forward and backward run in a step.
        stage: whose ops they are, where there are several stages.
    """

    def __init__(
        self,
        main: ir.Operation,
        reading: Reading,
        model: ShardingModel,
        shardings: Shardings,
        mesh_name: str,
        num_microbatches: int = 1,
        stage: int | None = None,
    ) -> None:
        self.main, self.reading, self.model, self.mesh_name = main, reading, model, mesh_name
        self.num_microbatches, self.stage = num_microbatches, stage
        self.mesh = model.mesh
        self.num_reshards = 0
        # By kind of collective, bytes that each device sends: when @main runs once, and in a step.
        self.sent: dict[str, float] = {}
        self.sent_in_step: dict[str, float] = {}
        self._chosen = self._free_ones_chosen(shardings)
        self._arguments = shardings.arguments
        self._home: dict[int, Spec] = {}  # of values: the spec that they have for all readers
        self._scattered: Mapping[int, ir.Value] = {}
        # What other stages have made, as this one has it: by value, and whether it is received below the boundary.
        self._received: dict[tuple[int, bool], ir.Value] = {}
        self._narrowed: dict[int, ir.Value] = {}  # what casts make, resharded, by value of the flow
        self._exchanged = set[tuple[Hashable, ...]]()  # halos that are counted already
        self._copies: dict[
            tuple[int, str, Spec], ir.Value
        ] = {}  # (value of the flow, function, spec) -> with that spec

    def scatter(self) -> dict[int, ir.Value]:
        """Shard results further right after their reductions, which makes reduce-scatters of these: the first thing to write.

        Returns:
            Of each such value its number and what its readers read.
        """
        flow, scattered = self.reading.flow, dict[int, ir.Value]()
        for entry, strategy in zip(self.reading.ops, self._chosen, strict=True):
            op = flow.ops[entry.index]
            for value, made, final in zip(flow.results[entry.index], strategy.partial, strategy.results, strict=True):
                if made != final:
                    with ir.InsertionPoint.after(op):
                        scattered[value] = self._reshard(flow.values[value], final, op)
        return scattered

    def write(self, others: OtherStages) -> None:
        """Write everything else."""
        self._scattered = others.scattered
        flow = self.reading.flow
        for number, spec in self._arguments.items():
            self._home[number] = spec
        first = self._arguments.keys() - others.claimed
        self._receive(first)
        chosen = {
            entry.index: (entry, strategy) for entry, strategy in zip(self.reading.ops, self._chosen, strict=True)
        }
        for index, op in enumerate(flow.ops[:-1]):
            if index not in chosen:
                if self.stage is None or flow.stages[index] in (None, self.stage):  # its results are its operands
                    self._forward(index, op)
                continue
            entry, strategy = chosen[index]
            if flow.kinds[index] == CARRY:
                self._carry(entry, strategy)
                continue
            if flow.kinds[index] == CONDITION:
                self._condition(entry, strategy)
                continue
            if entry.op.narrows and self._narrow(entry, strategy):
                continue
            for position, (number, spec) in enumerate(zip(entry.reads, strategy.operands, strict=True)):
                present = flow.values[number]
                value = self._unreduced_constant(number, spec) or self._read(number, spec, op)
                if position < len(op.operands):
                    set_operand(op, position, value)
                if value != present and len(op.regions):
                    for nested in nested_operations(op):
                        nested.replace_uses_of_with(present, value)
            if op.name == CONSTRAINT:
                op.attributes["sharding"] = self._attribute(strategy.results[0])
                self._home[flow.results[index][0]] = strategy.results[0]
                continue
            self._annotate(op, strategy.partial)
            for exchange in self.reading.new_exchanges(entry, strategy, self._exchanged):
                self._count(exchange.kind, exchange.send.nbytes, flow.iterations[index], entry.op.runs_per_step)
            for reduction in strategy.reductions:
                self._count(reduction.kind, reduction.nbytes, flow.iterations[index], entry.op.runs_per_step)
            self._home.update(zip(flow.results[index], strategy.results, strict=True))
        self._results(first)
        drop_rules(self.main)

    def _narrow(self, entry: FlowOp, strategy: Strategy) -> bool:
        """Let a cast to a shorter type come before its operand's reshards; whether that sends less."""
        (number,), (result,), (spec,) = entry.reads, entry.op.results, strategy.results
        value, table = self.reading.value_of[number], self.model.tables[result]
        home = self._home.get(value, spec)
        steps = table.path(home, spec)
        if not any(step.nbytes for step in steps):
            return False
        op, runs = self.reading.flow.ops[entry.index], entry.op.runs_per_step
        set_operand(op, 0, self._at_home(number))
        self._annotate(op, (home,))
        current = op.results[0]
        for step in steps:
            self._count(step.kind, step.nbytes, self.reading.flow.iterations[entry.index], runs)
            with ir.InsertionPoint.after(op if current.owner == op else ir.OpResult(current).owner.operation):
                current = self._reshard(current, step.target, op)
        self._narrowed[result], self._home[result] = current, spec
        return True

    def _receive(self, first: Set[int]) -> None:
        """Make what this stage reads of others its own: a reshard from one mesh to another is a transfer.

        Args:
            first: the arguments that get their sharding here.
        """
        flow, value_of = self.reading.flow, self.reading.value_of
        readers = dict[tuple[int, bool], ir.Operation]()
        for index, reads in enumerate(flow.operands):
            if flow.stages[index] == self.stage:
                for number in reads:
                    readers.setdefault((value_of[number], self._passes_boundary(number)), flow.tops[index])
        for number, spec in self._arguments.items():
            for below in (False, True):
                reader = readers.get((number, below))
                if number not in first and reader is not None:
                    source = self._boundary_result(number) if below else number
                    value = self._scattered.get(source, flow.values[source])
                    with ir.InsertionPoint(reader):
                        self._received[number, below] = self._reshard(value, spec, reader)

    def _passes_boundary(self, number: int) -> bool:
        """Whether a value of the flow is the boundary's result for what an op above it makes: the update must read that
        one, since the other one exists once per microbatch."""
        flow = self.reading.flow
        return 0 <= flow.producer[self.reading.value_of[number]] < flow.boundary <= flow.producer[number]

    def _boundary_result(self, value: int) -> int:
        """The boundary's result for a value that passes it."""
        flow, value_of = self.reading.flow, self.reading.value_of
        pairs = zip(flow.operands[flow.boundary], flow.results[flow.boundary], strict=True)
        return next(result for operand, result in pairs if value_of[operand] == value)

    def _forward(self, index: int, op: ir.Operation) -> None:
        flow, value_of, problem = self.reading.flow, self.reading.value_of, self.reading.problem
        if flow.kinds[index] == INSIDE:
            self._unchanged(index, op)
            return
        if index in flow.ends:
            self._end(flow.ends[index], op)
            return
        specs = list[Spec]()
        for position, number in enumerate(flow.operands[index]):
            value = value_of[number]
            foreign = value not in self._home or {(value, False), (value, True)} & self._received.keys()
            if foreign and flow.stages[index] is None and self.stage is not None:
                continue
            set_operand(op, position, self._at_home(number))
            specs.append(self._home.get(value, Spec.replicated(len(problem.values[value].shape))))
        if len(specs) == len(op.results) and (self.stage is None or flow.stages[index] is not None):
            self._annotate(op, specs)

    def _unchanged(self, index: int, loop: ir.Operation) -> None:
        """Let a loop carry a value on that it does not change, as it is."""
        flow = self.reading.flow
        first = flow.values[flow.results[index][0]]
        if not isinstance(first.owner, ir.Block):  # else they are the arguments of its body
            set_operand(loop, ir.OpResult(first).result_number, self._at_home(flow.operands[index][0]))

    def _carry(self, entry: FlowOp, strategy: Strategy) -> None:
        """Reshard a value to the spec that a loop carries it with."""
        (result,) = entry.op.results
        loop, spec = self.reading.flow.ops[entry.index], strategy.results[0]
        position = ir.OpResult(self.reading.flow.values[result]).result_number
        set_operand(loop, position, self._read(entry.reads[0], spec, loop))
        self._home[result] = spec

    def _condition(self, entry: FlowOp, strategy: Strategy) -> None:
        """Let the condition of a loop read everything replicated."""
        flow = self.reading.flow
        first = flow.ops[entry.index]
        loop = first.block.owner.operation
        inside = condition_ops(loop)
        for number, spec in zip(entry.reads, strategy.operands, strict=True):
            present, value = flow.values[number], self._read(number, spec, first)
            if value != present:
                for op in inside:
                    op.replace_uses_of_with(present, value)
        for op in inside:
            if op.name != "stablehlo.return" and len(op.results):
                self._annotate(op, [Spec.replicated(_rank(result)) for result in op.results])

    def _end(self, loop: Loop, end: ir.Operation) -> None:
        """Reshard what the body of a loop makes for the next iteration."""
        value_of, values = self.reading.value_of, self.reading.problem.values
        specs = [self._home.get(value_of[r], Spec.replicated(len(values[r].shape))) for r in loop.results]
        for position, (number, spec) in enumerate(zip(loop.returned, specs, strict=True)):
            set_operand(end, position, self._read(number, spec, end))
        self._annotate(loop.op, specs)

    def _free_ones_chosen(self, shardings: Shardings) -> list[Strategy]:
        """All strategies, those of free ops included: they make what their readers want, or, where these want different
        specs, the whole value, of which a slice costs nothing."""
        problem = self.reading.problem
        wanted: dict[int, set[Spec]] = {}
        for value, argument in problem.updates:
            wanted.setdefault(value, set()).add(shardings.arguments[argument])
        results = {
            value: spec
            for op, strategy in zip(problem.ops, shardings.chosen, strict=True)
            if strategy is not None
            for value, spec in zip(op.results, strategy.results, strict=True)
        }
        for value, result, _ in problem.loop_carried:
            wanted.setdefault(value, set()).add(results[result])
        chosen = list[Strategy]()
        for at in range(len(problem.ops) - 1, -1, -1):
            op, strategy = problem.ops[at], shardings.chosen[at]
            if strategy is None:
                sizes = tuple(float(problem.values[value].nbytes) for value in op.results)
                choices = strategies(self.reading.ops[at].rule, sizes, self.mesh, (None,) * len(sizes))
                targets = tuple(_only(wanted.get(value), len(problem.values[value].shape)) for value in op.results)
                silent = (s for s in choices if not s.reductions and not s.exchanges)
                strategy = next((s for s in silent if s.results == targets), choices[0])
            chosen.append(strategy)
            for value, spec in zip(op.operands, strategy.operands, strict=True):
                wanted.setdefault(value, set()).add(spec)
        return chosen[::-1]

    def _attribute(self, spec: Spec) -> ir.Attribute:
        return sharding_attribute(spec, self.mesh_name)

    def _annotate(self, op: ir.Operation, specs: Sequence[Spec]) -> None:
        attributes = [self._attribute(spec) for spec in specs]
        op.attributes[SHARDING] = sdy.TensorShardingPerValueAttr.get(attributes)

    def _at_home(self, number: int) -> ir.Value:
        """A value of the flow as all readers find it; what a barrier or the gradient boundary forwards is a value of its own."""
        flow, value = self.reading.flow, self.reading.value_of[number]
        received = self._received.get((value, self._passes_boundary(number)))
        if received is not None and (number == value or flow.stages[flow.producer[number]] != self.stage):
            return received
        return self._narrowed.get(number) or self._scattered.get(number, flow.values[number])

    def _read(self, number: int, spec: Spec, reader: ir.Operation) -> ir.Value:
        """A value of the flow with the spec that an op needs."""
        value = self.reading.value_of[number]
        current = self._at_home(number)
        home = self._home.get(value)
        if home is None or home == spec:
            return current
        path = self.model.tables[value].path(home, spec)
        if not path:
            return current
        # What a loop reads from outside is resharded before the loop.
        place, top = top_level(reader, _block_of(current)), top_level(reader, body(self.main))
        iterations = self.reading.flow.value_iterations[number]
        function = self.reading.function_of(phase_of(top))
        per_step = iterations * (1.0 if phase_of(top) in (*ONCE_PER_STEP, None) else self.num_microbatches)
        with ir.InsertionPoint(place):
            for step in path:
                key = number, function, step.target
                if key not in self._copies:
                    self._count(step.kind, step.nbytes, iterations, per_step)
                    self._copies[key] = self._reshard(current, step.target, place)
                current, home = self._copies[key], step.target
        return current

    def _unreduced_constant(self, number: int, spec: Spec) -> ir.Value | None:
        """What an op on partial sums reads of a constant; None of all other values.

        A zero is the partial sum of every device. What partial sums are multiplied with or divided by is the same on all.
        """
        value = self.reading.value_of[number]
        if self.reading.problem.values[value].partial or not spec.unreduced:
            return None
        constant = self.reading.flow.values[value]
        element = splat_of(constant)
        assert element is not None  # `deferred_sums` looked
        maker = ir.OpResult(constant).owner.operation
        elements: ir.Attribute = ir.DenseElementsAttr.get_splat(constant.type, element)
        with ir.InsertionPoint.after(maker), maker.location:
            made = ir.Operation.create(
                "stablehlo.constant", results=[constant.type], attributes={"value": elements, **_place_of(maker)}
            )
        is_zero = isinstance(element, ir.FloatAttr | ir.IntegerAttr) and element.value == 0
        self._annotate(made, [spec if is_zero else Spec(spec.dims)])
        return made.results[0]

    def _count(self, kind: str, nbytes: float, iterations: int, per_step: float) -> None:
        if nbytes:
            self.sent[kind] = self.sent.get(kind, 0.0) + iterations * nbytes
            self.sent_in_step[kind] = self.sent_in_step.get(kind, 0.0) + per_step * nbytes

    def _reshard(self, value: ir.Value, spec: Spec, place: ir.Operation) -> ir.Value:
        self.num_reshards += 1
        attributes = {"sharding": self._attribute(spec)}
        attributes |= self._place(place, value)
        op = ir.Operation.create("sdy.reshard", [value.type], [value], attributes, loc=place.location)
        return op.results[0]

    def _place(self, reader: ir.Operation, value: ir.Value) -> dict[str, ir.Attribute]:
        """Phase, stage and layer of a reshard: those of its reader; before the return it is the update's last work, in the
        layer of its maker."""
        if reader.name != "func.return":
            return _place_of(reader)
        found = {} if isinstance(value.owner, ir.Block) else _place_of(value.owner.operation)
        if STAGE not in found and (stage := self._own_stage()) is not None:  # an argument, or of the gradient boundary
            found[STAGE] = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), stage)
        if STAGE in found:
            found[PHASE] = ir.StringAttr.get(UPDATE)
        return found

    def _own_stage(self) -> int | None:
        """Whose ops these are; None in a function without stages."""
        if self.stage is not None:
            return self.stage
        return next((stage for stage in self.reading.flow.stages if stage is not None), None)

    def _results(self, first: Set[int]) -> None:
        """Next values of state with their arguments' specs; other results as they are.

        Args:
            first: the arguments that get their sharding here.
        """
        flow, value_of, main = self.reading.flow, self.reading.value_of, self.main
        end = terminator(main)
        results = dict[int, Spec]()
        for position, (value, updated) in enumerate(zip(flow.operands[-1], result_updates(main), strict=True)):
            source = value_of[value]
            if self.stage is not None and (source not in self._home or self._is_foreign(source, first)):
                continue  # another stage's
            rank = len(self.reading.problem.values[source].shape)
            home = self._home.get(source, Spec.replicated(rank))
            target = home if updated is None else self._arguments.get(updated, home)
            set_operand(end, position, self._read(value, target, end))
            results[position] = target
        arguments = {number: spec for number, spec in self._arguments.items() if number in first}
        for name, entries, chosen in (
            ("arg_attrs", argument_attributes(main), arguments),
            ("res_attrs", result_attributes(main), results),
        ):
            for number, spec in chosen.items():
                entries[number][SHARDING] = self._attribute(spec)
            main.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])

    def _is_foreign(self, value: int, first: Set[int]) -> bool:
        """Whether another stage has made a value, or gave an argument its sharding."""
        flow = self.reading.flow
        if value < flow.num_arguments:
            return value not in first
        return flow.stages[flow.producer[value]] != self.stage


def write_stages(writers: Sequence[Writer]) -> None:
    """Write the shardings of all stages, given in their order."""
    for writer, others in zip(writers, _other_stages(writers), strict=True):
        writer.write(others)


def _other_stages(writers: Sequence[Writer]) -> list[OtherStages]:
    """For each stage what it needs to know of the others."""
    scattered = {number: value for writer in writers for number, value in writer.scatter().items()}
    readings = [writer.reading for writer in writers]
    firsts = first_arguments(readings)
    return [
        OtherStages(frozenset(reading.problem.inputs) - first, scattered)
        for reading, first in zip(readings, firsts, strict=True)
    ]


def _only(specs: set[Spec] | None, rank: int) -> Spec:
    return next(iter(specs)) if specs and len(specs) == 1 else Spec.replicated(rank)


def _place_of(op: ir.Operation) -> dict[str, ir.Attribute]:
    """Phase, stage and layer."""
    return {name: op.attributes[name] for name in PLACEMENT if name in op.attributes}


def _block_of(value: ir.Value) -> ir.Block:
    owner = value.owner
    return owner if isinstance(owner, ir.Block) else owner.operation.block


def _rank(value: ir.Value) -> int:
    return value.type.rank if isinstance(value.type, ir.RankedTensorType) else 0
