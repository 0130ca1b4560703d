"""Walks one rank's instruction stream. Instructions are bound to closures once, so that a step is a loop over calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from bactrian.passes.frame.errors import RuntimeFault
from bactrian.runtime import faults, rank_lifecycle
from bactrian.runtime.box_routing import Box
from bactrian.runtime.instructions import (
    Arrive,
    Copy,
    Forward,
    Free,
    Instruction,
    InstructionStream,
    Load,
    Recv,
    Run,
    Send,
    Slot,
    Wait,
    describe,
)
from bactrian.runtime.shard_packing import assembled, check_boxes, joined, put_shards, unpacked
from bactrian.runtime.timeline import Tracer
from bactrian.runtime.transports.interface import (
    DeviceArray,
    Handle,
    ShardTransport,
    Transport,
    WouldBlock,
    device_array,
    put,
)

Function = Callable[[list[jax.Array]], Sequence[jax.Array]]
Environment = list[Any]  # slot -> array, or None
_Operation = Callable[[Environment], None]
_Arriving = tuple[int, tuple[Box, ...], Handle]  # the rank that sends them, which they are, and the message


class Executor:
    """One rank's instruction stream, ready to run.

    Args:
        stream: what to do.
        functions: the compiled stage functions by symbol; each takes and gives a list of arrays, and donates what its
            `Run` says.
        place: where the array of a slot lives.
        transport: how values travel.
        tracer: records times; makes every call wait for its results.
        meter: counts what is held after every instruction.
        device_array: how host arrays come to a device.
        inline: wait for each call's results before going on. For ranks whose only core is their device: nothing can
            run beside a call there, and what comes next only delays the value that another rank waits for. And for ranks
            that share meshes of CPUs: nothing promises that calls that run at once take each other's messages in one
            order on all of them.
    """

    def __init__(
        self,
        stream: InstructionStream,
        functions: Mapping[str, Function],
        place: Callable[[Slot], Sharding],
        transport: Transport,
        *,
        tracer: Tracer | None = None,
        meter: Meter | None = None,
        device_array: DeviceArray = device_array,
        inline: bool = False,
    ) -> None:
        self._device_array, self._inline = device_array, inline
        self.stream, self.functions, self.transport = stream, functions, transport
        self.tracer, self.meter = tracer, meter
        self.places = tuple(place(spec) for spec in stream.slots)
        self.at = 0
        self.num_steps = 0
        self._env: Environment = []
        self._consumed_now: list[jax.Array] = []  # arguments that this step consumes
        self._spent: list[jax.Array] = []  # those of the step before, not let go of yet
        self._batch: dict[int, Any] = {}
        self._receives: dict[int, Handle] = {}
        self._parts: dict[int, list[_Arriving]] = {}  # slot -> what is on its way of it
        self._sends: dict[int, list[Handle]] = {}
        self._running: jax.Array | None = None  # made by the last call, where the host's cores are the device
        self._empty: Environment = [None] * len(stream.slots)  # what every step begins with
        for microbatch, slot in stream.indices:
            self._empty[slot] = device_array(np.array(microbatch, np.int32), self.places[slot], True)
        self._donated = {s for x in stream.instructions if isinstance(x, Run) for s in x.donated}
        self._lasting = {r.slot for r in stream.results} | self._donated  # may be read when the step is over
        self._lasting |= {x.source for x in stream.instructions if isinstance(x, Copy)}
        self._in_parts = {x.slot for x in stream.instructions if isinstance(x, Recv) and x.boxes}
        self._waited = {x.slot for x in stream.instructions if isinstance(x, Wait)}
        self._loaded = {x.argument for x in stream.instructions if isinstance(x, Load)}
        self._argument_slots = [argument.slot for argument in stream.arguments]
        waits = any(isinstance(x, Arrive) for x in stream.instructions)
        self._consumed = [waits and slot in self._donated for slot in self._argument_slots]
        self._operations = [self._wrap(x, self._bind(x)) for x in stream.instructions]

    def step(self, pieces: Sequence[jax.Array], batch: Mapping[int, Any]) -> list[jax.Array]:
        """One step. ``pieces`` go with ``stream.arguments``, what it gives with ``stream.results``; ``batch``
        holds the whole array of every batch argument. State pieces that the step consumes are donated."""
        self.start(pieces, batch)
        if not self.advance():
            raise RuntimeFault(
                "this rank's instruction stream waits for other ranks of the process",
                where=self.here(),
                fix="run the executors of all of them with run_together",
            )
        return self.finish()

    def start(self, pieces: Sequence[jax.Array], batch: Mapping[int, Any]) -> None:
        """Begin a step.

        What it consumes is kept until the next step waits for a message: letting go of hundreds of array objects takes
        time, at the end of a step others wait for it, and the objects hold no memory any more.
        """
        if len(pieces) != len(self.stream.arguments):
            raise RuntimeFault(
                f"got {len(pieces)} argument pieces, the instruction stream has {len(self.stream.arguments)}"
            )
        env = self._env = self._empty.copy()
        for slot, piece in zip(self._argument_slots, pieces, strict=True):
            env[slot] = piece
        self._consumed_now = list(compress(pieces, self._consumed))
        self._batch = {a: _host_view(batch[a]) for a in self._loaded}
        self._sends = {slot: [] for slot in self._waited}
        self.at = 0
        if self.meter is not None:
            self.meter.begin(self.stream)
        faults.set_step(self.num_steps)
        rank_lifecycle.note_step(self.num_steps)

    def advance(self) -> bool:
        """Go on until the end (true) or until another stream of this process has to go first (false)."""
        operations, env, at = self._operations, self._env, self.at
        end = len(operations)
        try:
            while at < end:
                operations[at](env)
                at += 1
        except WouldBlock:
            return False
        finally:
            self.at = at
        return True

    def finish(self) -> list[jax.Array]:
        """The results of the step that has ended."""
        env = self._env
        results = [env[r.slot] for r in self.stream.results]
        self._env, self._batch, self._sends, self._running = [], {}, {}, None
        self._parts.clear()
        self._spent, self._consumed_now = self._consumed_now, []
        self.transport.end_step()
        self.num_steps += 1
        return results

    def here(self) -> str:
        """The instruction under way, for messages."""
        if self.at >= len(self.stream.instructions):
            return f"rank {self.stream.rank}, between steps"
        what = describe(self.stream.instructions[self.at])
        return f"rank {self.stream.rank}, step {self.num_steps}, instruction {self.at}: {what}"

    def _wrap(self, instruction: Instruction, operation: _Operation) -> _Operation:
        """Add what was asked for: faults, times, counting. Nothing asked for: nothing added."""
        if faults.ACTIVE is not None:
            operation = _faulty(instruction, operation)
        if self.tracer is not None:
            operation = self.tracer.traced(self.stream, instruction, operation)
        meter = self.meter
        if meter is not None:
            plain = operation

            def metered(env: Environment) -> None:
                plain(env)
                meter.look(self.stream, instruction, env)

            return metered
        return operation

    def _bind(self, instruction: Instruction) -> _Operation:
        match instruction:
            case Run():
                return self._bind_run(instruction)
            case Load():
                return self._bind_load(instruction)
            case Send():
                return self._bind_send(instruction)
            case Recv(boxes=boxes) if boxes:
                return self._bind_receive_boxes(instruction)
            case Forward():
                return self._bind_forward(instruction)
            case Arrive(slot=slot) if slot in self._in_parts:
                return self._bind_arrive_in_boxes(slot)
            case Recv(slot=slot, source=source, tag=tag, shape=shape, dtype=dtype):
                post, receives, place = self.transport.post_receive, self._receives, self.places[slot]
                passing = self._inline and slot not in self._lasting

                def recv(env: Environment) -> None:
                    receives[slot] = post(source, tag, shape, dtype, place, passing=passing)

                return recv
            case Arrive(slot=slot):
                wait, receives = self.transport.wait, self._receives

                def arrive(env: Environment) -> None:
                    if self._spent:
                        self._spent = []
                    env[slot] = wait(receives[slot], self._running)
                    del receives[slot]

                return arrive
            case Wait(slot=slot):
                wait = self.transport.wait

                def drain(env: Environment) -> None:
                    for handle in self._sends[slot]:
                        wait(handle, self._running)

                return drain
            case Copy(source=source, target=target, alias=alias):
                place = self.places[target]
                waits = self._inline and not place.is_fully_addressable  # it may be a call

                def copy(env: Environment) -> None:
                    env[target] = put(env[source], place, alias=alias)
                    if waits:
                        env[target].block_until_ready()

                return copy
            case Free(slots=slots):

                def free(env: Environment) -> None:
                    for slot in slots:
                        env[slot] = None

                return free

    def _bind_run(self, run: Run) -> _Operation:
        if run.function not in self.functions:
            raise RuntimeFault(f"stage function {run.function} was not compiled", where=f"rank {self.stream.rank}")
        function, inputs, outputs, donated = self.functions[run.function], run.inputs, run.outputs, run.donated
        sizes = [self.stream.slots[slot].nbytes for slot in outputs]
        on_host = all(d.platform == "cpu" for slot in outputs[:1] for d in self.places[slot].device_set)
        smallest = sizes.index(min(sizes)) if sizes and on_host else None  # it is kept alive until the next call
        inline = self._inline

        def call(env: Environment) -> None:
            values = function([env[i] for i in inputs])
            if smallest is not None:
                self._running = values[smallest]
                if inline:
                    values[smallest].block_until_ready()
            for slot in donated:
                env[slot] = None
            for slot, value in zip(outputs, values, strict=True):
                env[slot] = value

        return call

    def _bind_load(self, load: Load) -> _Operation:
        argument, microbatch, slot, place = load.argument, load.microbatch, load.slot, self.places[load.slot]
        num_microbatches, alias = self.stream.num_microbatches, load.slot not in self._donated
        rows, to_device = self.stream.slots[slot].shape[0], self._device_array

        def fetch(env: Environment) -> None:
            array, is_ours = self._batch[argument]
            if num_microbatches > 1:
                array = array[microbatch * rows : (microbatch + 1) * rows]
            if isinstance(array, jax.Array):
                env[slot] = put(array, place, alias=alias)
            else:  # memory that its owner may write to is copied
                env[slot] = to_device(array, place, not is_ours)

        return fetch

    def _bind_send(self, send: Send) -> _Operation:
        slot, destination, tag, move, boxes = send.slot, send.destination, send.tag, send.move, send.boxes
        if boxes:
            send_boxes = self._shard_transport().send_boxes

            def start(array: jax.Array, destination: int, tag: int, *, move: bool) -> Handle:
                del move
                return send_boxes(array, boxes, destination, tag)
        else:
            start = self.transport.send
        if slot not in self._waited:

            def post(env: Environment) -> None:
                start(env[slot], destination, tag, move=move)

            return post

        def post_and_keep(env: Environment) -> None:
            self._sends[slot].append(start(env[slot], destination, tag, move=move))

        return post_and_keep

    def _shard_transport(self) -> ShardTransport:
        if not isinstance(self.transport, ShardTransport):
            raise RuntimeFault(
                "this transport can't send shards of values",
                where=f"rank {self.stream.rank} of {self.stream.num_ranks}",
            )
        return self.transport

    def _bind_receive_boxes(self, recv: Recv) -> _Operation:
        slot, source, tag, nbytes, boxes = recv.slot, recv.source, recv.tag, recv.nbytes, recv.boxes
        post, parts = self._shard_transport().post_bytes, self._parts

        def receive(env: Environment) -> None:
            parts.setdefault(slot, []).append((source, boxes, post(source, tag, nbytes)))

        return receive

    def _bind_forward(self, forward: Forward) -> _Operation:
        slot, sources, destination, tag = forward.slot, forward.sources, forward.destination, forward.tag
        boxes, dtype, send = (
            forward.boxes,
            _numpy_dtype(self.stream.slots[slot].dtype),
            self._shard_transport().send_bytes,
        )

        def pass_on(env: Environment) -> None:
            here = self._arrived(dtype, [part for part in self._parts[slot] if part[0] in sources])
            send(joined([here[box] for box in boxes]), destination, tag)

        return pass_on

    def _bind_arrive_in_boxes(self, slot: int) -> _Operation:
        spec, place = self.stream.slots[slot], self.places[slot]
        shape, dtype = spec.shape, _numpy_dtype(spec.dtype)
        mine = [x for x in self.stream.instructions if isinstance(x, Recv) and x.slot == slot]
        where = f"rank {self.stream.rank}, {describe(Arrive(slot))}"
        check_boxes((box for recv in mine for box in recv.boxes), place, shape, where)

        def arrive(env: Environment) -> None:
            if self._spent:
                self._spent = []
            parts = self._arrived(dtype, self._parts.pop(slot))
            env[slot] = put_shards(lambda box: assembled(parts, box, dtype), shape, place)

        return arrive

    def _arrived(self, dtype: np.dtype[Any], parts: Sequence[_Arriving]) -> dict[Box, np.ndarray[Any, Any]]:
        """Wait for parts of a value."""
        here: dict[Box, np.ndarray[Any, Any]] = {}
        for _, boxes, handle in parts:
            here |= unpacked(self.transport.wait(handle, self._running), boxes, dtype)
        return here


def run_together(
    executors: Sequence[Executor], pieces: Sequence[Sequence[jax.Array]], batch: Mapping[int, Any]
) -> list[list[jax.Array]]:
    """One step of several streams in one process, each in turn as far as it gets.

    Raises:
        RuntimeFault: no stream can go on (`check_streams` proves that this does not happen).
    """
    for executor, mine in zip(executors, pieces, strict=True):
        executor.start(mine, batch)
    waiting = list(executors)
    while waiting:
        before = sum(e.at for e in executors), len(waiting)
        waiting = [e for e in waiting if not e.advance()]
        if waiting and before == (sum(e.at for e in executors), len(waiting)):
            raise RuntimeFault("no rank can go on", where="; ".join(e.here() for e in waiting))
    return [executor.finish() for executor in executors]


class Meter:
    """Counts the buffers that executors really hold after each instruction. For tests and reports: it looks at all."""

    def __init__(self) -> None:
        self.in_flight: dict[int, int] = {}  # stage -> most microbatches with live activations
        self.peak_bytes: dict[int, int] = {}  # rank -> most bytes in slots
        self._begun: set[tuple[int, int]] = set()

    def begin(self, stream: InstructionStream) -> None:
        """A step begins: no microbatch of this stream's stages has begun."""
        self._begun = {(stage, m) for stage, m in self._begun if stage not in stream.stages}

    def look(self, stream: InstructionStream, instruction: Instruction, env: Environment) -> None:
        """Count after one instruction."""
        if isinstance(instruction, Run) and "forward" in instruction.phase:
            self._begun.add((instruction.stage, instruction.microbatch))
        live = [spec for spec, value in zip(stream.slots, env, strict=True) if value is not None]
        held = sum(spec.nbytes for spec in live)
        self.peak_bytes[stream.rank] = max(held, self.peak_bytes.get(stream.rank, 0))
        running = {(s.stage, s.microbatch) for s in live if s.activation} & self._begun
        for stage in stream.stages:
            count = sum(s == stage for s, _ in running)
            self.in_flight[stage] = max(count, self.in_flight.get(stage, 0))


def _host_view(array: Any) -> tuple[Any, bool]:
    """A batch argument in the form that is cheapest to slice, and whether its memory never changes.

    Slices of host memory are views; a slice of an array on another device is a computation there.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array), False
    if array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices()):
        return np.asarray(array), True
    return array, True


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def _faulty(instruction: Instruction, operation: _Operation) -> _Operation:
    def guarded(env: Environment) -> None:
        if isinstance(instruction, Send | Forward):
            faults.at("before_send")
        elif isinstance(instruction, Run):
            faults.at("in_step")
        operation(env)
        if isinstance(instruction, Arrive):
            faults.at("after_recv")

    return guarded
