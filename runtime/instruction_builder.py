"""From a staged program to one instruction stream per rank."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.pipelining.pipeline_events import ONCE, Task
from bactrian.runtime.instructions import (
    ArgumentSlot,
    Arrive,
    Copy,
    Free,
    Instruction,
    InstructionStream,
    Load,
    Recv,
    ResultSlot,
    Run,
    Send,
    Slot,
    Wait,
)
from bactrian.runtime.staged_program import StagedProgram
from bactrian.runtime.unrolled_step import INDEX, Key, UnrolledStep, relative_cost, simulate

_LOAD_AHEAD_BYTES = 16 << 20  # of device memory, for pieces of the batch that are loaded while a rank waits
_START = -1  # place in the global order of what is there before the first task


@dataclass(frozen=True)
class _Result:
    """A result piece that one rank keeps, read from ``key`` after its last task."""

    key: Key
    result: int
    updates: int | None
    copy_of: Key | None  # set: ``key`` is this result's own copy of that buffer


@dataclass(frozen=True)
class _Message:
    """One transfer between two ranks. ``made``: place in the global order of the task whose result is sent."""

    origin: Key
    target: Key
    source: int
    destination: int
    tag: int
    made: int


@dataclass
class _Moves:
    """What crosses stages: messages between ranks and copies within one, by the buffer they start from."""

    messages: list[_Message] = field(default_factory=lambda: [])
    sends: dict[Key, list[_Message]] = field(default_factory=lambda: defaultdict(list))
    receives: dict[Key, _Message] = field(default_factory=lambda: {})
    copies: dict[tuple[int, Key], list[Key]] = field(default_factory=lambda: defaultdict(list))


def build_streams(
    program: StagedProgram, stage_ranks: tuple[int, ...], *, broadcast_results: bool = True, lookahead: int = 2
) -> tuple[InstructionStream, ...]:
    """One instruction stream per rank; ``stage_ranks[s]`` is the rank of stage ``s``.

    Receives are posted ``lookahead`` tasks before the task that reads them, and never later than the first task that
    comes, in the global order, after the one that sends. So even if every send blocked until its receive is posted,
    nothing deadlocks: of all blocked instructions take the first in the global order; the post that it waits for comes
    before everything of its rank that is later in that order, so that rank is blocked at an earlier instruction still.

    Raises:
        ConfigError: the ranks do not fit the stages.
        PassError: the staged program can't be carried out.
    """
    num_ranks = max(stage_ranks, default=-1) + 1
    if len(stage_ranks) != program.num_stages or set(stage_ranks) != set(range(num_ranks)):
        raise ConfigError(
            f"cannot deal {program.num_stages} stages to ranks {list(stage_ranks)}",
            why="every stage needs a rank, and every rank a stage",
        )
    step = UnrolledStep(program)
    order = list(simulate(step, stage_ranks, relative_cost))
    results = [_results_of(step, stage_ranks, rank, broadcast_results) for rank in range(num_ranks)]
    moves = _find_moves(step, order, stage_ranks, results)
    return tuple(
        _RankBuilder(step, order, stage_ranks, rank, moves, results[rank], lookahead).build()
        for rank in range(num_ranks)
    )


def _results_of(step: UnrolledStep, stage_ranks: tuple[int, ...], rank: int, broadcast: bool) -> list[_Result]:
    """The result pieces of a rank: its own updates, and every other result if this rank has it or gets it."""
    program = step.program
    argument_of = {piece.value: piece.argument for piece in program.arguments}
    home = stage_ranks.index(rank)
    kept: list[_Result] = []
    used: set[Key] = set()
    seen: set[int] = set()
    for piece in sorted(program.results, key=lambda p: p.updates is None):
        key = step.key(piece.value, ONCE)
        step.check_origin(key, f"result {piece.result}")
        local = stage_ranks[key.stage] == rank
        if piece.updates is None:
            pieces = [p for p in program.results if p.result == piece.result]
            has_one = any(stage_ranks[program.values[p.value].stage] == rank for p in pieces)
            if piece.result in seen or (has_one and not local) or not (local or broadcast):
                continue
            seen.add(piece.result)
        elif not local:
            continue
        # A result that is handed out twice, or is an argument that the caller keeps, needs its own buffer.
        callers = key.value in argument_of and argument_of[key.value] != piece.updates
        copy = len(kept) + 1 if local and (callers or key in used) else 0
        target = key._replace(copy=copy) if local else Key(key.value, key.microbatch, home, copy=-1 - piece.result)
        used.add(key)
        kept.append(_Result(target, piece.result, piece.updates, key if copy else None))
    return sorted(kept, key=lambda r: (r.result, r.key))


def _find_moves(
    step: UnrolledStep, order: Sequence[Task], stage_ranks: tuple[int, ...], results: Sequence[list[_Result]]
) -> _Moves:
    """All transfers of the step that somebody reads, with tags counted per pair of ranks in the global order."""
    place = {task: i for i, task in enumerate(order)}
    first_read: dict[tuple[Key, Key], int] = {}  # (origin, target) -> place of the first reader
    for i, task in enumerate(order):
        for key in step.reads[task]:
            if key.value != INDEX and step.origin(key) != key:
                first_read.setdefault((step.origin(key), key), i)
    for pieces in results:
        for piece in pieces:
            key = piece.copy_of or piece.key
            origin = step.origin(key._replace(stage=step.program.values[key.value].stage, copy=0))
            if origin != key:
                first_read.setdefault((origin, key), len(order))

    def made(origin: Key) -> int:
        return place[step.producer[origin]] if origin in step.producer else _START

    moves = _Moves()
    at_rank: dict[tuple[Key, int], Key] = {}  # the buffer that a value has first on a rank
    tags: dict[tuple[int, int], int] = defaultdict(int)
    for (origin, target), _ in sorted(first_read.items(), key=lambda item: (made(item[0][0]), item[1], item[0])):
        source, destination = stage_ranks[origin.stage], stage_ranks[target.stage]
        here = origin if source == destination else at_rank.get((origin, destination))
        if here is not None:
            moves.copies[destination, here].append(target)
            continue
        message = _Message(origin, target, source, destination, tags[source, destination], made(origin))
        tags[source, destination] += 1
        at_rank[origin, destination] = target
        moves.messages.append(message)
        moves.sends[origin].append(message)
        moves.receives[target] = message
    return moves


class _RankBuilder:
    """Writes one rank's instruction stream, task by task."""

    def __init__(
        self,
        step: UnrolledStep,
        order: Sequence[Task],
        stage_ranks: tuple[int, ...],
        rank: int,
        moves: _Moves,
        results: list[_Result],
        lookahead: int,
    ) -> None:
        self.step, self.rank, self.moves, self.results, self.lookahead = step, rank, moves, results, lookahead
        self.stages = tuple(s for s, r in enumerate(stage_ranks) if r == rank)
        self.num_ranks = max(stage_ranks) + 1
        placed = [(i, task) for i, task in enumerate(order) if step.call(task).stage in self.stages]
        self.places = [i for i, _ in placed]
        self.tasks = [task for _, task in placed]
        self.end = len(self.tasks)
        self.slots: list[Slot] = []
        self.slot_of: dict[Key, int] = {}
        self.out: list[Instruction] = []
        self.indices: list[tuple[int, int]] = []
        self.present: set[Key] = set()
        self.waited = False  # for a message
        self._find_uses()

    def _find_uses(self) -> None:
        """When each buffer is first and last used here, who donates it, and which are activations."""
        self.kept = {r.key for r in self.results}
        self.donor: dict[Key, int] = {}
        self.first_use: dict[Key, int] = {}
        self.last_use: dict[Key, int] = {}
        self.activations: set[Key] = set()
        for i, task in enumerate(self.tasks):
            call = self.step.call(task)
            reads, writes = self.step.reads[task], self.step.writes[task]
            for key in (*reads, *writes):
                self.first_use.setdefault(key, i)
                self.last_use[key] = i
            self.donor.update({reads[p]: i for p in call.donated})
            if "forward" in call.phase:
                self.activations.update(k for k in (*reads, *writes) if k.value not in self.step.carried)
        for result in self.results:
            read = result.copy_of or result.key
            self.first_use.setdefault(read, self.end)
            self.last_use[read] = self.end
        # A buffer that others are copied from on this rank is there for the first of them.
        self.copied = {key: targets for (rank, key), targets in self.moves.copies.items() if rank == self.rank}
        self.copy_source = {target: key for key, targets in self.copied.items() for target in targets}
        for key, targets in self.copied.items():
            if key in self.moves.receives:
                self.first_use[key] = min(self.first_use.get(k, self.end) for k in (key, *targets))
            at = self.first_use.get(key, 0)
            self.last_use[key] = max(self.last_use.get(key, at), at)
        self.arguments = {
            Key(p.value, ONCE, self.step.program.values[p.value].stage)
            for p in self.step.program.arguments
            if p.role != "batch"
        }

    def build(self) -> InstructionStream:
        """The whole stream."""
        arguments = self._argument_slots()
        posts = self._posts()
        for i in range(self.end + 1):
            for message in posts[i]:
                self._post(message)
            if i == 0:
                self._send_arguments()
            if i < self.end:
                self._task(i)
        results = self._finish()
        return InstructionStream(
            rank=self.rank,
            num_ranks=self.num_ranks,
            stages=self.stages,
            num_microbatches=self.step.program.num_microbatches,
            instructions=tuple(self.out),
            slots=tuple(self.slots),
            arguments=arguments,
            indices=tuple(self.indices),
            results=results,
        )

    def _argument_slots(self) -> tuple[ArgumentSlot, ...]:
        arguments: list[ArgumentSlot] = []
        for piece in self.step.program.arguments:
            stage = self.step.program.values[piece.value].stage
            if piece.role != "batch" and stage in self.stages:
                key = Key(piece.value, ONCE, stage)
                self.present.add(key)
                arguments.append(ArgumentSlot(piece.argument, piece.role, stage, piece.value, self._slot(key)))
        return tuple(arguments)

    def _posts(self) -> list[list[_Message]]:
        """The receives to post before each task (the last entry: after all of them)."""
        posts: list[list[_Message]] = [[] for _ in range(self.end + 1)]
        for message in self.moves.messages:
            if message.destination == self.rank:
                latest = bisect_right(self.places, message.made)
                posts[min(latest, max(0, self.first_use[message.target] - self.lookahead))].append(message)
        return posts

    def _post(self, message: _Message) -> None:
        slot = self._slot(message.target)
        spec = self.slots[slot]
        self.out.append(Recv(slot, message.source, message.tag, spec.shape, spec.dtype, spec.stage, spec.nbytes))

    def _send_arguments(self) -> None:
        """Send and copy what is there before the step."""
        for key in sorted(self.arguments & self.present):
            self._distribute(key, _START)

    def _task(self, i: int) -> None:
        task = self.tasks[i]
        call = self.step.call(task)
        reads, writes = self.step.reads[task], self.step.writes[task]
        if not self.waited and any(key in self.moves.receives and key not in self.present for key in reads):
            self.waited = True
            self._load_ahead(i)
        for key in reads:
            self._bring(key, i)
        donated = tuple(sorted({reads[p] for p in call.donated}))
        self.out.extend(Wait(self._slot(key)) for key in donated if self.moves.sends.get(key))
        inputs, outputs = tuple(map(self._slot, reads)), tuple(map(self._slot, writes))
        consumed = tuple(map(self._slot, donated))
        self.out.append(Run(call.function, call.stage, call.phase, task.microbatch, inputs, outputs, consumed))
        self.present.update(writes)
        for key in writes:
            self._distribute(key, i)
        self._free((*reads, *writes), i)

    def _bring(self, key: Key, i: int) -> None:
        """Make a buffer readable: an index, a loaded slice, a received value (and the copies made from it)."""
        if key in self.present:
            return
        if key.value == INDEX:
            self.indices.append((key.microbatch, self._slot(key)))
        elif key.value in self.step.batches:
            self.out.append(Load(self.step.batches[key.value], key.microbatch, self._slot(key)))
        elif key in self.moves.receives:
            self.out.append(Arrive(self._slot(key)))
        else:
            self._bring(self.copy_source[key], i)
            return
        self.present.add(key)
        self._distribute(key, i, still_read=key in self._reads_at(i))
        if key in self.copied and key not in self._reads_at(i):
            self._free((key,), i)

    def _load_ahead(self, i: int) -> None:
        """Load what later tasks read of the batch now, as far as the budget goes.

        A rank that waits for its first message waits for the pipeline to fill. Later, its host has less time to spare.
        """
        budget = _LOAD_AHEAD_BYTES
        for task in self.tasks[i:]:
            for key in self.step.reads[task]:
                if key.value in self.step.batches and key not in self.present:
                    budget -= self.step.program.values[key.value].nbytes
                    if budget < 0:
                        return
                    self.out.append(Load(self.step.batches[key.value], key.microbatch, self._slot(key)))
                    self.present.add(key)
                    self._distribute(key, i, still_read=True)

    def _reads_at(self, i: int) -> Sequence[Key]:
        if i < self.end:
            return self.step.reads[self.tasks[i]]
        return [result.copy_of or result.key for result in self.results]

    def _distribute(self, key: Key, i: int, *, still_read: bool = False) -> None:
        """Send a new buffer to the other ranks, and copy it to the other stages of this one."""
        messages = self.moves.sends.get(key, [])
        targets = self.copied.get(key, [])
        dies = i != _START and not still_read and self.last_use.get(key, i) <= i
        dies = dies and key not in self.arguments and key not in self.kept
        alone = dies and len(messages) + len(targets) == 1
        nbytes = self.step.program.values[key.value].nbytes if key.value >= 0 else 0
        for message in messages:
            self.out.append(Send(self._slot(key), message.destination, message.tag, nbytes, alone))
        lasting = not any(k in self.donor or k in self.kept for k in (key, *targets))
        for target in targets:
            self.out.append(Copy(self._slot(key), self._slot(target), alone or lasting))
            self.present.add(target)

    def _free(self, keys: Sequence[Key], i: int) -> None:
        dead = {
            self._slot(key)
            for key in keys
            if self.last_use.get(key, i) <= i
            and self.donor.get(key) != i
            and key.value != INDEX
            and key not in self.arguments
            and key not in self.kept
        }
        if dead:
            self.out.append(Free(tuple(sorted(dead))))

    def _finish(self) -> tuple[ResultSlot, ...]:
        """Bring the results; give those that need one their own copy."""
        slots: list[ResultSlot] = []
        for result in self.results:
            read = result.copy_of or result.key
            self._bring(read, self.end)
            if result.copy_of is not None:
                self.out.append(Copy(self._slot(read), self._slot(result.key), alias=False))
            key = result.key
            slots.append(ResultSlot(result.result, key.stage, key.value, self._slot(key), result.updates))
        self._free(sorted({r.copy_of for r in self.results if r.copy_of is not None}), self.end)
        return tuple(slots)

    def _slot(self, key: Key) -> int:
        if key not in self.slot_of:
            self.slot_of[key] = len(self.slots)
            if key.value == INDEX:
                self.slots.append(Slot(INDEX, key.stage, key.microbatch, (), "int32", 4))
            else:
                value = self.step.program.values[key.value]
                activation = key.microbatch != ONCE and key in self.activations
                self.slots.append(
                    Slot(value.id, key.stage, key.microbatch, value.shape, value.dtype, value.nbytes, activation)
                )
        return self.slot_of[key]
