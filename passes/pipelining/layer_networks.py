"""The cost network of one layer on a mesh, with nodes for its borders and a price for memory; and what a choice takes.

Many equal layers in a row are solved as a *ring*: the upper border of a layer is its own lower border, so that what it
gives is sharded as what it gets. In the middle of a long stage that is what each layer does. The same tie holds between
different layers: on one mesh, all border values of one shape that go the same way are sharded alike, by whatever layer was
solved first; the others are solved with that given. So any layers fit behind each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.network.problem import CostNetwork
from bactrian.passes.pipelining.layers import (
    BACKWARD,
    FORWARD,
    FROM_LAYER,
    ONCE,
    Border,
    LayerProgram,
    is_plain_product,
)
from bactrian.passes.sharding.sharding_model import ShardingModel, ShardingProblem
from bactrian.passes.spmd.reshard_paths import local_bytes

_Array = np.ndarray[Any, Any]

STATIC, KEPT, WORKING = "static", "kept", "working"
"""How long memory is held: all step long, by each microbatch in flight, or while somebody needs it."""


@dataclass(frozen=True)
class BorderClass:
    """Border values that are sharded alike: those of one shape and size that go the same way."""

    shape: tuple[int, ...]
    nbytes: int
    is_up: bool


BorderSpecs = Mapping[BorderClass, Spec]


@dataclass(frozen=True)
class LayerUsage:
    """What a layer takes of one device.

    Attributes:
        forward, backward: seconds of one microbatch.
        once: seconds once per step.
        cheap_forward: seconds of the part of forward that is no plain matrix product.
        static, kept: bytes that are there all step long, and for each microbatch in flight.
        kept_inputs: of ``kept``, what comes from lower layers and from the batch.
        products: bytes that plain matrix products of the forward phase make.
        working: bytes of all else at the fullest moment.
    """

    forward: float
    backward: float
    once: float
    cheap_forward: float
    static: float
    kept: float
    kept_inputs: float
    products: float
    working: float


@dataclass(frozen=True)
class LayerNetwork:
    """A layer on a mesh.

    Attributes:
        layer: its program.
        mesh: the devices.
        microbatches: of a step: how often forward and backward count.
    """

    layer: LayerProgram
    mesh: Mesh
    microbatches: int

    @cached_property
    def model(self) -> ShardingModel:
        """The model of the layer's ops, weighted by how often they run in a step."""
        return ShardingModel(_weighted(self.layer, self.microbatches), self.mesh)

    @cached_property
    def held(self) -> tuple[str, ...]:
        """How long each node of the model's network holds its memory."""
        layer, kept = self.layer, self.layer.kept
        found = list[str]()
        for value, role in zip(layer.problem.inputs, layer.roles, strict=True):
            passing = role in (FROM_LAYER, "batch")
            found.append(STATIC if not passing else KEPT if value in kept else WORKING)
        for _, at, _ in self.model.op_nodes():
            op = layer.problem.ops[at]
            found.append(STATIC if op.live_whole_step else WORKING if kept.isdisjoint(op.results) else KEPT)
        return tuple(found)

    @cached_property
    def classes(self) -> tuple[BorderClass, ...]:
        """Those of the layer's borders, without scalars."""
        return tuple(dict.fromkeys(self.class_of(border) for border in self._borders()))

    def _borders(self) -> Iterator[Border]:
        values = self.layer.problem.values
        return (border for border in self.layer.borders if values[border.value].shape)

    def class_of(self, border: Border) -> BorderClass:
        """The class of a border value."""
        tensor = self.layer.problem.values[border.value]
        return BorderClass(tensor.shape, tensor.nbytes, border.is_up)

    @cached_property
    def tied(self) -> CostNetwork:
        """The model's network, and for each class of border values a node that says how they are sharded."""
        network, model = self.model.network, self.model
        costs, usages, intervals = list(network.costs), list(network.usages), list(network.intervals)
        edges, matrices = list(network.edges), list(network.edge_costs)
        nodes = dict[BorderClass, tuple[int, tuple[Spec, ...]]]()
        for border in self._borders():
            found = model.specs_of(border.value)
            if found is None:
                continue  # a constant has any sharding
            node, specs = found
            table, kind = model.tables[border.value], self.class_of(border)
            if kind not in nodes:
                nodes[kind] = len(costs), _in_order(table.specs, self.mesh)
                costs.append(np.zeros(len(nodes[kind][1])))
                usages.append(np.zeros(len(nodes[kind][1]), np.int64))
                intervals.append((0, 0))
            of_class, labels = nodes[kind]
            if border.is_input:
                between = np.where([[spec == label for label in labels] for spec in specs], 0.0, np.inf)
            else:
                index = np.ix_([table.number[spec] for spec in specs], [table.number[label] for label in labels])
                between = self.microbatches * table.seconds[index]
            edges.append((node, of_class))
            matrices.append(between)
        return CostNetwork(tuple(costs), tuple(usages), tuple(intervals), tuple(edges), tuple(matrices), None)

    def priced(self, price: float, in_flight: float, given: BorderSpecs) -> CostNetwork:
        """The network with memory as a cost, in seconds per byte, and some classes of borders given.

        Args:
            price: of a byte that is there all step long.
            in_flight: how many microbatches keep what each keeps.
            given: specs of classes that other layers have decided.
        """
        tied = self.tied
        costs = list(tied.costs)
        for node, what in enumerate(self.held):
            rate = {STATIC: price, KEPT: in_flight * price, WORKING: 0.0}[what]
            costs[node] = costs[node] + rate * tied.usages[node]
        for number, kind in enumerate(self.classes, len(self.held)):
            if kind in given:
                labels = self.labels(kind)
                costs[number] = np.where([label == given[kind] for label in labels], 0.0, np.inf)
        return replace(tied, costs=tuple(costs))

    def labels(self, kind: BorderClass) -> tuple[Spec, ...]:
        """The specs of a class, in the order of its node's strategies."""
        return _in_order(self._table(kind).specs, self.mesh)

    def _table(self, kind: BorderClass) -> Any:
        value = next(border.value for border in self._borders() if self.class_of(border) == kind)
        return self.model.tables[value]

    def border_specs(self, choice: Sequence[int]) -> dict[BorderClass, Spec]:
        """What a choice of `tied` says of the borders."""
        return {kind: self.labels(kind)[choice[node]] for node, kind in enumerate(self.classes, len(self.held))}

    def usage(self, choice: Sequence[int]) -> LayerUsage:
        """What a choice of `tied` takes, added up by phase and by kind of memory."""
        seconds, products, cheap = self._seconds(choice)
        network = self.model.network
        held = {STATIC: 0.0, KEPT: 0.0}
        change = np.zeros(len(self.layer.problem.ops) + 2)
        for what, usages, (first, end), k in zip(self.held, network.usages, network.intervals, choice, strict=False):
            if what in held:
                held[what] += float(usages[k])
            elif first < end:
                change[first] += usages[k]
                change[end] -= usages[k]
        inputs = zip(self.held, self.layer.roles, network.usages, choice, strict=False)
        kept_inputs = sum(float(usages[k]) for what, _, usages, k in inputs if what == KEPT)
        return LayerUsage(
            forward=seconds[FORWARD],
            backward=seconds[BACKWARD],
            once=seconds[ONCE],
            cheap_forward=cheap,
            static=held[STATIC],
            kept=held[KEPT],
            kept_inputs=kept_inputs,
            products=products,
            working=float(np.cumsum(change).max()),
        )

    def _seconds(self, choice: Sequence[int]) -> tuple[dict[str, float], float, float]:
        """Seconds by phase; bytes of plain products; seconds of the rest of forward."""
        model, layer = self.model, self.layer
        chosen = model.shardings(choice[: len(self.held)])
        specs = dict(chosen.arguments)
        seconds: dict[str, float] = dict.fromkeys((FORWARD, BACKWARD, ONCE), 0.0)
        products, cheap = 0.0, 0.0
        for op, strategy, phase in zip(layer.problem.ops, chosen.chosen, layer.phases, strict=True):
            if strategy is None:
                continue
            cost = op.runs_per_step * (model.computing(op, strategy) + strategy.sending_seconds)
            for position, (value, needed) in enumerate(zip(op.operands, strategy.operands, strict=True)):
                if value in specs:
                    table = model.tables[op.resharded(position)]
                    move = float(table.seconds[table.number[specs[value]], table.number[needed]])
                    cost += op.reshards_of(position) * move
            specs.update(zip(op.results, strategy.results, strict=True))
            seconds[phase] += cost
            if phase == FORWARD and is_plain_product(op):
                products += sum(
                    local_bytes(layer.problem.values[value].nbytes, specs[value], self.mesh) for value in op.results
                )
            elif phase == FORWARD:
                cheap += cost
        for value, argument in layer.problem.updates:
            if value in specs:
                table = model.tables[value]
                seconds[ONCE] += float(table.seconds[table.number[specs[value]], table.number[specs[argument]]])
        borders = self.border_specs(choice)
        for border in self._borders():
            if not border.is_input and border.value in specs:
                table = model.tables[border.value]
                label = borders[self.class_of(border)]
                phase = FORWARD if border.is_up else BACKWARD
                seconds[phase] += float(table.seconds[table.number[specs[border.value]], table.number[label]])
        return seconds, products, cheap


def _weighted(layer: LayerProgram, microbatches: int) -> ShardingProblem:
    """A layer's problem, its ops weighted by how often they run in a step."""
    ops = list[Any]()
    for op, phase in zip(layer.problem.ops, layer.phases, strict=True):
        times = 1 if phase == ONCE else microbatches
        moves = None if op.reshards_per_step is None else tuple(times * move for move in op.reshards_per_step)
        ops.append(replace(op, runs_per_step=times * op.runs_per_step, reshards_per_step=moves))
    loads = tuple((value, microbatches * seconds) for value, seconds in layer.problem.loads)
    return replace(layer.problem, ops=tuple(ops), loads=loads)


def _in_order(specs: Sequence[Spec], mesh: Mesh) -> tuple[Spec, ...]:
    """The specs that leave nothing unreduced and have the axes of each dim in the mesh's order."""
    position = mesh.position
    return tuple(
        spec
        for spec in specs
        if not spec.unreduced and all(list(axes) == sorted(axes, key=position.__getitem__) for axes in spec.dims)
    )
