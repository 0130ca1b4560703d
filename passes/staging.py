"""Which stage function every op goes to, and which values cross from one function to another.

The analysis behind ``split-stages``: it reads ``@main`` and changes nothing but the update's rounds.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from jaxlib.mlir import ir

from bactrian.passes.cloning import clone_into_readers, is_boundary_or_return, is_elementwise
from bactrian.passes.errors import PassError
from bactrian.passes.program import (
    BACKWARD,
    BOUNDARY,
    FORWARD,
    INITIALIZE,
    MICROBATCH_INDEX,
    UPDATE,
    Dataflow,
    argument_homes,
    custom_call_target,
    integer,
    integer_attribute,
    phase_of,
    required_integer,
    result_updates,
    string_attribute,
    value_bytes,
)

FUSED = "forward_backward"
_ROUND = "bactrian.round"


@dataclass(frozen=True, order=True)
class FunctionKey:
    """A stage function, ordered as the functions run within one step of one microbatch."""

    order: tuple[int, int, int]
    stage: int = field(compare=False)
    phase: str = field(compare=False)
    round: int = field(compare=False, default=0)

    @property
    def symbol(self) -> str:
        """The function's name, such as ``stage0.forward`` or ``stage1.update_2``."""
        suffix = f"_{self.round}" if self.round else ""
        return f"stage{self.stage}.{self.phase}{suffix}"


def function_key(stage: int, phase: str, round_: int) -> FunctionKey:
    """The key of a function at its place in the order of work."""
    rank = {INITIALIZE: 0, FORWARD: 1, FUSED: 2, BACKWARD: 3, UPDATE: 4}[phase]
    place = (rank, -stage, 0) if phase == BACKWARD else (rank, round_, stage)
    return FunctionKey(place, stage, phase, round_)


@dataclass(frozen=True)
class Crossing:
    """A value that another stage reads: once per microbatch, or (``once``) at the end of the step."""

    value: int
    source: int
    target: int
    once: bool


@dataclass
class StageFunction:
    """One function to be: its ops, the values it takes from elsewhere and those it gives away."""

    key: FunctionKey
    ops: list[int] = field(default_factory=list[int])
    inputs: list[int] = field(default_factory=list[int])
    outputs: list[int] = field(default_factory=list[int])
    index_ops: list[int] = field(default_factory=list[int])


@dataclass
class Staging:
    """The whole split: functions in order, crossings, argument pieces and result pieces (number, stage, value)."""

    flow: Dataflow
    functions: list[StageFunction]
    crossings: list[Crossing]
    argument_pieces: list[tuple[int, int]]
    result_pieces: list[tuple[int, int, int]]
    home: dict[int, FunctionKey]
    through: dict[int, int]
    sizes: list[int]


def analyze(main: ir.Operation, num_stages: int, fuse_last: bool) -> Staging:
    """Decide which function every op goes to and what crosses."""
    _assign_rounds(main)
    flow = Dataflow.of(main)
    through = _through_boundary(flow)
    keys = [_key(op, num_stages, fuse_last) for op in flow.ops]
    functions = _collect(flow, keys)
    home = {value: key for index, key in enumerate(keys) if key is not None for value in flow.results[index]}
    pieces: set[tuple[int, int]] = set()
    crossings: dict[Crossing, None] = {}
    outgoing: dict[FunctionKey, set[int]] = {key: set() for key in functions}
    for key, function in functions.items():
        taken: set[int] = set()
        for index in function.ops:
            for read in flow.operands[index]:
                value = through.get(read, read)
                if value < flow.num_arguments:
                    pieces.add((value, key.stage))
                    taken.add(value)
                    continue
                source = home[value]
                if source == key:
                    continue
                _check_order(flow, value, source, key)
                taken.add(value)
                outgoing[source].add(value)
                if source.stage != key.stage:
                    crossings[Crossing(value, source.stage, key.stage, key.phase == UPDATE)] = None
        function.inputs = sorted(taken)
    result_pieces = _result_pieces(flow, main, num_stages, through, home, pieces, crossings, outgoing)
    for key, function in functions.items():
        function.outputs = sorted(outgoing[key])
    sizes = [value_bytes(value) for value in flow.values]
    ordered = [functions[key] for key in sorted(functions)]
    return Staging(flow, ordered, list(crossings), sorted(pieces), result_pieces, home, through, sizes)


def _key(op: ir.Operation, num_stages: int, fuse_last: bool) -> FunctionKey | None:
    if is_boundary_or_return(op):
        return None
    stage = required_integer(op, "bactrian.stage", "assign-stages")
    phase = phase_of(op)
    if phase is None:
        raise PassError(f"{op.name} has no phase", where=str(op.location), fix="run infer-phases first")
    if fuse_last and stage == num_stages - 1 and phase in (FORWARD, BACKWARD):
        phase = FUSED
    return function_key(stage, phase, integer_attribute(op, _ROUND) or 0)


def _collect(flow: Dataflow, keys: list[FunctionKey | None]) -> dict[FunctionKey, StageFunction]:
    functions: dict[FunctionKey, StageFunction] = {}
    for index, key in enumerate(keys):
        if key is None:
            continue
        function = functions.setdefault(key, StageFunction(key))
        if custom_call_target(flow.ops[index]) == MICROBATCH_INDEX:
            function.index_ops.append(index)
        function.ops.append(index)
    return functions


def _through_boundary(flow: Dataflow) -> dict[int, int]:
    """Each result of the boundary is the operand it stands for."""
    for index, op in enumerate(flow.ops):
        if custom_call_target(op) == BOUNDARY:
            return dict(zip(flow.results[index], flow.operands[index], strict=True))
    raise PassError("@main has no gradient boundary", fix="run verify-program first")


def _check_order(flow: Dataflow, value: int, source: FunctionKey, reader: FunctionKey) -> None:
    if not source < reader:
        raise PassError(
            f"{reader.symbol} reads a value that {source.symbol} computes later",
            where=str(flow.values[value].location),
            why="layers of the forward phase must not go down, those of the backward phase not up",
        )


def _result_pieces(
    flow: Dataflow,
    main: ir.Operation,
    num_stages: int,
    through: dict[int, int],
    home: dict[int, FunctionKey],
    pieces: set[tuple[int, int]],
    crossings: dict[Crossing, None],
    outgoing: dict[FunctionKey, set[int]],
) -> list[tuple[int, int, int]]:
    """Where every result is kept: new state on every stage that has the old one, anything else where it is made."""
    updates = result_updates(main)
    homes = argument_homes(main)
    held = {(argument, stage) for argument, stages in homes.items() for stage in stages if stage < num_stages}
    values = [through.get(read, read) for read in flow.operands[-1]]
    while True:  # a result that is an argument adds a piece of it, which has to be brought up to date in turn
        known = len(pieces)
        places = [_places(v, u, flow.num_arguments, home, pieces | held) for v, u in zip(values, updates, strict=True)]
        for value, stages in zip(values, places, strict=True):
            if value < flow.num_arguments:
                pieces.update((value, stage) for stage in stages)
        if len(pieces) == known:
            break
    found: list[tuple[int, int, int]] = []
    for result, (value, stages) in enumerate(zip(values, places, strict=True)):
        found.extend((result, stage, value) for stage in stages)
        if value >= flow.num_arguments:
            source = home[value]
            outgoing[source].add(value)
            crossings.update((Crossing(value, source.stage, s, True), None) for s in stages if s != source.stage)
    return found


def _places(
    value: int, updated: int | None, num_arguments: int, home: dict[int, FunctionKey], pieces: set[tuple[int, int]]
) -> list[int]:
    """The stages that keep a result with this value, the next one of argument ``updated``."""
    readers = sorted(stage for argument, stage in pieces if argument == updated)
    if readers:
        return readers
    if value >= num_arguments:
        return [home[value].stage]
    return [min((stage for argument, stage in pieces if argument == value), default=0)]


def _assign_rounds(main: ir.Operation) -> None:
    """Number the update's rounds: an op that needs another stage's update result runs a round later.

    As early as possible first, then ops that only feed later rounds sink there, and elementwise ops on values that all
    rounds can read are computed in each round, so that no large intermediate is kept between two rounds.
    """
    flow = Dataflow.of(main)
    updates = [string_attribute(op, "bactrian.phase") == UPDATE for op in flow.ops]
    stages = [integer_attribute(op, "bactrian.stage") for op in flow.ops]
    rounds = [0] * len(flow.ops)
    for index, reads in enumerate(flow.operands):
        if updates[index]:
            for value in reads:
                source = flow.producer[value]
                if source >= 0 and updates[source]:
                    rounds[index] = max(rounds[index], rounds[source] + (stages[source] != stages[index]))
    if not any(rounds):
        return
    users = flow.users()
    last = len(flow.ops) - 1
    for index in range(last - 1, -1, -1):
        readers = [user for value in flow.results[index] for user in users[value]]
        if updates[index] and readers and last not in readers:
            bound = min(rounds[user] - (stages[user] != stages[index]) for user in readers)
            rounds[index] = max(rounds[index], bound)
    for index, op in enumerate(flow.ops):
        if updates[index] and rounds[index]:
            op.attributes[_ROUND] = integer(rounds[index])
    clone_into_readers(main, _round_key, _copy_round, _Recomputable(flow, updates))


def _round_key(op: ir.Operation) -> Hashable:
    if string_attribute(op, "bactrian.phase") != UPDATE:
        return None
    return integer_attribute(op, "bactrian.stage"), integer_attribute(op, _ROUND) or 0


def _copy_round(clone: ir.Operation, reader: ir.Operation) -> None:
    if _ROUND in reader.attributes:
        clone.attributes[_ROUND] = reader.attributes[_ROUND]


class _Recomputable:
    """Elementwise update ops, at most a few deep, on arguments and accumulated values."""

    _MAX_DEPTH = 3

    def __init__(self, flow: Dataflow, updates: list[bool]) -> None:
        depth = [0] * len(flow.values)
        self._allowed: set[ir.Operation] = set()
        for index, op in enumerate(flow.ops):
            if not updates[index]:
                continue
            level = 1 + max((depth[value] for value in flow.operands[index]), default=-1)
            if not is_elementwise(op):
                level = self._MAX_DEPTH + 1
            for result in flow.results[index]:
                depth[result] = level
            if level <= self._MAX_DEPTH:
                self._allowed.add(op)

    def __call__(self, op: ir.Operation, key: Hashable) -> bool:
        """Whether the op may be computed again in the reader's round, which must be on its own stage."""
        return isinstance(key, tuple) and key[0] == integer_attribute(op, "bactrian.stage") and op in self._allowed
