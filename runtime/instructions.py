"""The instructions that one rank executes, as plain data.

A slot is written once: slot numbers are names of values, not of memory. Instructions that start something (`Recv`,
`Send`) never wait; what waits is said by its own instruction (`Arrive` for a receive, `Wait` for sends).
"""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.runtime.box_routing import Box, box_words


@dataclass(frozen=True, slots=True)
class Run:
    """Call a stage function. ``donated`` are slots that the call consumes; they hold nothing afterwards."""

    function: str
    stage: int
    phase: str
    microbatch: int  # -1 for what is done once per step
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Put one microbatch's slice of a batch argument on the stage's device."""

    argument: int
    microbatch: int
    slot: int


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending a slot. ``move``: the sender never uses the buffer again, so it may be handed over uncopied.

    ``boxes``: of a value that several ranks hold, these parts of it, in order, as one message; none: all of it.
    """

    slot: int
    destination: int
    tag: int
    nbytes: int
    move: bool
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class Recv:
    """Post a receive; the slot is readable after its `Arrive`.

    ``boxes``: only these parts, as in `Send`; a slot may then have several receives. ``shape`` is the whole value's,
    ``nbytes`` the message's.
    """

    slot: int
    source: int
    tag: int
    shape: tuple[int, ...]
    dtype: str
    stage: int
    nbytes: int
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class Forward:
    """Wait for the receives of a slot from some ranks, and start sending parts of what they brought to a rank of the
    same mesh."""

    slot: int
    sources: tuple[int, ...]
    destination: int
    tag: int
    nbytes: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Arrive:
    """Wait for the posted receives of a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for all sends of a slot, because its buffer is about to be donated."""

    slot: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Put a slot on another stage's device. ``alias``: on the same device the two may share the buffer."""

    source: int
    target: int
    alias: bool


@dataclass(frozen=True, slots=True)
class Free:
    """Drop buffers."""

    slots: tuple[int, ...]


Instruction = Run | Load | Send | Recv | Forward | Arrive | Wait | Copy | Free


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot holds. ``activation``: made by a microbatch's forward, or read by it, and not carried on.

    ``nbytes`` are those of the value, or of the rank's part of it where several ranks hold it; copies count once.
    """

    value: int  # id in the staged program; -1 for a microbatch's number
    stage: int
    microbatch: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    activation: bool = False


@dataclass(frozen=True, slots=True)
class ArgumentSlot:
    """A piece of a state or constant argument, in its slot before the first instruction."""

    argument: int
    role: str
    stage: int
    value: int
    slot: int


@dataclass(frozen=True, slots=True)
class ResultSlot:
    """A piece of a result, in its slot after the last instruction. ``stage`` is where this rank has it."""

    result: int
    stage: int
    value: int
    slot: int
    updates: int | None


@dataclass(frozen=True, slots=True)
class InstructionStream:
    """Everything one rank does in a step.

    ``mesh_ranks``: the ranks whose devices its stages' meshes are made of, where those are several. They make the same
    calls in the same order.
    """

    rank: int
    num_ranks: int
    stages: tuple[int, ...]
    num_microbatches: int
    instructions: tuple[Instruction, ...]
    slots: tuple[Slot, ...]
    arguments: tuple[ArgumentSlot, ...]
    indices: tuple[tuple[int, int], ...]  # (microbatch, slot) of int32 scalars that never change
    results: tuple[ResultSlot, ...]
    mesh_ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        """One line per instruction."""
        lines = [f"rank {self.rank} of {self.num_ranks}, stages {', '.join(map(str, self.stages))}"]
        lines += [f"{i:5d}  {describe(x)}" for i, x in enumerate(self.instructions)]
        return "\n".join(lines)


def describe(instruction: Instruction) -> str:
    """One instruction as a short line, for error messages and dumps.

    >>> describe(Free((3, 4)))
    'FREE %3 %4'
    """
    match instruction:
        case Run(function=function, microbatch=microbatch, inputs=inputs, outputs=outputs, donated=donated):
            at = f" microbatch {microbatch}" if microbatch >= 0 else ""
            consumed = f" donating {_names(donated)}" if donated else ""
            return f"RUN {function}{at} ({_names(inputs)}) -> ({_names(outputs)}){consumed}"
        case Load(argument=argument, microbatch=microbatch, slot=slot):
            return f"LOAD argument {argument} microbatch {microbatch} -> %{slot}"
        case Send(slot=slot, destination=destination, tag=tag, nbytes=nbytes, boxes=boxes):
            return f"SEND %{slot}{_parts(boxes)} to rank {destination} tag {tag}, {nbytes} bytes"
        case Recv(slot=slot, source=source, tag=tag, shape=shape, dtype=dtype, boxes=boxes):
            return f"RECV %{slot}{_parts(boxes)} from rank {source} tag {tag}, {dtype}{list(shape)}"
        case Forward(slot=slot, destination=destination, tag=tag, nbytes=nbytes, boxes=boxes):
            return f"FORWARD %{slot}{_parts(boxes)} to rank {destination} tag {tag}, {nbytes} bytes"
        case Arrive(slot=slot):
            return f"ARRIVE %{slot}"
        case Wait(slot=slot):
            return f"WAIT %{slot}"
        case Copy(source=source, target=target, alias=alias):
            return f"COPY %{source} -> %{target}{' (may alias)' if alias else ''}"
        case Free(slots=slots):
            return f"FREE {_names(slots)}"


def _names(slots: tuple[int, ...]) -> str:
    return " ".join(f"%{s}" for s in slots)


def _parts(boxes: tuple[Box, ...]) -> str:
    return f" {box_words(boxes)}" if boxes else ""
