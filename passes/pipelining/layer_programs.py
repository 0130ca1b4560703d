"""From a module whose ops have layers to one program per layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.module_text import copy_module
from bactrian.passes.frame.pipeline import run_pipeline
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    LAYER,
    NUM_LAYERS,
    NUM_MICROBATCHES,
    NUM_STAGES,
    ROLE,
    SCHEDULE,
    STAGE,
    argument_attributes,
    integer,
    required_integer,
    result_updates,
)
from bactrian.passes.ir.meshes import ONE_DEVICE, SHARDING, USER_MESH, make_stage_meshes, mesh_axes
from bactrian.passes.ir.op_costs import CostModel, TensorSize
from bactrian.passes.ir.regions import body, main_function, nested_operations
from bactrian.passes.machine.host_group import HostGroup
from bactrian.passes.machine.mesh import Axis, Mesh
from bactrian.passes.pipelining.batch_dims import BatchDims, follow_rows
from bactrian.passes.pipelining.layers import FROM_LAYER, ONCE, Border, LayerProgram, ProgramLayers
from bactrian.passes.sharding.loop_dataflow import OP, LoopFlow, capture_unchanged
from bactrian.passes.sharding.operations_from_ir import FlowFacts
from bactrian.passes.sharding.sharding_model import ShardedOp, ShardingProblem
from bactrian.passes.sharding.work_from_ir import Reading, read_program

_MESH = Mesh((Axis("data", 2),))  # to read ops with: where nothing is pinned, what is read does not depend on it


def read_layers(module: ir.Module, hosts: HostGroup, cluster: str = "") -> ProgramLayers:
    """The layers of a module, each read as if it were a stage of its own.

    Args:
        module: with ``bactrian.layer`` on its ops (``group-layers``). It is not changed.
        hosts: whose devices do the work.
        cluster: as passes take it: what is done once per step depends on it.

    Raises:
        ConfigError: the user has given shardings.
        PassError, ProgramError: as `read_program`.
    """
    layers = LayerReading(module, cluster)
    return layers.layers(hosts, layers.rows)


class LayerReading:
    """A module whose layers are read: for devices of any kind, and for any size of microbatch.

    Attributes:
        rows: of the batch in a microbatch, as the module was traced.
    """

    def __init__(self, module: ir.Module, cluster: str = "") -> None:
        """Localize a copy of a module; ``module`` and ``cluster`` as of `read_layers`.

        Raises:
            ConfigError: as `read_layers`.
        """
        if USER_MESH in mesh_axes(module):
            raise ConfigError(
                "cannot choose meshes for a program with shardings of its own",
                why="its shardings name the axes of a mesh that is not known before the stages are",
                fix="give num_stages and mesh, or leave the shardings out",
            )
        num_layers = required_integer(module.operation, NUM_LAYERS, "run group-layers first")
        self._module = _localized(module, num_layers, cluster)
        self._main = main_function(self._module)
        capture_unchanged(self._main)
        self._facts = FlowFacts.of(self._main)
        self._exchange = _Exchange.of(self._facts)
        self._border_bytes = self._exchange.border_bytes(self._facts.flow, num_layers)
        keys = _LayerKeys(self._main, self._facts, self._exchange).of_layers(num_layers)
        numbers: dict[Hashable, int] = {}
        self._kind_of = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
        self._read = list[tuple[_LayerReader, list[_ReadLayer]]]()
        self.rows = batch_rows(self._main)

    def layers(self, hosts: HostGroup, rows: int) -> ProgramLayers:
        """The layers on hosts of a kind, for microbatches of so many rows.

        Raises:
            OtherSizeError: another size can't be told from that of the module.
            PassError, ProgramError: as `read_program`.
        """
        reader, kinds = self._read_on(hosts)
        return ProgramLayers(
            kinds=tuple(kind.program for kind in kinds) if rows == self.rows else reader.scaled(kinds, self.rows, rows),
            kind_of=self._kind_of,
            border_bytes=tuple(nbytes * rows // self.rows for nbytes in self._border_bytes),
            rows=rows,
        )

    def _read_on(self, hosts: HostGroup) -> tuple[_LayerReader, list[_ReadLayer]]:
        for reader, kinds in self._read:
            if reader.hosts == hosts:
                return reader, kinds
        reader = _LayerReader(self._main, hosts, self._facts, self._exchange)
        self._read.append((reader, [reader.read(self._kind_of.index(kind)) for kind in dict.fromkeys(self._kind_of)]))
        return self._read[-1]


def _nothing(op: ir.Operation, text: str) -> None:
    """Remarks are made where the stages are read."""


def _localized(module: ir.Module, num_layers: int, cluster: str) -> ir.Module:
    """A copy in which each layer is a stage that has what it needs, and keeps for its backward phase what it must."""
    copy = copy_module(module)
    attributes = copy.operation.attributes
    attributes[NUM_STAGES] = integer(num_layers)
    if SCHEDULE in attributes:
        del attributes[SCHEDULE]  # which would fuse the phases of some stages
    if required_integer(copy.operation, NUM_MICROBATCHES, "start from a captured step") == 1:
        attributes[NUM_MICROBATCHES] = integer(2)  # so that gradients have accumulators
    for view in body(main_function(copy)).operations:
        if LAYER in view.operation.attributes:
            view.operation.attributes[STAGE] = view.operation.attributes[LAYER]
    make_stage_meshes(copy, (ONE_DEVICE,) * num_layers)
    run_pipeline(copy, f"builtin.module(bactrian-localize-stages{{cluster={cluster}}},bactrian-prepare-shardings)")
    return copy


def batch_rows(main: ir.Operation) -> int:
    """Rows of the batch in a microbatch: 1 where there is no batch."""
    batch = ir.StringAttr.get("batch", main.context)
    for value, entry in zip(body(main).arguments, argument_attributes(main), strict=True):
        if entry.get(ROLE) == batch:
            return ir.RankedTensorType(value.type).shape[0]
    return 1


@dataclass(frozen=True)
class _Exchange:
    """What layers exchange.

    Attributes:
        made_by: of each value the layer that makes it; None for arguments, and what is not in a layer.
        read_by: of each value the layers that read it.
    """

    made_by: list[int | None]
    read_by: list[frozenset[int]]

    @classmethod
    def of(cls, facts: FlowFacts) -> _Exchange:
        flow, stages = facts.flow, facts.flow.stages
        made_by: list[int | None] = [None] * len(flow.values)
        read_by: list[set[int]] = [set() for _ in flow.values]
        for index, layer in enumerate(stages):
            if layer is None:
                continue
            for value in flow.results[index]:
                made_by[value] = layer
            for value in flow.operands[index]:
                read_by[facts.value_of[value]].add(layer)
        return cls(made_by, [frozenset(layers) for layers in read_by])

    def directions(self, value: int, layer: int) -> Iterator[bool]:
        """Whether a value goes up and whether it goes down, as far as a layer makes or reads it."""
        made, read = self.made_by[value], self.read_by[value]
        if made is None:
            return
        if made == layer:
            yield from (is_up for is_up in (True, False) if any((other > made) == is_up for other in read - {made}))
        elif layer in read:
            yield layer > made

    def border_bytes(self, flow: LoopFlow, num_layers: int) -> tuple[int, ...]:
        """Bytes of values of the forward and backward phase that cross the lower border of each layer."""
        change = [0] * (num_layers + 1)
        for value, (made, read) in enumerate(zip(self.made_by, self.read_by, strict=True)):
            if made is not None and flow.phases[flow.producer[value]] in (FORWARD, BACKWARD):
                change[min({made, *read}) + 1] += flow.sizes[value]
                change[max({made, *read}) + 1] -= flow.sizes[value]
        return tuple(itertools.accumulate(change[:num_layers]))


class _LayerKeys:
    """A key for each layer: layers with equal keys are equal but for the arguments and the other layers that they have to do
    with. What depends on constants alone is a part of what reads it, wherever it stands."""

    def __init__(self, main: ir.Operation, facts: FlowFacts, exchange: _Exchange) -> None:
        self._facts, self._exchange = facts, exchange
        self._arguments = [
            (value.type, entry.get(ROLE), entry.get(SHARDING))
            for value, entry in zip(body(main).arguments, argument_attributes(main), strict=True)
        ]
        self._next = dict[int, list[int]]()
        for value, argument in zip(facts.flow.operands[-1], result_updates(main), strict=True):
            self._next.setdefault(facts.value_of[value], []).append(-1 if argument is None else argument)
        self._numbers: dict[Hashable, int] = {}  # of what constants make
        self._constants: dict[int, int] = {}  # of values, by these numbers

    def of_layers(self, num_layers: int) -> list[Hashable]:
        """Of each layer, in order."""
        parts: list[list[Hashable]] = [[] for _ in range(num_layers)]
        numbers: list[dict[int, int]] = [{} for _ in range(num_layers)]
        flow = self._facts.flow
        for index, layer in enumerate(flow.stages):
            if layer is None or self._is_constant(index):
                continue
            parts[layer].append((self._what(index), *self._ends(index, layer, numbers[layer])))
        return [tuple(each) for each in parts]

    def _is_constant(self, index: int) -> bool:
        """Whether an op depends on constants alone; its results get numbers then."""
        flow = self._facts.flow
        reads = [self._constants.get(self._facts.value_of[value]) for value in flow.operands[index]]
        if flow.kinds[index] != OP or not flow.results[index] or None in reads:
            return False
        key = self._what(index), *reads
        for position, value in enumerate(flow.results[index]):
            self._constants[value] = self._numbers.setdefault((*key, position), len(self._numbers))
        return True

    def _what(self, index: int) -> Hashable:
        """What an entry of the flow does, whatever it reads."""
        flow = self._facts.flow
        op, kind = flow.ops[index], flow.kinds[index]
        inside = _regions_key(op) if kind == OP and len(op.regions) else ()
        types = tuple(flow.values[value].type for value in flow.results[index])
        return kind, flow.iterations[index], op.name, _attributes(op), inside, types

    def _ends(self, index: int, layer: int, numbers: dict[int, int]) -> Iterator[Hashable]:
        """What an entry reads and who else has its results, values being named by their first use in the layer."""
        flow = self._facts.flow
        for each in flow.operands[index]:
            value = self._facts.value_of[each]
            if value in self._constants:
                yield "constant", self._constants[value]
            elif value in numbers:
                yield numbers[value]
            else:
                numbers[value] = len(numbers)
                yield numbers[value], self._origin(value, layer)
        for value in flow.results[index]:
            numbers[value] = len(numbers)
            yield tuple(self._exchange.directions(value, layer))
            yield tuple(numbers.get(argument, -1) for argument in self._next.get(value, ()))

    def _origin(self, value: int, layer: int) -> Hashable:
        """Where a value comes from that the layer does not make."""
        if value < self._facts.flow.num_arguments:
            return self._arguments[value]
        return self._facts.flow.values[value].type, *self._exchange.directions(value, layer)


def _attributes(op: ir.Operation) -> Hashable:
    """The attributes of an op, without where it belongs."""
    attributes = op.attributes
    items = (attributes[number] for number in range(len(attributes)))
    return tuple((item.name, item.attr) for item in items if item.name not in (LAYER, STAGE))


def _regions_key(op: ir.Operation) -> Hashable:
    """The ops in the regions of an op; values from outside of them are those that the op reads."""
    numbers: dict[ir.Value, int] = {}
    found = list[Hashable]()
    for nested in nested_operations(op):
        reads = tuple(numbers.setdefault(value, len(numbers)) for value in nested.operands)
        makes = tuple((numbers.setdefault(value, len(numbers)), value.type) for value in nested.results)
        found.append((nested.name, _attributes(nested), reads, makes))
    return tuple(found)


@dataclass(frozen=True)
class _ReadLayer:
    """A layer as it was traced.

    Attributes:
        layer: its number.
        program: what it does.
        reading: as a stage.
        number: of each value of the reading that it has, its number in the program.
    """

    layer: int
    program: LayerProgram
    reading: Reading
    number: dict[int, int]


@dataclass(frozen=True)
class _LayerReader:
    """Reads layers of a module in which they are stages."""

    main: ir.Operation
    hosts: HostGroup
    facts: FlowFacts
    exchange: _Exchange

    def read(self, layer: int) -> _ReadLayer:
        """One layer."""
        reading = self._read_program(layer, CostModel())
        problem, arguments = reading.problem, argument_attributes(self.main)
        number: dict[int, int] = {}
        for value in (*problem.inputs, *(v for op in problem.ops for v in (*op.operands, *op.results))):
            number.setdefault(value, len(number))
        roles = tuple(
            ir.StringAttr(arguments[value][ROLE]).value if value < len(arguments) else FROM_LAYER
            for value in problem.inputs
        )
        borders = tuple(
            Border(at, is_up, self.exchange.made_by[value] != layer)
            for value, at in number.items()
            for is_up in self.exchange.directions(value, layer)
        )
        phases = (reading.flow.phases[entry.index] for entry in reading.ops)
        program = LayerProgram(
            problem=_renumbered(problem, number),
            phases=tuple(phase if phase in (FORWARD, BACKWARD) else ONCE for phase in phases),
            roles=roles,
            borders=borders,
        )
        return _ReadLayer(layer, program, reading, number)

    def scaled(self, kinds: Sequence[_ReadLayer], rows: int, new_rows: int) -> tuple[LayerProgram, ...]:
        """The programs of layers for another size of microbatch."""
        dims = [BatchDims(kind.program, tuple(entry.rule for entry in kind.reading.ops)) for kind in kinds]
        follow_rows(dims, rows, new_rows)
        found = list[LayerProgram]()
        for kind, own in zip(kinds, dims, strict=True):
            shapes, flow = own.shapes(rows, new_rows), self.facts.flow
            sizes = {
                flow.values[value]: shapes[kind.number[same]]
                for value, same in enumerate(self.facts.value_of)
                if same in kind.number
            }
            again = self._read_program(kind.layer, _ResizedCostModel(sizes))
            found.append(own.scaled(rows, new_rows, [op.seconds for op in again.problem.ops]))
        return tuple(found)

    def _read_program(self, layer: int, model: CostModel) -> Reading:
        return read_program(self.main, _MESH, self.hosts, 1, _nothing, 1, layer, self.facts, model)


class _ResizedCostModel(CostModel):
    """Costs of ops whose values have other shapes than their types say."""

    def __init__(self, shapes: dict[ir.Value, tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes

    def size_of(self, value: ir.Value) -> TensorSize:
        """Size of a value of `shapes`, or as its type says."""
        typed, shape = self.size(value.type), self._shapes.get(value)
        if shape is None or shape == typed.shape:
            return typed
        elements = math.prod(shape)
        return TensorSize(elements, typed.bytes * elements // typed.elements, typed.dtype, shape)


def _renumbered(problem: ShardingProblem, number: dict[int, int]) -> ShardingProblem:
    """A layer's problem with its own values only, numbered from 0; what comes from other layers costs no load."""

    def known(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(number[value] for value in values if value in number)

    def op_of(op: ShardedOp) -> ShardedOp:
        return replace(op, operands=known(op.operands), results=known(op.results))

    return replace(
        problem,
        values=tuple(problem.values[value] for value in number),
        inputs=known(problem.inputs),
        ops=tuple(map(op_of, problem.ops)),
        updates=tuple((number[value], number[argument]) for value, argument in problem.updates),
        pinned=tuple((number[value], spec) for value, spec in problem.pinned),
        loads=tuple((number[value], seconds) for value, seconds in problem.loads),
        received=(),  # what layers give each other stays on their mesh
        live_out=known(problem.live_out),
        preferred=tuple((number[value], spec) for value, spec in problem.preferred if value in number),
        loop_carried=tuple((number[a], number[b], times) for a, b, times in problem.loop_carried if a in number),
        live_until=tuple((number[value], last) for value, last in problem.live_until if value in number),
        in_place=known(problem.in_place),
    )
