"""Instruction streams of ranks that share meshes: the stream of a group of ranks becomes one for every rank of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from bactrian.runtime.box_routing import Box, Slices, num_elements, plan_slices, rank_tiles, tiles
from bactrian.runtime.instructions import Arrive, Forward, Instruction, InstructionStream, Recv, Send, Slot, Wait
from bactrian.runtime.stage_groups import StageGroups
from bactrian.runtime.staged_program import StagedProgram


def share_streams(
    streams: Sequence[InstructionStream], program: StagedProgram, groups: StageGroups
) -> tuple[InstructionStream, ...]:
    """One stream per rank, from one per group of consecutive ranks.

    A group's ranks make the same calls in the same order. What one group sends to another becomes messages between
    their ranks, which carry each element once; then the receiving ranks pass on what others of them need too. They do
    that where the group's stream waits for the value, after all of them have posted the receives for it, so a stream that
    ends stays one: sends to the other group meet receives at the places where those of the groups met, and the ranks of
    one group carry out the same instructions side by side. Between two groups of one rank each a value goes as it is.
    """
    if groups.num_ranks == len(groups.sizes):
        return tuple(streams)
    routes = _Routes(program, groups)
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
        if isinstance(x, Send) and max(groups.sizes[one.rank], groups.sizes[x.destination]) > 1
    }
    return tuple(
        _OneOfGroup(one, slices, routes, place).build() for one in streams for place in range(groups.sizes[one.rank])
    )


class _Routes:
    """How values travel between meshes of several ranks each; what equal ones share is worked out once."""

    def __init__(self, program: StagedProgram, groups: StageGroups) -> None:
        self.groups = groups
        self._program = program
        self._tiles: Callable[..., tuple[tuple[Box, ...], ...]] = cache(self._find_tiles)
        self._slices: Callable[..., Slices] = cache(plan_slices)

    def _find_tiles(self, shape: tuple[int, ...], stage: int, value: int) -> tuple[tuple[Box, ...], ...]:
        num_ranks = self.groups.sizes[self.groups.of_stage[stage]]
        return rank_tiles(tiles(shape, self._program.mesh(stage), self._program.spec_on(value, stage)), num_ranks)

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
        self.ranks = routes.groups.ranks(group.rank)
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
            rank=self.ranks[self.place],
            num_ranks=self.routes.groups.num_ranks,
            instructions=tuple(out),
            slots=tuple(replace(slot, nbytes=self._held_bytes(slot)) for slot in self.group.slots),
            mesh_ranks=tuple(self.ranks) if len(self.ranks) > 1 else (),
        )

    def _held_bytes(self, slot: Slot) -> int:
        return _bytes(slot, self.routes.tiles_of(slot)[self.place])

    def _send(self, send: Send) -> list[Instruction]:
        source, destination = self.group.slots[send.slot], self.routes.groups.ranks(send.destination)
        slices = self.slices.get((self.group.rank, send.destination, send.tag))
        if slices is None:
            self.sending.add(send.slot)
            return [replace(send, destination=destination[0])]
        out: list[Instruction] = [
            Send(send.slot, destination[there], send.tag, _bytes(source, boxes), False, boxes)
            for (here, there), boxes in slices.sent.items()
            if here == self.place
        ]
        if out:
            self.sending.add(send.slot)
        return out

    def _receive(self, recv: Recv) -> list[Instruction]:
        target = self.group.slots[recv.slot]
        theirs = self.routes.groups.ranks(recv.source)
        slices = self.slices.get((recv.source, self.group.rank, recv.tag))
        if slices is None:
            return [replace(recv, source=theirs[0])]
        self.received[recv.slot] = slices
        # The n-th value that the group's ranks pass on, the same one for all of them.
        relay = self.relays[recv.slot] = len(self.relays)
        sources = [
            (theirs[there], recv.tag, boxes) for (there, here), boxes in slices.sent.items() if here == self.place
        ]
        self.direct[recv.slot] = tuple(source for source, _, _ in sources)
        sources += [
            (self.ranks[there], relay, boxes) for (there, here), boxes in slices.passed.items() if here == self.place
        ]
        return [
            replace(recv, source=source, tag=tag, nbytes=_bytes(target, boxes), boxes=boxes)
            for source, tag, boxes in sources
        ]

    def _forward(self, slot: int) -> list[Instruction]:
        if slot not in self.received:
            return []
        spec, direct = self.group.slots[slot], self.direct[slot]
        return [
            Forward(slot, direct, self.ranks[there], self.relays[slot], _bytes(spec, boxes), boxes)
            for (here, there), boxes in self.received[slot].passed.items()
            if here == self.place
        ]


def _bytes(slot: Slot, boxes: Sequence[Box]) -> int:
    """Bytes of some parts of a group's slot."""
    whole = num_elements([tuple((0, size) for size in slot.shape)])
    return num_elements(boxes) * slot.nbytes // whole if whole else 0
