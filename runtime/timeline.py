"""Times of what ranks did, as one Chrome trace: a process per rank, a row per stage, arrows from send to receive."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.files import write_whole
from bactrian.passes.frame.units import human_bytes
from bactrian.runtime.control import Control
from bactrian.runtime.instructions import Arrive, Forward, Instruction, InstructionStream, Recv, Run, Send

Event = dict[str, Any]


class Tracer:
    """Collects the events of one rank. Times are microseconds of this rank's clock until `gather_traces` aligns them.

    A traced call waits for its results, so that its bar is its work: tracing costs the overlap within a rank.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._counts: dict[tuple[str, str], int] = {}
        self._messages: dict[tuple[int, int], list[Recv]] = {}  # (rank, slot) -> its receives

    def traced(
        self, stream: InstructionStream, instruction: Instruction, operation: Callable[[list[Any]], None]
    ) -> Callable[[list[Any]], None]:
        """The operation with its times recorded."""
        if isinstance(instruction, Recv):
            self._messages.setdefault((stream.rank, instruction.slot), []).append(instruction)
        if not isinstance(instruction, Run | Send | Forward | Arrive):
            return operation

        def timed(env: list[Any]) -> None:
            begin = time.perf_counter_ns()
            operation(env)
            if isinstance(instruction, Run):
                jax.block_until_ready([env[s] for s in instruction.outputs])
            self._record(stream, instruction, begin / 1e3, time.perf_counter_ns() / 1e3)

        return timed

    def _record(
        self, stream: InstructionStream, instruction: Run | Send | Forward | Arrive, begin: float, end: float
    ) -> None:
        flows: list[tuple[str, str]] = []
        if isinstance(instruction, Run):
            stage, microbatch, name = instruction.stage, instruction.microbatch, instruction.function
        else:
            spec = stream.slots[instruction.slot]
            stage, microbatch = spec.stage, spec.microbatch
            if isinstance(instruction, Arrive):
                received = self._messages[stream.rank, instruction.slot]
                sources = list(dict.fromkeys(recv.source for recv in received))
                name = f"RECV from rank{'s' * (len(sources) > 1)} {', '.join(map(str, sources))}"
                flows = [("f", f"{recv.source}>{stream.rank}:{recv.tag}") for recv in received]
            else:
                name = f"{'SEND' if isinstance(instruction, Send) else 'FORWARD'} to rank {instruction.destination}"
                flows = [("s", f"{stream.rank}>{instruction.destination}:{instruction.tag}")]
        category = type(instruction).__name__.lower()
        self.events.append(bar(stream.rank, stage, name, microbatch, begin, end, category))
        for end_of_flow in flows:
            side, message = end_of_flow
            # Bound to the end of the receive's bar, to the beginning of the send's.
            when = begin if side == "s" else end
            # The n-th message with a tag, step by step: both ends count alike.
            count = self._counts[end_of_flow] = self._counts.get(end_of_flow, -1) + 1
            self.events.append(flow(stream.rank, stage, side, f"{message}#{count}", when))


def bar(rank: int, stage: int, name: str, microbatch: int, begin: float, end: float, category: str) -> Event:
    """Something that takes time, in microseconds; ``microbatch`` is -1 for what is done once per step."""
    label = f"{name} m{microbatch}" if microbatch >= 0 else name
    event: Event = {"pid": rank, "tid": stage, "name": label, "ph": "X"}
    return {**event, "ts": begin, "dur": end - begin, "cat": category}


def flow(rank: int, stage: int, side: str, message: str, when: float) -> Event:
    """The beginning (``s``) or the end (``f``) of the arrow of a message."""
    event: Event = {"pid": rank, "tid": stage, "name": "message", "cat": "message", "ph": side, "ts": when}
    return {**event, "id": message} | ({"bp": "e"} if side == "f" else {})


def gather_traces(tracer: Tracer, control: Control) -> list[Event]:
    """All ranks' events on rank 0's clock (collective); on other ranks, nothing."""
    offset = _clock_offset(control)
    shifted = [{**event, "ts": event["ts"] + offset} for event in tracer.events]
    gathered = control.allgather(shifted)
    return [event for events in gathered for event in events] if control.rank == 0 else []


def _clock_offset(control: Control, rounds: int = 20) -> float:
    """Rank 0's clock minus this rank's, in microseconds: the middle of the quickest of a few round trips."""
    offset, quickest = 0.0, float("inf")
    for peer in range(1, control.size):
        for _ in range(rounds):
            if control.rank == 0:
                control.receive(peer)
                control.send(time.perf_counter_ns() / 1e3, peer)
            elif control.rank == peer:
                begin = time.perf_counter_ns() / 1e3
                control.send(None, 0)
                there = control.receive(0)
                end = time.perf_counter_ns() / 1e3
                if end - begin < quickest:
                    quickest, offset = end - begin, there - (begin + end) / 2
    return offset


def write_trace(path: str | Path, events: list[Event]) -> None:
    """Write the file that chrome://tracing and Perfetto read; the first event is at time 0.

    Raises:
        ConfigError: the file can't be written; what was there before is still there.
    """
    first = min((event["ts"] for event in events), default=0.0)
    rows = sorted({(event["pid"], event["tid"]) for event in events})
    names: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({rank for rank, _ in rows})
    ]
    names += [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": stage, "args": {"name": f"stage {stage}"}}
        for rank, stage in rows
    ]
    shown = [{**event, "ts": event["ts"] - first} for event in events]
    text = json.dumps({"traceEvents": names + sorted(shown, key=lambda e: e["ts"])})
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the trace {path}: {error.strerror}",
            why=f"it has {human_bytes(len(text))}",
            fix="name a file in a folder that is there and has the space",
        ) from None
