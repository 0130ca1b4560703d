"""Proofs on instruction streams before anything is launched.

The streams are simulated over the weakest transport there is: a send blocks until its receive is posted. Where a mesh has
the devices of several ranks, a call begins only when all of them have come to it. If that ends, no schedule of the real,
asynchronous transport deadlocks. On the way every read, write, donation and free is checked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from bactrian.passes.frame.errors import PassError
from bactrian.runtime.instructions import (
    Arrive,
    Copy,
    Forward,
    Free,
    InstructionStream,
    Load,
    Recv,
    Run,
    Send,
    Wait,
    describe,
)

_Where = tuple[int, int, int]  # source, destination, tag


@dataclass(frozen=True)
class StreamStatistics:
    """What the simulation saw: per rank the peak of live bytes (arguments included), per stage that of microbatches
    whose activations were live at once. ``message_bytes`` is what goes between stages, ``passed_bytes`` what ranks
    of one mesh pass on to each other of that."""

    peak_bytes: tuple[int, ...]
    in_flight: dict[int, int]
    num_messages: int
    message_bytes: int
    passed_bytes: int = 0


@dataclass
class _Rank:
    stream: InstructionStream
    at: int = 0
    state: dict[int, str] = field(default_factory=lambda: {})  # slot -> posted, arrived, live, freed, donated
    receives: dict[int, list[_Where]] = field(default_factory=lambda: defaultdict(list))  # of a slot
    num_meetings: int = 0  # of calls that other ranks make too, begun or waited for
    waits: bool = False  # for others to come to the call
    sent: set[int] = field(default_factory=lambda: set())  # slots with sends nobody waited for
    live_bytes: int = 0
    peak_bytes: int = 0
    running: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))  # stage -> mb -> live slots
    waiting: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))  # not yet begun
    peak: dict[int, int] = field(default_factory=lambda: {})

    def fail(self, message: str, why: str = "") -> NoReturn:
        """Raise, naming rank and instruction."""
        raise PassError(message, where=self.here(), why=why)

    def here(self) -> str:
        """Rank and instruction under way."""
        if self.at == len(self.stream.instructions):
            return f"rank {self.stream.rank}, at its end"
        return f"rank {self.stream.rank}, instruction {self.at}: {describe(self.stream.instructions[self.at])}"

    def read(self, slot: int) -> None:
        """The slot must hold a value."""
        state = self.state.get(slot)
        if state != "live":
            what = {None: "before it is written", "posted": "before it has arrived"}.get(state, f"after it was {state}")
            self.fail(f"slot %{slot} is read {what}")

    def write(self, slot: int, state: str = "live") -> None:
        """The slot must be new (or, to become live, posted)."""
        before = self.state.get(slot)
        if before is not None:
            self.fail(f"slot %{slot} is written twice")
        self.state[slot] = state
        self.account(slot, 1)

    def account(self, slot: int, sign: int) -> None:
        """Count a slot's bytes, and its microbatch if it holds an activation."""
        spec = self.stream.slots[slot]
        self.live_bytes += sign * spec.nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if spec.activation:
            running = self.running[spec.stage]
            if spec.microbatch in running:
                running[spec.microbatch] += sign
                if not running[spec.microbatch]:
                    del running[spec.microbatch]
            else:
                self.waiting[spec.stage, spec.microbatch] += sign

    def begin(self, run: Run) -> None:
        """A microbatch's forward begins: from now on its activations count."""
        if "forward" in run.phase:
            live = self.waiting.pop((run.stage, run.microbatch), 0)
            if live:
                running = self.running[run.stage]
                running[run.microbatch] = running.get(run.microbatch, 0) + live

    def note_in_flight(self, stage: int) -> None:
        """Remember the peak."""
        self.peak[stage] = max(self.peak.get(stage, 0), len(self.running[stage]))


@dataclass
class _Network:
    posted: dict[_Where, Recv] = field(default_factory=lambda: {})
    matched: set[_Where] = field(default_factory=lambda: set())
    num_bytes: int = 0
    passed_bytes: int = 0
    # The n-th common call of some ranks: what those that have come to it want to call.
    meetings: dict[tuple[tuple[int, ...], int], dict[int, Run | Copy]] = field(
        default_factory=lambda: defaultdict(dict)
    )


def check_streams(streams: Sequence[InstructionStream]) -> StreamStatistics:
    """Prove that the streams end and touch no buffer wrongly.

    Raises:
        PassError: names the defect, the rank and the instruction.
    """
    ranks = [_Rank(stream) for stream in streams]
    network = _Network()
    for rank in ranks:
        for slot in (*(a.slot for a in rank.stream.arguments), *(s for _, s in rank.stream.indices)):
            rank.write(slot)
    active = True
    while active:
        active = False
        for rank in ranks:
            while rank.at < len(rank.stream.instructions) and _advance(rank, network):
                rank.at += 1
                active = True
    blocked = [rank for rank in ranks if rank.at < len(rank.stream.instructions)]
    if blocked:
        raise PassError(
            f"the streams deadlock: {len(blocked)} of {len(ranks)} ranks wait forever",
            where=blocked[0].here(),
            why="; ".join(rank.here() for rank in blocked[1:4]),
        )
    for rank in ranks:
        _check_end(rank)
    in_flight = {stage: peak for rank in ranks for stage, peak in rank.peak.items()}
    peaks = tuple(rank.peak_bytes for rank in ranks)
    return StreamStatistics(
        peaks, dict(sorted(in_flight.items())), len(network.matched), network.num_bytes, network.passed_bytes
    )


def _advance(rank: _Rank, network: _Network) -> bool:
    """Carry out the rank's next instruction; False if it has to wait."""
    instruction = rank.stream.instructions[rank.at]
    match instruction:
        case Run():
            if not _meet(rank, instruction, network):
                return False
            _run(rank, instruction)
        case Load(slot=slot):
            rank.write(slot)
        case Copy(source=source, target=target):
            if not _meet(rank, instruction, network):
                return False
            rank.read(source)
            rank.write(target)
        case Recv():
            _post(rank, instruction, network)
        case Send():
            rank.read(instruction.slot)
            return _send(rank, instruction, network)
        case Forward():
            return _forward(rank, instruction, network)
        case Arrive(slot=slot):
            return _arrive(rank, slot, network)
        case Wait(slot=slot):
            if slot not in rank.sent:
                rank.fail(f"slot %{slot} has no send to wait for")
            rank.sent.discard(slot)
        case Free(slots=slots):
            for slot in slots:
                rank.read(slot)
                rank.state[slot] = "freed"
                rank.account(slot, -1)
    return True


def _run(rank: _Rank, run: Run) -> None:
    for slot in run.inputs:
        rank.read(slot)
    reads = Counter(run.inputs)
    for slot in run.donated:
        if slot not in reads:
            rank.fail(f"slot %{slot} is donated but not read")
        if reads[slot] > 1:
            rank.fail(f"slot %{slot} is donated and read twice by one call")
        if slot in rank.sent:
            rank.fail(f"slot %{slot} is donated while a send of it is under way")
        rank.state[slot] = "donated"
    rank.begin(run)
    for slot in run.donated:
        # The outputs take the donated buffers' memory.
        rank.account(slot, -1)
    for slot in run.outputs:
        rank.write(slot)
    rank.begin(run)
    rank.note_in_flight(run.stage)


def _meet(rank: _Rank, call: Run | Copy, network: _Network) -> bool:
    """Whether all ranks of the mesh have come to this call, or to this copy, which may be one."""
    ranks = rank.stream.mesh_ranks
    if len(ranks) < 2:
        return True
    if not rank.waits:
        rank.waits, rank.num_meetings = True, rank.num_meetings + 1
    here = network.meetings[ranks, rank.num_meetings]
    here[rank.stream.rank] = call
    for other, its in here.items():
        if its != call:
            rank.fail(f"rank {other} of the same mesh is at another one: {describe(its)}")
    rank.waits = len(here) < len(ranks)
    return not rank.waits


def _post(rank: _Rank, recv: Recv, network: _Network) -> None:
    where = (recv.source, rank.stream.rank, recv.tag)
    if where in network.posted:
        rank.fail(f"tag {recv.tag} from rank {recv.source} is received twice")
    network.posted[where] = recv
    of_slot = rank.receives[recv.slot]
    if not (of_slot and recv.boxes and rank.state.get(recv.slot) == "posted"):
        rank.write(recv.slot, "posted")
    of_slot.append(where)


def _send(rank: _Rank, send: Send | Forward, network: _Network) -> bool:
    where = (rank.stream.rank, send.destination, send.tag)
    if where in network.matched:
        rank.fail(f"tag {send.tag} to rank {send.destination} is sent twice")
    recv = network.posted.get(where)
    if recv is None:
        return False
    spec = rank.stream.slots[send.slot]
    if (recv.shape, recv.dtype, recv.boxes, recv.nbytes) != (spec.shape, spec.dtype, send.boxes, send.nbytes):
        rank.fail(
            f"sends {spec.dtype}{list(spec.shape)} ({send.nbytes} bytes) where {recv.dtype}{list(recv.shape)} "
            f"({recv.nbytes} bytes) is expected" + (", or other parts of it" if send.boxes or recv.boxes else "")
        )
    network.matched.add(where)
    if isinstance(send, Send):
        network.num_bytes += send.nbytes
        rank.sent.add(send.slot)
    else:
        network.passed_bytes += send.nbytes
    return True


def _forward(rank: _Rank, forward: Forward, network: _Network) -> bool:
    """Pass on parts that have arrived from other ranks."""
    if rank.state.get(forward.slot) != "posted":
        rank.fail(f"slot %{forward.slot} has no receive under way")
    needed = [where for where in rank.receives[forward.slot] if where[0] in forward.sources]
    if not set(forward.boxes).issubset(box for where in needed for box in network.posted[where].boxes):
        rank.fail(f"passes on what it does not get from ranks {list(forward.sources)}")
    return all(where in network.matched for where in needed) and _send(rank, forward, network)


def _arrive(rank: _Rank, slot: int, network: _Network) -> bool:
    if rank.state.get(slot) != "posted":
        rank.fail(f"slot %{slot} has no receive under way")
    if not network.matched.issuperset(rank.receives[slot]):
        return False
    rank.state[slot] = "live"
    return True


def _check_end(rank: _Rank) -> None:
    """Results are there, nothing else is left, no message is half done."""
    results = [r.slot for r in rank.stream.results]
    for slot in results:
        rank.read(slot)
    if len(set(results)) != len(results):
        rank.fail("a slot is handed out as two results")
    for slot in sorted(s for s, state in rank.state.items() if state == "posted"):
        rank.fail(f"slot %{slot} was received for nothing")
    spared = {*results, *(a.slot for a in rank.stream.arguments), *(s for _, s in rank.stream.indices)}
    for slot in sorted(s for s, state in rank.state.items() if state == "live" and s not in spared):
        rank.fail(f"slot %{slot} is never freed")
