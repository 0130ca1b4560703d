"""What a layer of a program is to the planner: its ops in all phases, and what it exchanges with other layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bactrian.passes.sharding.sharding_model import ShardedOp, ShardingProblem

FORWARD, BACKWARD, ONCE = "forward", "backward", "once"
"""When the ops of a layer run: with each microbatch, or once per step."""

FROM_LAYER = "layer"
"""The role of an input that another layer makes."""


@dataclass(frozen=True)
class Border:
    """A value that a layer gets from others, or gives to them.

    Attributes:
        value: its number in the layer's problem.
        is_up: it goes from a lower layer to a higher one, as activations do; their gradients go down.
        is_input: another layer makes it.
    """

    value: int
    is_up: bool
    is_input: bool


@dataclass(frozen=True)
class LayerProgram:
    """One layer: its forward and backward ops for one microbatch, and its update.

    It knows neither a mesh, nor how many microbatches there are, nor how many of them are in flight. Equal layers are
    equal.

    Attributes:
        problem: the ops as the sharding model sees them, values numbered from 0; what other layers make is an input.
        phases: of each op `FORWARD`, `BACKWARD` or `ONCE`.
        roles: of each input ``state``, ``batch``, ``constant`` or `FROM_LAYER`.
        borders: what the layer exchanges with others.
    """

    problem: ShardingProblem
    phases: tuple[str, ...]
    roles: tuple[str, ...]
    borders: tuple[Border, ...]

    @cached_property
    def kept(self) -> frozenset[int]:
        """Values that wait for the backward phase, one for each microbatch in flight: what the layer's own backward ops
        read of the batch, of lower layers and of its forward ops."""
        ops = list(zip(self.problem.ops, self.phases, strict=True))
        there = {number for number, role in zip(self.problem.inputs, self.roles, strict=True) if role == "batch"}
        there |= {border.value for border in self.borders if border.is_input and border.is_up}
        there |= {value for op, phase in ops if phase == FORWARD for value in op.results}
        read = {value for op, phase in ops if phase == BACKWARD for value in op.operands}
        return frozenset(there & read)

    @cached_property
    def seconds(self) -> float:
        """Of forward and backward of one microbatch on one device."""
        ops = zip(self.problem.ops, self.phases, strict=True)
        return sum(op.runs_per_step * op.seconds for op, phase in ops if phase != ONCE)


@dataclass(frozen=True)
class ProgramLayers:
    """All layers of a program.

    Attributes:
        kinds: the different layers, in the order in which they first come.
        kind_of: of each layer the number of its kind.
        border_bytes: of each layer, what crosses its lower border for a microbatch, up and down; 0 for the first.
        rows: of the batch in a microbatch.
    """

    kinds: tuple[LayerProgram, ...]
    kind_of: tuple[int, ...]
    border_bytes: tuple[int, ...]
    rows: int

    @property
    def num_layers(self) -> int:
        """All of them."""
        return len(self.kind_of)


def is_plain_product(op: ShardedOp) -> bool:
    """Whether an op is a matrix product without batch dims: what ``jax.checkpoint`` policies call a dot with no batch dims."""
    rule = op.rule
    if rule is None or not rule.reduction or len(rule.operands) != 2:
        return False
    left, right, result = ({factor for dim in dims for factor in dim} for dims in (*rule.operands, rule.results[0]))
    return not left & right & result and bool(left & right) and len(left) > 1 and len(right) > 1
