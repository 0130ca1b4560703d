"""Which stage function every op goes to, and which values cross from one function to another.

The analysis behind ``split-stages``: it reads ``@main`` and changes nothing but the update's rounds.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from jaxlib.mlir import ir

from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    FUSED,
    INITIALIZE,
    MICROBATCH_INDEX,
    NUM_STAGES,
    PHASE,
    PREPARE,
    ROUND,
    STAGE,
    UPDATE,
    argument_pinned_stages,
    integer,
    phase_of,
    required_phase,
    result_updates,
    round_of,
    stage_of,
)
from bactrian.passes.ir.cloning import clone_into_readers, is_elementwise, required_stages
from bactrian.passes.ir.gradient_boundary_op import find_boundary
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.meshes import mesh_name, value_shardings
from bactrian.passes.ir.regions import custom_call_target
from bactrian.passes.stages.counters import counters


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
    rank = (PREPARE, INITIALIZE, FORWARD, FUSED, BACKWARD, UPDATE).index(phase)
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
class FunctionPartition:
    """The whole split. Values, ops, arguments and results are numbers, those of ``flow`` and of the captured ``@main``.

    Attributes:
        flow: the data flow of the captured ``@main``.
        functions: in the order of their work.
        crossings: what is transferred.
        argument_pieces: (argument, stage): each stage that reads an argument has a piece of it.
        result_pieces: (result, stage, value): each stage that keeps a result, and the value that it returns for it.
        producer: the function that computes a value.
        through: for each value that only gives another one its name (a result of the boundary, a reshard from mesh to
            mesh), that other value.
        sizes: bytes of each value.
        received: (value, stage): the sharding in which a stage has a value that another stage computes.
        whole: one function does everything, once per step: forward, backward and update.
    """

    flow: MainDataflow
    functions: list[StageFunction]
    crossings: list[Crossing]
    argument_pieces: list[tuple[int, int]]
    result_pieces: list[tuple[int, int, int]]
    producer: dict[int, FunctionKey]
    through: dict[int, int]
    sizes: list[int]
    received: dict[tuple[int, int], ir.Attribute] = field(default_factory=dict[tuple[int, int], ir.Attribute])
    whole: bool = False


def analyze(main: ir.Operation, fused: Sequence[frozenset[str]]) -> FunctionPartition:
    """Decide which function every op goes to and what crosses.

    Args:
        main: the captured function, with stages and phases.
        fused: by stage, the phases that are one function. With the update among them that function is all of the step
            (one stage and one microbatch), and XLA can fuse as it fuses a plain step.
    """
    flow = _assign_rounds(main)
    through = _through_boundary(flow, main)
    received = _received(flow, main, through)
    keys = _function_keys(flow, fused, through)
    functions = _collect(flow, keys)
    producer = {value: key for index, key in enumerate(keys) if key is not None for value in flow.results[index]}
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
                source = producer[value]
                if source is key:
                    continue
                _check_order(flow.ops[index], source, key)
                taken.add(value)
                outgoing[source].add(value)
                if source.stage != key.stage:
                    crossings[Crossing(value, source.stage, key.stage, key.phase == UPDATE)] = None
        function.inputs = sorted(taken)
    result_pieces = _result_pieces(flow, main, len(fused), through, producer, pieces, crossings, outgoing)
    for key, function in functions.items():
        function.outputs = sorted(outgoing[key])
    ordered = [functions[key] for key in sorted(functions)]
    whole = any(UPDATE in phases for phases in fused)
    return FunctionPartition(
        flow, ordered, list(crossings), sorted(pieces), result_pieces, producer, through, flow.sizes, received, whole
    )


def _received(flow: MainDataflow, main: ir.Operation, through: dict[int, int]) -> dict[tuple[int, int], ir.Attribute]:
    """Reshards from one mesh to another are transfers: the values are one, as the boundary's are."""
    found: dict[tuple[int, int], ir.Attribute] = {}
    resharded = [index for index, op in enumerate(flow.ops) if op.name == "sdy.reshard"]
    if not resharded:
        return found
    shardings = value_shardings(main, flow.values)
    arrived = set[int]()  # what a transfer has made: what is moved from there on stays on its mesh
    for index in resharded:
        read, made = flow.operands[index][0], flow.results[index][0]
        value, stage = through.get(read, read), flow.stages[index]
        before, after = shardings[read if read in arrived else value], shardings[made]
        if before is not None and after is not None and stage is not None and mesh_name(before) != mesh_name(after):
            through[made] = value
            arrived.add(made)
            found[value, stage] = after
    return found


def _function_keys(
    flow: MainDataflow, fused: Sequence[frozenset[str]], through: dict[int, int]
) -> list[FunctionKey | None]:
    """The function of each op, one key object per function; None for the boundary and the return."""
    known: dict[tuple[int, str, int], FunctionKey] = {}
    keys: list[FunctionKey | None] = []
    for index, (op, stage, phase) in enumerate(zip(flow.ops, required_stages(flow), flow.phases, strict=True)):
        results = flow.results[index]
        if stage is None or (len(results) == 1 and results[0] in through):
            keys.append(None)
            continue
        if phase is None:
            phase = required_phase(op)  # says what is missing
        if not 0 <= stage < len(fused):
            raise error_at(
                PassError,
                op,
                f"{op.name} has {STAGE} = {stage}, the module has {len(fused)} stages",
                fix=f"check {STAGE} and {NUM_STAGES}",
            )
        if phase in fused[stage] or UPDATE in fused[stage]:
            phase = FUSED
        round_ = round_of(op) if phase == UPDATE else 0
        place = stage, phase, round_
        if place not in known:
            known[place] = function_key(stage, phase, round_)
        keys.append(known[place])
    return keys


def _collect(flow: MainDataflow, keys: list[FunctionKey | None]) -> dict[FunctionKey, StageFunction]:
    functions: dict[FunctionKey, StageFunction] = {}
    for index, key in enumerate(keys):
        if key is None:
            continue
        function = functions.get(key)
        if function is None:
            function = functions[key] = StageFunction(key)
        if custom_call_target(flow.ops[index]) == MICROBATCH_INDEX:
            function.index_ops.append(index)
        function.ops.append(index)
    return functions


def _through_boundary(flow: MainDataflow, main: ir.Operation) -> dict[int, int]:
    """Each result of the boundary is the operand it stands for."""
    if flow.boundary < 0:
        find_boundary(main)  # says so
    return dict(zip(flow.results[flow.boundary], flow.operands[flow.boundary], strict=True))


def _check_order(op: ir.Operation, source: FunctionKey, reader: FunctionKey) -> None:
    if not source < reader:
        raise error_at(
            PassError,
            op,
            f"{reader.phase} op in stage {reader.stage} reads a {source.phase} value of stage {source.stage}",
            why="a forward op may only read values of its own or earlier stages, a backward op of its own or later ones",
            fix=f"check {STAGE} and {PHASE}",
        )


def _result_pieces(
    flow: MainDataflow,
    main: ir.Operation,
    num_stages: int,
    through: dict[int, int],
    producer: dict[int, FunctionKey],
    pieces: set[tuple[int, int]],
    crossings: dict[Crossing, None],
    outgoing: dict[FunctionKey, set[int]],
) -> list[tuple[int, int, int]]:
    """Where every result is kept: new state on every stage that has the old one, anything else where it is made.

    A stage that computes the same counter for itself keeps its own; everything else is sent by the stage that makes it.
    """
    updates = result_updates(main)
    pinned = argument_pinned_stages(main)
    held = {(argument, stage) for argument, stages in pinned.items() for stage in stages if stage < num_stages}
    values = [through.get(read, read) for read in flow.operands[-1]]
    while True:  # a result that is an argument adds a piece of it, which has to be brought up to date in turn
        known = len(pieces)
        stages: dict[int, list[int]] = {}
        for argument, stage in sorted(pieces | held):
            stages.setdefault(argument, []).append(stage)
        places = [_places(v, u, flow.num_arguments, producer, stages) for v, u in zip(values, updates, strict=True)]
        for value, kept in zip(values, places, strict=True):
            if value < flow.num_arguments:
                pieces.update((value, stage) for stage in kept)
        if len(pieces) == known:
            break
    own = counters(flow)
    found: list[tuple[int, int, int]] = []
    for result, (value, kept) in enumerate(zip(values, places, strict=True)):
        for stage in kept:
            made = value
            if value >= flow.num_arguments and producer[value].stage != stage:
                made = own.get((result, stage), value)
                if made == value:
                    crossings[Crossing(value, producer[value].stage, stage, True)] = None
            if made >= flow.num_arguments:
                outgoing[producer[made]].add(made)
            found.append((result, stage, made))
    return found


def _places(
    value: int, updated: int | None, num_arguments: int, producer: dict[int, FunctionKey], stages: dict[int, list[int]]
) -> list[int]:
    """The stages that keep a result with this value, the next one of argument ``updated``."""
    if updated in stages:
        return stages[updated]
    if value >= num_arguments:
        return [producer[value].stage]
    return stages.get(value, [0])[:1]


def _assign_rounds(main: ir.Operation) -> MainDataflow:
    """Number the update's rounds: an op that needs another stage's update result runs a round later.

    As early as possible first, then ops that only feed later rounds sink there, and elementwise ops on values that all
    rounds can read are computed in each round, so that no large intermediate is kept between two rounds.

    Returns:
        The data flow afterwards.
    """
    flow = MainDataflow.of(main)
    updates = [phase == UPDATE for phase in flow.phases]
    stages = flow.stages
    rounds = [0] * len(flow.ops)
    for index, reads in enumerate(flow.operands):
        if updates[index]:
            for value in reads:
                source = flow.producer[value]
                if source >= 0 and updates[source]:
                    rounds[index] = max(rounds[index], rounds[source] + (stages[source] != stages[index]))
    if not any(rounds):
        return flow
    users = flow.users()
    last = len(flow.ops) - 1
    for index in range(last - 1, -1, -1):
        readers = [user for value in flow.results[index] for user in users[value]]
        if updates[index] and readers and last not in readers:
            bound = min(rounds[user] - (stages[user] != stages[index]) for user in readers)
            rounds[index] = max(rounds[index], bound)
    for index, op in enumerate(flow.ops):
        if updates[index] and rounds[index]:
            op.attributes[ROUND] = integer(rounds[index])
    keys = [(stages[index], rounds[index]) if update else None for index, update in enumerate(updates)]
    clone_into_readers(flow, keys, _round_key, _copy_round, _Recomputable(flow, updates))
    return MainDataflow.of(main)


def _round_key(op: ir.Operation) -> Hashable:
    if phase_of(op) != UPDATE:
        return None
    return stage_of(op), round_of(op)


def _copy_round(clone: ir.Operation, reader: ir.Operation) -> None:
    if ROUND in reader.attributes:
        clone.attributes[ROUND] = reader.attributes[ROUND]


class _Recomputable:
    """Elementwise update ops, at most a few deep, on arguments and accumulated values."""

    _MAX_DEPTH = 3

    def __init__(self, flow: MainDataflow, updates: list[bool]) -> None:
        depth = [0] * len(flow.values)
        self._stages = flow.stages
        self._allowed = [False] * len(flow.ops)
        for index, op in enumerate(flow.ops):
            if not updates[index]:
                continue
            level = 1 + max((depth[value] for value in flow.operands[index]), default=-1)
            if not is_elementwise(op):
                level = self._MAX_DEPTH + 1
            for result in flow.results[index]:
                depth[result] = level
            self._allowed[index] = level <= self._MAX_DEPTH

    def __call__(self, index: int, key: Hashable) -> bool:
        """Whether the op may be computed again in the reader's round, which must be on its own stage."""
        return isinstance(key, tuple) and key[0] == self._stages[index] and self._allowed[index]
