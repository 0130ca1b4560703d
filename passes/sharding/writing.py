"""From chosen layouts to ``sdy.sharding`` on every value, and every move as an op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.mesh_tensors import SHARDING
from bactrian.passes.program import UPDATE, nested_operations, phase_of, result_updates, set_operand, terminator
from bactrian.passes.sharding.asked import CONSTRAINT
from bactrian.passes.sharding.layouts import Layout, replicated
from bactrian.passes.sharding.mesh import Mesh
from bactrian.passes.sharding.model import ShardingModel, Shardings
from bactrian.passes.sharding.reading import Reading, drop_rules
from bactrian.passes.sharding.strategies import Strategy, strategies

_PLACE = ("bactrian.phase", "bactrian.stage", "bactrian.layer")


def sharding_attribute(layout: Layout, mesh: Mesh, mesh_name: str) -> ir.Attribute:
    """A layout as ``#sdy.sharding<@mesh, [...]>``, closed: nothing may cut further."""
    dims = [
        sdy.DimensionShardingAttr.get([sdy.AxisRefAttr.get(mesh.axes[axis].name) for axis in axes], is_closed=True)
        for axes in layout
    ]
    return sdy.TensorShardingAttr.get(mesh_name, dims)


class Writer:
    """Writes shardings into ``@main``.

    A result has the layout in which its op leaves it once partial results are added up; every other layout is reached
    by a chain of ``sdy.reshard``, each of which is one collective. Readers of one phase share a chain.

    Args:
        main: the function.
        reading: what was read of it.
        model: its tables.
        shardings: what was chosen.
        mesh_name: the symbol of the mesh.
        num_microbatches: how often forward and backward run in a step.
        stage: whose ops they are, where there are several stages.
        claimed: arguments that earlier stages have given their sharding; grows.
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
        claimed: set[int] | None = None,
    ) -> None:
        self.main, self.reading, self.model, self.mesh_name = main, reading, model, mesh_name
        self.num_microbatches, self.stage = num_microbatches, stage
        self._claimed = set[int]() if claimed is None else claimed
        self.mesh = model.mesh
        self.num_reshards = 0
        # By kind of collective, bytes that each device sends: when all ops run once, and in a step.
        self.sent: dict[str, float] = {}
        self.sent_in_step: dict[str, float] = {}
        self.cut: dict[int, ir.Value] = {}  # values that are cut after their reduction, cut
        self._chosen = self._free_ones_chosen(shardings)
        self._arguments = shardings.arguments
        self._home: dict[int, Layout] = {}  # of values: the layout that they have for all readers
        self._received: dict[int, ir.Value] = {}  # what other stages have made, as this one has it
        self._copies: dict[
            tuple[int, str, Layout], ir.Value
        ] = {}  # (value of the flow, phase, layout) -> in that layout

    def write(self) -> None:
        """Write everything."""
        flow = self.reading.flow
        for number, layout in self._arguments.items():
            self._home[number] = layout
        first = self._receive()
        chosen = {part.index: (part, strategy) for part, strategy in zip(self.reading.parts, self._chosen, strict=True)}
        for index, op in enumerate(flow.ops[:-1]):
            if index not in chosen:
                if self.stage is None or flow.stages[index] in (None, self.stage):  # its results are its operands
                    self._hand_on(index, op)
                continue
            part, strategy = chosen[index]
            for position, (number, layout) in enumerate(zip(part.reads, strategy.operands, strict=True)):
                present = flow.values[number]
                value = self._read(number, layout, op)
                if position < len(op.operands):
                    set_operand(op, position, value)
                if value != present and len(op.regions):
                    for nested in nested_operations(op):
                        nested.replace_uses_of_with(present, value)
            for nested in nested_operations(op) if len(op.regions) else ():
                if nested.name == CONSTRAINT:  # in a loop: XLA keeps it
                    asked = sdy.TensorShardingAttr(nested.attributes["sharding"])
                    nested.attributes["sharding"] = sdy.TensorShardingAttr.get(
                        self.mesh_name, asked.dimension_shardings
                    )
            if op.name == CONSTRAINT:
                op.attributes["sharding"] = sharding_attribute(strategy.results[0], self.mesh, self.mesh_name)
                self._home[flow.results[index][0]] = strategy.results[0]
                continue
            self._annotate(op, strategy.partial)
            for reduction in strategy.reductions:
                self._count(reduction.kind, reduction.nbytes, part.operation.weight)
            for value, made, final in zip(flow.results[index], strategy.partial, strategy.results, strict=True):
                self._home[value] = final
                if made != final:  # together with the reduction, a reduce-scatter
                    with ir.InsertionPoint.after(op):
                        self.cut[value] = self._reshard(flow.values[value], final, op)
        self._results(first)
        drop_rules(self.main)

    def _receive(self) -> set[int]:
        """Make what this stage reads of others its own: a reshard from one mesh to another is a transfer.

        Returns:
            The arguments that no stage before has read.
        """
        if self.stage is None:
            return set(self._arguments)
        flow, value_of = self.reading.flow, self.reading.value_of
        first = {n for n in self._arguments if n < flow.num_arguments} - self._claimed
        self._claimed |= first
        readers = dict[int, ir.Operation]()
        for index, reads in enumerate(flow.operands):
            if flow.stages[index] == self.stage:
                for number in reads:
                    readers.setdefault(value_of[number], flow.ops[index])
        for number, layout in self._arguments.items():
            if number not in first and number in readers:
                with ir.InsertionPoint(readers[number]):
                    self._received[number] = self._reshard(flow.values[number], layout, readers[number])
        return first

    def receive_cut(self, cut: Mapping[int, ir.Value]) -> None:
        """Take from other stages what they have cut, as it is cut: when this stage was written, they may not have been.

        Args:
            cut: of all stages.
        """
        for number, value in self._received.items():
            if number in cut:
                set_operand(ir.OpResult(value).owner.operation, 0, cut[number])

    def _hand_on(self, index: int, op: ir.Operation) -> None:
        flow, value_of, work = self.reading.flow, self.reading.value_of, self.reading.work
        layouts = list[Layout]()
        for position, number in enumerate(flow.operands[index]):
            value = value_of[number]
            foreign = value not in self._home or value in self._received
            if foreign and flow.stages[index] is None and self.stage is not None:
                continue
            set_operand(op, position, self._at_home(number))
            layouts.append(self._home.get(value, replicated(len(work.values[value].shape))))
        if len(layouts) == len(op.results) and (self.stage is None or flow.stages[index] is not None):
            self._annotate(op, layouts)

    def _free_ones_chosen(self, shardings: Shardings) -> list[Strategy]:
        """All strategies, those of free ops included: they make what their readers want, or, where these want different
        layouts, the whole of it, which is cut for nothing."""
        work = self.reading.work
        wanted: dict[int, set[Layout]] = {}
        for value, argument in work.updates:
            wanted.setdefault(value, set()).add(shardings.arguments[argument])
        chosen = list[Strategy]()
        for at in range(len(work.operations) - 1, -1, -1):
            op, strategy = work.operations[at], shardings.chosen[at]
            if strategy is None:
                sizes = tuple(float(work.values[value].nbytes) for value in op.results)
                choices = strategies(self.reading.parts[at].rule, sizes, self.mesh, (None,) * len(sizes))
                targets = tuple(_only(wanted.get(value), len(work.values[value].shape)) for value in op.results)
                strategy = next((s for s in choices if s.results == targets and not s.reductions), choices[0])
            chosen.append(strategy)
            for value, layout in zip(op.operands, strategy.operands, strict=True):
                wanted.setdefault(value, set()).add(layout)
        return chosen[::-1]

    def _annotate(self, op: ir.Operation, layouts: Sequence[Layout]) -> None:
        attributes = [sharding_attribute(layout, self.mesh, self.mesh_name) for layout in layouts]
        op.attributes[SHARDING] = sdy.TensorShardingPerValueAttr.get(attributes)

    def _at_home(self, number: int) -> ir.Value:
        """A value of the flow as all readers find it; what a barrier or the boundary hands on is a value of its own."""
        flow, value = self.reading.flow, self.reading.value_of[number]
        received = self._received.get(value)
        if received is not None and (number == value or flow.stages[flow.producer[number]] != self.stage):
            return received
        return self.cut.get(number, flow.values[number])

    def _read(self, number: int, layout: Layout, reader: ir.Operation) -> ir.Value:
        """A value of the flow in the layout that an op needs."""
        value = self.reading.value_of[number]
        current = self._at_home(number)
        home = self._home.get(value)
        if home is None or home == layout or not self.reading.work.values[value].shape:
            return current
        phase = _phase(reader)
        weight = 1.0 if phase_of(reader) in (UPDATE, None) else self.num_microbatches
        with ir.InsertionPoint(reader):
            for move in self.model.tables[value].way(home, layout):
                key = number, phase, move.target
                if key not in self._copies:
                    self._count(move.kind, move.nbytes, weight)
                    self._copies[key] = self._reshard(current, move.target, reader)
                current = self._copies[key]
        return current

    def _count(self, kind: str, nbytes: float, weight: float) -> None:
        if nbytes:
            self.sent[kind] = self.sent.get(kind, 0.0) + nbytes
            self.sent_in_step[kind] = self.sent_in_step.get(kind, 0.0) + weight * nbytes

    def _reshard(self, value: ir.Value, layout: Layout, place: ir.Operation) -> ir.Value:
        self.num_reshards += 1
        attributes = {"sharding": sharding_attribute(layout, self.mesh, self.mesh_name)}
        attributes |= self._place(place, value)
        op = ir.Operation.create("sdy.reshard", [value.type], [value], attributes, loc=place.location)
        return op.results[0]

    def _place(self, reader: ir.Operation, value: ir.Value) -> dict[str, ir.Attribute]:
        """Phase, stage and layer of a move: those of its reader; before the return it is the maker's last work."""
        source = reader
        if reader.name == "func.return" and not isinstance(value.owner, ir.Block):
            source = value.owner.operation
        found = {name: source.attributes[name] for name in _PLACE if name in source.attributes}
        if source is not reader and _PLACE[0] in found:
            found[_PLACE[0]] = ir.StringAttr.get(UPDATE)
        return found

    def _results(self, first: set[int]) -> None:
        """Next values of state in their arguments' layouts; other results as they are.

        Args:
            first: the arguments that get their sharding here.
        """
        flow, value_of, main = self.reading.flow, self.reading.value_of, self.main
        end = terminator(main)
        layouts = dict[int, Layout]()
        for position, (value, updated) in enumerate(zip(flow.operands[-1], result_updates(main), strict=True)):
            source = value_of[value]
            if self.stage is not None and (source not in self._home or self._is_foreign(source, first)):
                continue  # another stage's
            rank = len(self.reading.work.values[source].shape)
            home = self._home.get(source, replicated(rank))
            target = home if updated is None else self._arguments.get(updated, home)
            set_operand(end, position, self._read(value, target, end))
            layouts[position] = target
        arguments = {number: layout for number, layout in self._arguments.items() if number in first}
        counts = flow.num_arguments, len(flow.operands[-1])
        for name, chosen, count in zip(("arg_attrs", "res_attrs"), (arguments, layouts), counts, strict=True):
            present = ir.ArrayAttr(main.attributes[name]) if name in main.attributes else [ir.DictAttr.get({})] * count
            entries = list[ir.Attribute]()
            for number, attribute in enumerate(present):
                entry = ir.DictAttr(attribute)
                own = {item.name: item.attr for item in entry}
                if number in chosen:
                    own[SHARDING] = sharding_attribute(chosen[number], self.mesh, self.mesh_name)
                entries.append(ir.DictAttr.get(own))
            main.attributes[name] = ir.ArrayAttr.get(entries)

    def _is_foreign(self, value: int, first: set[int]) -> bool:
        """Whether another stage has made a value, or gave an argument its sharding."""
        flow = self.reading.flow
        if value < flow.num_arguments:
            return value not in first
        return flow.stages[flow.producer[value]] != self.stage


def _only(layouts: set[Layout] | None, rank: int) -> Layout:
    return next(iter(layouts)) if layouts and len(layouts) == 1 else replicated(rank)


def _phase(op: ir.Operation) -> str:
    return str(op.attributes["bactrian.phase"]) if "bactrian.phase" in op.attributes else ""
