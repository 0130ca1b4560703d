"""Instruction streams of ranks that share meshes: the stream of a group of ranks becomes one for every rank of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from bactrian.passes.machine.spec import UNSHARDED
from bactrian.runtime.box_routing import Box, Slices, num_elements, plan_slices, rank_tiles, tiles
from bactrian.runtime.instructions import Arrive, Forward, Instruction, InstructionStream, Recv, Send, Slot, Wait
from bactrian.runtime.staged_program import StagedProgram


def share_streams(
    streams: Sequence[InstructionStream], program: StagedProgram, num_ranks: int
) -> tuple[InstructionStream, ...]:
    """One stream per rank, from one per group of so many consecutive ranks.

    A group's ranks make the same calls in the same order. What one group sends to another becomes messages between
    their ranks, which carry each element once; then the receiving ranks pass on what others of them need too. They do
    that where the group's stream waits for the value, after all of them have posted the receives for it, so a stream that
    ends stays one: sends to the other group meet receives at the places where those of the groups met, and the ranks of
    one group carry out the same instructions side by side.
    """
    if num_ranks == 1:
        return tuple(streams)
    routes = _Routes(program, num_ranks)
    targets = {
        (x.source, one.rank, x.tag): one.slots[x.slot]
        for one in streams
        for x in one.instructions
        if isinstance(x, Recv)
    }
    slices = {
        (one.rank, x.destination, x.tag): routes.slices(one.slots[x.slot], targets[one.rank, x.destination, x.tag])
        for one in streams
        for x in one.instructions
        if isinstance(x, Send)
    }
    return tuple(_OneOfGroup(one, slices, routes, place).build() for one in streams for place in range(num_ranks))


class _Routes:
    """How values travel between meshes of several ranks each; what equal ones share is worked out once."""

    def __init__(self, program: StagedProgram, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._program = program
        self._tiles: Callable[..., tuple[tuple[Box, ...], ...]] = cache(self._find_tiles)
        self._slices: Callable[..., Slices] = cache(plan_slices)

    def _find_tiles(self, shape: tuple[int, ...], stage: int, value: int) -> tuple[tuple[Box, ...], ...]:
        spec = self._program.values[value].spec if value >= 0 else UNSHARDED
        return rank_tiles(tiles(shape, self._program.mesh(stage), spec), self.num_ranks)

    def tiles_of(self, slot: Slot) -> tuple[tuple[Box, ...], ...]:
        """The tiles of a slot's value by place in the group."""
        return self._tiles(slot.shape, slot.stage, slot.value)

    def slices(self, source: Slot, target: Slot) -> Slices:
        """How a slot of one group becomes a slot of another."""
        return self._slices(self.tiles_of(source), self.tiles_of(target))


class _OneOfGroup:
    """Writes the stream of the rank at one place of a group."""

    def __init__(
        self, group: InstructionStream, slices: dict[tuple[int, int, int], Slices], routes: _Routes, place: int
    ) -> None:
        self.group, self.slices, self.routes, self.place = group, slices, routes, place
        self.first = group.rank * routes.num_ranks  # the group's first rank
        self.received: dict[int, Slices] = {}  # slot -> how it comes
        self.relays: dict[int, int] = {}  # slot -> the tag of what the group's ranks pass on of it
        self.direct: dict[int, tuple[int, ...]] = {}  # slot -> ranks of the other group that send some of it here
        self.sending: set[int] = set()  # slots that this rank has sent something of

    def build(self) -> InstructionStream:
        """The whole stream."""
        out: list[Instruction] = []
        for x in self.group.instructions:
            match x:
                case Send():
                    out += self._send(x)
                case Recv():
                    out += self._receive(x)
                case Arrive(slot=slot):
                    out += [*self._forward(slot), x]
                case Wait(slot=slot) if slot not in self.sending:
                    pass  # others of the group have sent it
                case _:
                    out.append(x)
        return replace(
            self.group,
            rank=self.first + self.place,
            num_ranks=self.group.num_ranks * self.routes.num_ranks,
            instructions=tuple(out),
            slots=tuple(replace(slot, nbytes=self._held_bytes(slot)) for slot in self.group.slots),
            mesh_ranks=tuple(range(self.first, self.first + self.routes.num_ranks)),
        )

    def _held_bytes(self, slot: Slot) -> int:
        return _bytes(slot, self.routes.tiles_of(slot)[self.place])

    def _send(self, send: Send) -> list[Instruction]:
        source, first = self.group.slots[send.slot], send.destination * self.routes.num_ranks
        out: list[Instruction] = [
            Send(send.slot, first + there, send.tag, _bytes(source, boxes), False, boxes)
            for (here, there), boxes in self.slices[self.group.rank, send.destination, send.tag].sent.items()
            if here == self.place
        ]
        if out:
            self.sending.add(send.slot)
        return out

    def _receive(self, recv: Recv) -> list[Instruction]:
        target = self.group.slots[recv.slot]
        slices = self.received[recv.slot] = self.slices[recv.source, self.group.rank, recv.tag]
        first = recv.source * self.routes.num_ranks
        # The n-th value that the group's ranks pass on, the same one for all of them.
        relay = self.relays[recv.slot] = len(self.relays)
        sources = [
            (first + there, recv.tag, boxes) for (there, here), boxes in slices.sent.items() if here == self.place
        ]
        self.direct[recv.slot] = tuple(source for source, _, _ in sources)
        sources += [
            (self.first + there, relay, boxes) for (there, here), boxes in slices.passed.items() if here == self.place
        ]
        return [
            replace(recv, source=source, tag=tag, nbytes=_bytes(target, boxes), boxes=boxes)
            for source, tag, boxes in sources
        ]

    def _forward(self, slot: int) -> list[Instruction]:
        spec, direct = self.group.slots[slot], self.direct[slot]
        return [
            Forward(slot, direct, self.first + there, self.relays[slot], _bytes(spec, boxes), boxes)
            for (here, there), boxes in self.received[slot].passed.items()
            if here == self.place
        ]


def _bytes(slot: Slot, boxes: Sequence[Box]) -> int:
    """Bytes of some parts of a group's slot."""
    whole = num_elements([tuple((0, size) for size in slot.shape)])
    return num_elements(boxes) * slot.nbytes // whole if whole else 0
