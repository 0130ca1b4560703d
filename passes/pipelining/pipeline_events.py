"""Discrete events of a pipelined step: when each call begins and ends, when each message is sent and arrives.

Every mesh makes its calls in a given order, one at a time. A call begins once the one before it has ended and all
messages for it are there. A message is ready when the call that makes it has ended; it begins when all of its links are
free, earlier ones first, and keeps them for its seconds. Receives are posted early and sends wait for nothing, as the
runtime does it, so a mesh pays for a message only the seconds that are said to be its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple

from bactrian.passes.frame.errors import PassError

ONCE = -1
"""The microbatch of what is done once per step."""


@dataclass(frozen=True, slots=True)
class Message:
    """A value that goes to another mesh as soon as the call that makes it has ended.

    Attributes:
        reader: the number of the function that reads it first there.
        link_seconds: it keeps its links for so long.
        links: names of what it needs to itself.
        latency_seconds: after that, until it can be read.
        nbytes: for reports.
    """

    reader: int
    link_seconds: float
    links: tuple[Hashable, ...] = ()
    latency_seconds: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Function:
    """What a mesh does for each microbatch, or once per step.

    Attributes:
        name: for reports.
        mesh: its number.
        seconds: of one call.
        per_microbatch: false for what is done once.
        messages: what each call sends.
    """

    name: str
    mesh: int
    seconds: float
    per_microbatch: bool = True
    messages: tuple[Message, ...] = ()


class Task(NamedTuple):
    """One call of a stage function: the number of the function, and the microbatch, or `ONCE`."""

    call: int
    microbatch: int


@dataclass(frozen=True)
class Pipeline:
    """A step of a pipeline.

    A message from a function of each microbatch to one that is called once is sent by the last microbatch alone; one in
    the other direction is waited for by the first.

    Attributes:
        functions: of all meshes.
        order: of every mesh, its calls.
        num_microbatches: how often functions of each microbatch are called.
        first: messages that are ready when the step begins, with the meshes that send them.
    """

    functions: tuple[Function, ...]
    order: tuple[tuple[Task, ...], ...]
    num_microbatches: int
    first: tuple[tuple[int, Message], ...] = ()


class MessageTimes(NamedTuple):
    """When a message is ready to be sent, gets its links, and can be read; in seconds from the beginning of the step.

    ``source`` is the mesh that sends it, ``sender`` the call that makes it; None where it is there before the step.
    """

    source: int
    sender: Task | None
    reader: Task
    message: Message
    ready: float
    begin: float
    arrive: float


class ExposedWait(NamedTuple):
    """A mesh has nothing to do while the last message for a call is under way."""

    mesh: int
    task: Task
    begin: float
    end: float


class MeshTimes(NamedTuple):
    """What a mesh does with the seconds of a step: ``busy + bubble + exposed`` is the step.

    Attributes:
        busy: it computes.
        bubble: it waits for other meshes to compute, or has nothing left to do.
        exposed: it waits for a message that is under way.
        communication: the messages to it take so long together, from ready to there.
    """

    busy: float
    bubble: float
    exposed: float
    communication: float

    @property
    def hidden(self) -> float:
        """Communication that the mesh does not wait for."""
        return self.communication - self.exposed


@dataclass(frozen=True)
class PipelineTimes:
    """The events of a step.

    Attributes:
        seconds: of the step: until the last call has ended.
        begins, ends: of every mesh's calls, in its order.
        meshes: what each does with its time.
        waits: of all meshes.
        messages: in the order in which they are ready.
    """

    seconds: float
    begins: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    meshes: tuple[MeshTimes, ...]
    waits: tuple[ExposedWait, ...]
    messages: tuple[MessageTimes, ...]


def simulate(pipeline: Pipeline) -> PipelineTimes:
    """The events of a step.

    Example: a microbatch that takes one second on each of two meshes, and a message of half a second in between, is a
    step of 2.5 seconds; with three microbatches it is 4.5, as the messages hide behind the calls.

    Raises:
        PassError: the meshes wait for each other.
    """
    events = _Events(pipeline)
    events.run()
    return events.times()


class _Events:
    """The state of a simulation. Calls have numbers; those of a function follow each other."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        functions, count = pipeline.functions, pipeline.num_microbatches
        base = self._base = [0, *accumulate(count if function.per_microbatch else 1 for function in functions)]
        self._missing = [0] * base[-1]  # messages that a call still waits for
        self._there = [0.0] * base[-1]  # when the last of them arrives
        self._ready = [0.0] * base[-1]  # and when that one was ready
        for function in functions:
            for message in function.messages:
                first, several = base[message.reader], function.per_microbatch
                number = count if several and functions[message.reader].per_microbatch else 1
                for call in range(first, first + number):
                    self._missing[call] += 1
        for _, message in pipeline.first:
            self._missing[base[message.reader]] += 1
        self._at = [0] * len(pipeline.order)  # the place in its order of the call that a mesh makes or waits for
        self._idle_since: list[float | None] = [None] * len(pipeline.order)  # of meshes that wait for a message
        self._running = list[tuple[float, int]]()  # heap: when the call under way on a mesh ends
        self._free: dict[Hashable, float] = {}  # when a link is free
        self._begins: list[list[float]] = [[] for _ in pipeline.order]
        self._ends: list[list[float]] = [[] for _ in pipeline.order]
        self._waits = list[ExposedWait]()
        self._messages = list[MessageTimes]()

    def run(self) -> None:
        """Go from the end of one call to that of the next, in the order of time."""
        pipeline = self._pipeline
        for mesh in range(len(pipeline.order)):
            self._go_on(mesh, 0.0)
        for source, message in pipeline.first:
            self._send(message, source, None, 0.0)
        while self._running:
            now, mesh = heappop(self._running)
            task = pipeline.order[mesh][self._at[mesh]]
            self._at[mesh] += 1
            self._go_on(mesh, now)
            for message in pipeline.functions[task.call].messages:
                self._send(message, mesh, task, now)
        for mesh, since in enumerate(self._idle_since):
            if since is not None:
                raise self._stuck(mesh)

    def _go_on(self, mesh: int, now: float) -> None:
        """Begin the next call of a mesh, or let it wait."""
        order = self._pipeline.order[mesh]
        if self._at[mesh] == len(order):
            return
        task = order[self._at[mesh]]
        number = self._base[task.call] + max(0, task.microbatch)
        if self._missing[number]:
            self._idle_since[mesh] = now
        else:
            self._begin(mesh, task, number, now)

    def _begin(self, mesh: int, task: Task, number: int, free: float) -> None:
        there = self._there[number]
        begin, since = max(free, there), max(free, self._ready[number])
        if begin > since:
            self._waits.append(ExposedWait(mesh, task, since, begin))
        end = begin + self._pipeline.functions[task.call].seconds
        self._begins[mesh].append(begin)
        self._ends[mesh].append(end)
        heappush(self._running, (end, mesh))

    def _send(self, message: Message, source: int, sender: Task | None, now: float) -> None:
        pipeline, reader, microbatch = self._pipeline, message.reader, 0
        if not pipeline.functions[reader].per_microbatch:
            if sender is not None and sender.microbatch not in (ONCE, pipeline.num_microbatches - 1):
                return
        elif sender is not None:
            microbatch = max(0, sender.microbatch)
        begin = now
        for link in message.links:
            begin = max(begin, self._free.get(link, 0.0))
        free = begin + message.link_seconds
        for link in message.links:
            self._free[link] = free
        arrive = free + message.latency_seconds
        per_microbatch = pipeline.functions[reader].per_microbatch
        read_by = Task(reader, microbatch if per_microbatch else ONCE)
        self._messages.append(MessageTimes(source, sender, read_by, message, now, begin, arrive))
        number = self._base[reader] + microbatch
        self._missing[number] -= 1
        if arrive > self._there[number]:
            self._there[number], self._ready[number] = arrive, now
        mesh = pipeline.functions[reader].mesh
        since = self._idle_since[mesh]
        if since is not None and not self._missing[number] and pipeline.order[mesh][self._at[mesh]] == read_by:
            self._idle_since[mesh] = None
            self._begin(mesh, read_by, number, since)

    def _stuck(self, mesh: int) -> PassError:
        task = self._pipeline.order[mesh][self._at[mesh]]
        name = self._pipeline.functions[task.call].name
        return PassError(
            f"mesh {mesh} waits for ever at {name} of microbatch {task.microbatch}",
            why="what it needs is never sent: the orders of the meshes wait for each other",
        )

    def times(self) -> PipelineTimes:
        """What has happened."""
        seconds = max((ends[-1] for ends in self._ends if ends), default=0.0)
        communication = [0.0] * len(self._ends)
        for sent in self._messages:
            communication[self._pipeline.functions[sent.reader.call].mesh] += sent.arrive - sent.ready
        exposed = [0.0] * len(self._ends)
        for wait in self._waits:
            exposed[wait.mesh] += wait.end - wait.begin
        meshes = list[MeshTimes]()
        for mesh, (begins, ends) in enumerate(zip(self._begins, self._ends, strict=True)):
            busy = sum(ends) - sum(begins)
            meshes.append(MeshTimes(busy, seconds - busy - exposed[mesh], exposed[mesh], communication[mesh]))
        begins, ends = tuple(map(tuple, self._begins)), tuple(map(tuple, self._ends))
        return PipelineTimes(seconds, begins, ends, tuple(meshes), tuple(self._waits), tuple(self._messages))
