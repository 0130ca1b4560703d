"""Computing layers again: which forward ops the backward phase runs once more, and where it does.

A layer that is computed again starts from what comes into it, behind an optimization barrier, as ``jax.checkpoint`` has it:
without one XLA would see that the same has been computed before. The barrier waits for a gradient, too, so that the layer
is not computed again before its turn, which would give all the memory back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    LAYER,
    NUM_LAYERS,
    PHASE,
    REMAT,
    integer,
    integer_attribute,
    layer_of,
    phase_and_stage,
    read_remat,
    stage_of,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import BARRIER, MATRIX_PRODUCTS
from bactrian.passes.ir.regions import replace_reads
from bactrian.passes.plan.remat_words import KEEP_PRODUCTS, NO_REMAT

_UNREPEATABLE = "stablehlo.rng"  # other bits each time


@dataclass(frozen=True)
class LayersAgain:
    """What `bactrian.remat` says of each op of ``@main``.

    Attributes:
        again: the layer of an op that is computed again if the backward phase reads its result; None for other ops.
        ends: whether an op of such a layer is kept, or comes into the next layer.
    """

    again: list[int | None]
    ends: list[bool]

    @classmethod
    def of(cls, module: ir.Module, flow: MainDataflow) -> LayersAgain:
        """What other layers or stages read of a layer comes into these, and is kept; so are products without batch dims
        in a layer whose word is ``products``.

        Raises:
            PassError: ``bactrian.remat`` has not one word for each layer.
        """
        words = read_remat(module)
        count = integer_attribute(module.operation, NUM_LAYERS)
        if words and len(words) != count:
            raise error_at(
                PassError,
                module.operation,
                f"{REMAT} has {len(words)} words, the program has {count} layers",
                fix="give one word for each layer",
            )
        again: list[int | None] = [None] * len(flow.ops)
        ends = [False] * len(flow.ops)
        if all(word == NO_REMAT for word in words):
            return cls(again, ends)
        layers, users = [layer_of(op) for op in flow.ops], flow.users()
        for index, op in enumerate(flow.ops):
            layer = layers[index]
            if layer is None or words[layer] == NO_REMAT or flow.phases[index] != FORWARD:
                continue
            kept = op.name == _UNREPEATABLE or (words[layer] == KEEP_PRODUCTS and _is_plain_product(op))
            ends[index] = kept or any(
                flow.phases[user] == FORWARD and (layers[user], flow.stages[user]) != (layer, flow.stages[index])
                for value in flow.results[index]
                for user in users[value]
            )
            again[index] = None if ends[index] else layer
        return cls(again, ends)


def _is_plain_product(op: ir.Operation) -> bool:
    """Whether an op is a product without batch dims: a weight's product with activations, not that of two activations."""
    if op.name == "stablehlo.dot_general":
        return not stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"]).lhs_batching_dimensions
    return op.name in MATRIX_PRODUCTS


class Rematerializer:
    """Writes ops of ``@main`` once more, into the backward phase.

    Values and ops are numbers as in the data flow; what is written has the numbers behind these.
    """

    def __init__(self, flow: MainDataflow, constant: Sequence[bool]) -> None:
        self._ops, self._values = list(flow.ops), list(flow.values)
        self._reads = [list(reads) for reads in flow.operands]
        self._results, self._producer = list(flow.results), list(flow.producer)
        self._phases, self._stages = list(flow.phases), list(flow.stages)
        self._layers = [layer_of(op) for op in flow.ops]
        self._users = flow.users()
        self._constant = constant
        # Where an op stands: by the number of an old op, then the order in which new ones are written behind that.
        self._position: list[tuple[int, int]] = [(index, 0) for index in range(len(flow.ops))]

    def write(self, again: Iterable[int], layer: int) -> None:
        """Compute forward ops of one layer and stage again for the backward ops that read what they make.

        Args:
            again: the ops, in their order.
            layer: that they are of. Later layers must have been written before.
        """
        again = list(again)
        made = {value for index in again for value in self._results[index]}
        readers = sorted({user for value in made for user in self._users[value] if self._phases[user] == BACKWARD})
        stage = self._stages[again[0]]
        waiting = self._dependents(readers)
        gate = self._gate(waiting, layer, stage)
        kept = dict.fromkeys(
            value
            for index in again
            for value in self._reads[index]
            if value not in made and not self._is_constant(value)
        )
        inputs = [*kept, *([] if gate is None or gate in kept else [gate])]
        where = self._position[readers[0] if gate is None else self._producer[gate]]
        copy = self._barrier(inputs, stage, layer, where) if inputs else {}
        if gate is not None:
            for user in list(self._users[gate]):
                if user in waiting and self._stages[user] == stage:
                    self._replace(user, gate, copy[gate])
        for index in again:
            op = self._ops[index]
            clone = op.clone(ip=ir.InsertionPoint(op)).operation
            clone.attributes[PHASE] = ir.StringAttr.get(BACKWARD)
            number = self._add(clone, self._reads[index], where)
            for value in dict.fromkeys(self._reads[index]):
                if value in copy:
                    self._replace(number, value, copy[value])
            copy.update(zip(self._results[index], self._results[number], strict=True))
        for reader in readers:
            for value in dict.fromkeys(self._reads[reader]):
                if value in made:
                    self._replace(reader, value, copy[value])

    def _is_constant(self, value: int) -> bool:
        producer = self._producer[value]
        return 0 <= producer < len(self._constant) and self._constant[producer]

    def _dependents(self, readers: Iterable[int]) -> set[int]:
        """The backward ops that can't run before a layer is computed again."""
        found, stack = set[int](), list(readers)
        while stack:
            index = stack.pop()
            if index not in found:
                found.add(index)
                users = (user for value in self._results[index] for user in self._users[value])
                stack.extend(user for user in users if self._phases[user] == BACKWARD)
        return found

    def _gate(self, waiting: set[int], layer: int, stage: int | None) -> int | None:
        """The last gradient that comes to a layer, of those that do not need the layer: it is computed again then.

        None for a layer whose gradients all begin in it.
        """
        candidates = [
            value
            for index in waiting
            if self._layers[index] == layer and self._stages[index] == stage and self._phases[index] == BACKWARD
            for value in self._reads[index]
            if (producer := self._producer[value]) >= 0
            and self._phases[producer] == BACKWARD
            and producer not in waiting
            and not self._is_constant(value)
        ]
        return max(candidates, key=lambda value: (self._position[self._producer[value]], value), default=None)

    def _barrier(self, inputs: list[int], stage: int | None, layer: int, where: tuple[int, int]) -> dict[int, int]:
        """Forward values through a barrier; gives the new values by the old ones."""
        assert stage is not None  # ops that are computed again have one
        values = [self._values[value] for value in inputs]
        first = self._ops[0]
        op = ir.Operation.create(
            BARRIER,
            results=[value.type for value in values],
            operands=values,
            attributes={**phase_and_stage(BACKWARD, stage), LAYER: integer(layer)},
            loc=first.location,
            ip=ir.InsertionPoint(first),
        )
        number = self._add(op, inputs, where)
        return dict(zip(inputs, self._results[number], strict=True))

    def _add(self, op: ir.Operation, reads: Sequence[int], where: tuple[int, int]) -> int:
        """Give a new op and its results their numbers."""
        number, first = len(self._ops), len(self._values)
        self._ops.append(op)
        self._values.extend(op.results)
        self._results.append(range(first, len(self._values)))
        self._producer.extend([number] * len(self._results[number]))
        self._users.extend([] for _ in self._results[number])
        self._reads.append(list(reads))
        for value in dict.fromkeys(reads):
            self._users[value].append(number)
        self._phases.append(BACKWARD)
        self._stages.append(stage_of(op))
        self._layers.append(layer_of(op))
        self._position.append((where[0], number))
        return number

    def _replace(self, reader: int, old: int, new: int) -> None:
        """Let an op read another value."""
        replace_reads(self._ops[reader], self._values[old], self._values[new])
        self._reads[reader] = [new if value == old else value for value in self._reads[reader]]
        self._users[old].remove(reader)
        self._users[new].append(reader)

    def order(self) -> None:
        """Bring all ops into an order in which each stands behind what it reads, the old ones as far as possible as
        before."""
        waits = [0] * len(self._ops)
        readers: list[list[int]] = [[] for _ in self._ops]
        for index, reads in enumerate(self._reads):
            producers = {self._producer[value] for value in reads} - {-1}
            waits[index] = len(producers)
            for producer in producers:
                readers[producer].append(index)
        ready = [(self._position[index], index) for index, count in enumerate(waits) if not count]
        heapq.heapify(ready)
        block = self._ops[0].block
        while ready:
            _, index = heapq.heappop(ready)
            block.append(self._ops[index])
            for reader in readers[index]:
                waits[reader] -= 1
                if not waits[reader]:
                    heapq.heappush(ready, (self._position[reader], reader))
        assert not any(waits), "ops that are computed again wait for each other"
