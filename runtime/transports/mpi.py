"""Messages between processes over MPI, started and finished without the compute thread waiting for a send."""

from __future__ import annotations

import atexit
import functools
import math
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from bactrian.runtime import rank_lifecycle
from bactrian.runtime.box_routing import Box
from bactrian.runtime.shard_packing import packed
from bactrian.runtime.transports.interface import DeviceArray, Handle, device_array

_ALIGNMENT = 64  # XLA takes host memory without a copy only when it is aligned so
# Naps double from the first to the second.
_IDLE_NAP_SECONDS = 20e-6, 100e-6  # while nothing is computed on this rank: the core is free
# An idle rank asks without naps for so long: a nap ends late, by 0.3 ms where a core has gone to sleep meanwhile.
_EAGER_SECONDS = 2e-3  # where others may want the core
_ALONE_SECONDS = 50e-3  # on cores of its own
_BUSY_NAP_SECONDS = 0.5e-3, 4e-3  # while XLA may need the core: a wake-up costs it tens of microseconds
_PART_BYTES = 1 << 30  # of which a larger message is sent in several: MPI counts are 32 bits
_LOCAL_NAP_SECONDS = 20e-3  # where all that is under way are receives from ranks of this host


class BufferPool:
    """Aligned host buffers, used again once nothing refers to them: XLA keeps a reference for as long as it reads."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        # By size: the memory, and its aligned part. Whatever is made of a part refers to the memory, as numpy does it.
        self._buffers: dict[int, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = defaultdict(list)
        probe = [_aligned(1)]
        self._idle = next(sys.getrefcount(memory) for memory, _ in probe)

    def take(self, nbytes: int) -> np.ndarray[Any, Any]:
        """``nbytes`` bytes that nobody uses."""
        buffers = self._buffers[nbytes]
        for memory, part in buffers:
            if sys.getrefcount(memory) == self._idle:
                return part[:]  # a view of its own, so that the memory is known to be in use
        memory, part = _aligned(nbytes)
        if len(buffers) < self._keep:
            buffers.append((memory, part))
        return part[:]


def _aligned(nbytes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory, memory[start : start + nbytes]


class ArrayPool:
    """Device arrays over host buffers that messages are received into; both are used again once nothing refers to the
    array. Only for arrays whose readers are over by then: XLA's own references do not count here, since the array is
    never given up."""

    def __init__(self, device_array: DeviceArray) -> None:
        self._device_array = device_array
        self._arrays: dict[tuple[Any, ...], list[tuple[jax.Array, np.ndarray[Any, Any]]]] = defaultdict(list)
        probe = [(np.empty(0), 0)]
        self._idle = next(sys.getrefcount(array) for array, _ in probe)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any], place: Sharding) -> tuple[jax.Array, Any] | None:
        """An array that nobody uses and its memory; None where XLA makes a copy."""
        known = self._arrays[shape, dtype, place]
        for array, buffer in known:
            if sys.getrefcount(array) == self._idle:
                return array, buffer
        _, buffer = _aligned(math.prod(shape) * dtype.itemsize)
        array = self._device_array(buffer.view(dtype).reshape(shape), place, False)
        if array.unsafe_buffer_pointer() != buffer.ctypes.data:
            return None
        known.append((array, buffer))
        return array, buffer


class _Message(Handle):
    """``left`` of the parts that it is sent in are under way."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        super().__init__()
        self.left = 0


class _Send(_Message):
    """Of an array, which may not be made yet, or of bytes."""

    __slots__ = ("boxes", "data", "source", "started", "tag")

    def __init__(
        self,
        tag: int,
        source: jax.Array | None = None,
        boxes: tuple[Box, ...] = (),
        data: np.ndarray[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.data = source, data
        self.tag, self.boxes = tag, boxes
        self.started = False

    @property
    def is_ready(self) -> bool:
        """Whether it can start."""
        return self.source is None or _is_ready(self.source)


class _Bytes(_Message):
    """Bytes on their way into ``buffer``."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.buffer = buffer


class _Receive(_Message):
    """``over`` is the array over the buffer, if there is one already."""

    __slots__ = ("buffer", "dtype", "over", "place", "shape")

    def __init__(
        self,
        buffer: np.ndarray[Any, Any],
        shape: tuple[int, ...],
        dtype: Any,
        place: Sharding,
        over: jax.Array | None = None,
    ) -> None:
        super().__init__()
        self.buffer: np.ndarray[Any, Any] | None = buffer
        self.shape, self.dtype, self.place, self.over = shape, dtype, place, over


class MpiTransport:
    """Non-blocking sends and receives on a communicator of our own.

    MPI can only be asked again and again, and where ranks have a core each, every question takes time from the stage
    functions. So the main thread, when it needs a message that is not there, sleeps until the device has made the next
    value to be sent, sends it, and sleeps on; it asks again and again only when no work is left on the rank's device,
    since before that an answer would be of no use. A helper thread asks now and then, for transports that can't go on
    without, and sends what is left when a step is over. The helper needs ``MPI_THREAD_MULTIPLE``, since the main thread
    may be in another MPI call; without it (or with ``helper=False``) a step ends only when its messages have left.
    """

    def __init__(
        self,
        comm: Any = None,
        *,
        helper: bool = True,
        nap_seconds: tuple[float, float] = _BUSY_NAP_SECONDS,
        own_cores: bool = False,
        device_array: DeviceArray = device_array,
        part_bytes: int = _PART_BYTES,
    ) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self.comm = (comm or MPI.COMM_WORLD).Dup()
        self.rank: int = self.comm.Get_rank()
        here = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._all_local = here.Get_size() == self.comm.Get_size()
        here.Free()
        self._naps, self._part_bytes = nap_seconds, part_bytes
        self._eager_seconds = _ALONE_SECONDS if own_cores else _EAGER_SECONDS
        self._device_array = device_array
        self._pool, self._arrays = BufferPool(), ArrayPool(device_array)
        # By destination: values made or being made, in order.
        self._unsent: list[deque[_Send]] = [deque() for _ in range(self.comm.Get_size())]
        self._order: deque[_Send] = deque()  # all of them
        self._requests: list[Any] = []
        self._handles: list[_Message] = []  # of each request
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._idle = False  # the helper has nothing to do and waits for `_work`
        self._between_steps = True  # nobody but the helper looks after messages
        self._closed = False
        self._error: BaseException | None = None
        helper = helper and MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._helper = threading.Thread(target=self._help, name="bactrian-mpi", daemon=True) if helper else None
        if self._helper:
            self._helper.start()
        atexit.register(self._finish)
        rank_lifecycle.note_end_first()

    def send(self, array: jax.Array, destination: int, tag: int, *, move: bool = False) -> Handle:
        """Send the array, or queue it: it leaves when it is ready and what was queued before it has left."""
        del move  # the message is a copy
        return self._queue(_Send(tag, array), destination)

    def send_boxes(self, array: jax.Array, boxes: tuple[Box, ...], destination: int, tag: int) -> Handle:
        """Send parts of the array, as `send` does the whole."""
        return self._queue(_Send(tag, array, boxes), destination)

    def _queue(self, handle: _Send, destination: int) -> Handle:
        self._between_steps = False
        queue = self._unsent[destination]
        with self._lock:
            if not queue and handle.is_ready:
                self._start(handle, destination)
            else:
                queue.append(handle)
                self._order.append(handle)
        if self._idle:
            self._work.set()
        return handle

    def post_receive(
        self, source: int, tag: int, shape: tuple[int, ...], dtype: str, place: Sharding, *, passing: bool = False
    ) -> Handle:
        """Post the receive into a buffer that XLA can take without a copy."""
        kind = _numpy_dtype(dtype)
        taken = self._arrays.take(shape, kind, place) if passing and place.num_devices == 1 else None
        if taken is None:
            handle = _Receive(self._pool.take(math.prod(shape) * kind.itemsize), shape, kind, place)
        else:
            handle = _Receive(taken[1], shape, kind, place, taken[0])
        return self._post(handle, source, tag)

    def _post(self, handle: _Receive | _Bytes, source: int, tag: int) -> Handle:
        assert handle.buffer is not None
        with self._lock:
            self._begin(handle, handle.buffer, lambda part: self.comm.Irecv(part, source=source, tag=tag))
        if self._idle:
            self._work.set()
        return handle

    def send_bytes(self, data: np.ndarray[Any, Any], destination: int, tag: int) -> Handle:
        """Send bytes, after what was queued before: another step's message may have the same tag."""
        return self._queue(_Send(tag, data=data), destination)

    def post_bytes(self, source: int, tag: int, nbytes: int) -> Handle:
        """Post the receive into a buffer that XLA can take without a copy."""
        handle = _Bytes(self._pool.take(nbytes))
        return self._post(handle, source, tag)

    def test(self, handle: Handle) -> bool:
        """Whether the message has left, or arrived."""
        if not handle.done:
            self.poll()
        return handle.done

    def wait(self, handle: Handle, running: jax.Array | None = None) -> Any:
        """Wait, looking after all other messages meanwhile; sleep while ``running`` is computed."""
        if not handle.done:
            self._between_steps = False
            self.poll()
            nap, longest = _IDLE_NAP_SECONDS
            eager = 0.0
            while not handle.done:
                source = self._next_source()
                if running is not None and source is not None and _is_made(source):
                    pass  # made after the last look: `poll` sends it
                elif running is None or not (_sleep_until(source) or _sleep_until(running)):
                    now = time.perf_counter()
                    eager = eager or now + self._eager_seconds
                    if now < eager:
                        os.sched_yield()
                    else:
                        time.sleep(nap)
                        nap = min(2 * nap, longest)
                self.poll()
        if isinstance(handle, _Bytes):
            return handle.buffer
        if isinstance(handle, _Receive) and handle.array is None:
            if handle.over is not None:
                handle.array = handle.over
            else:
                assert handle.buffer is not None
                view = handle.buffer.view(handle.dtype).reshape(handle.shape)
                handle.array = self._device_array(view, handle.place, False)
            handle.buffer = handle.over = None
        return handle.array

    def poll(self) -> None:
        """Start the sends whose values are ready; note which messages are done."""
        if self._error is not None:
            raise self._error
        with self._lock:
            for destination, queue in enumerate(self._unsent):
                while queue and queue[0].is_ready:
                    self._start(queue.popleft(), destination)
            while self._order and self._order[0].started:
                self._order.popleft()
            if not self._requests:
                return
            done = self._mpi.Request.Testsome(self._requests)
            if done:
                for i in done:
                    handle = self._handles[i]
                    handle.left -= 1
                    handle.done = not handle.left
                    if handle.done and isinstance(handle, _Send):
                        handle.source = handle.data = None
                finished = set(done)
                self._requests = [r for i, r in enumerate(self._requests) if i not in finished]
                self._handles = [h for i, h in enumerate(self._handles) if i not in finished]

    def _start(self, send: _Send, destination: int) -> None:
        """Hand a made value to MPI; the lock is held."""
        send.started = True
        self._begin(send, _bytes_of(send), lambda part: self.comm.Isend(part, dest=destination, tag=send.tag))

    def _begin(self, handle: _Message, data: np.ndarray[Any, Any], start: Callable[[list[Any]], Any]) -> None:
        """Start the parts of a message, the same ones at both ends; MPI keeps their order. The lock is held."""
        for at in range(0, max(data.size, 1), self._part_bytes):
            self._requests.append(start([data[at : at + self._part_bytes], self._mpi.BYTE]))
            self._handles.append(handle)
            handle.left += 1

    @property
    def has_helper(self) -> bool:
        """Whether messages go on while the main thread does something else."""
        return self._helper is not None

    def busy(self) -> bool:
        """Whether any message is under way."""
        with self._lock:
            return bool(self._requests) or any(self._unsent)

    def _next_source(self) -> jax.Array | None:
        """The oldest value that is not sent yet."""
        with self._lock:
            return self._order[0].source if self._order else None

    def _help(self) -> None:
        """Ask now and then; between steps, send each value when it is made."""
        shortest, longest = self._naps
        nap = shortest
        try:
            while not self._closed:
                if not self.busy():
                    self._sleep()
                    nap = shortest
                    continue
                if not (self._between_steps and _sleep_until(self._next_source())):
                    sends = any(self._unsent) or any(isinstance(handle, _Send) for handle in self._handles)
                    receives = self._all_local and not sends
                    self._work.wait(max(nap, _LOCAL_NAP_SECONDS) if receives else nap)
                    self._work.clear()
                    nap = min(2 * nap, longest)
                self.poll()
        except BaseException as error:  # shown by the thread that next asks for a message
            self._error = error

    def _sleep(self) -> None:
        """Until a message is posted or the transport is closed."""
        self._idle = True
        if not self.busy() and not self._closed:
            self._work.wait()
        self._idle = False
        self._work.clear()

    def end_step(self) -> None:
        """Leave what is still to be sent to the helper."""
        if self._helper is None:
            self.flush()
        else:
            self._between_steps = True
            self._work.set()

    def flush(self) -> None:
        """Wait until every message is done."""
        while self.busy():
            self.poll()
            time.sleep(_IDLE_NAP_SECONDS[1])

    def close(self) -> None:
        """Finish all messages, stop the helper, free the communicator (collective)."""
        if not self._closed:
            self._finish()
            self.comm.Free()

    def _finish(self) -> None:
        """Before MPI ends: what is under way leaves, unless this rank's failure is about to end the job."""
        if self._closed:
            return
        if not rank_lifecycle.failing():
            self.flush()
        self._closed = True
        self._work.set()
        if self._helper:
            self._helper.join()
        atexit.unregister(self._finish)


@functools.cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def _bytes_of(send: _Send) -> np.ndarray[Any, Any]:
    """A ready array, or what is to be sent of it, as bytes.

    numpy's view keeps XLA from using the memory again, whoever donates the array, and raises if the computation failed;
    the bare pointer would do neither.
    """
    if send.source is None:
        assert send.data is not None
        return send.data
    if send.boxes:
        return packed(send.source, send.boxes)
    return np.ascontiguousarray(np.asarray(send.source)).reshape(-1).view(np.uint8)


def _is_made(array: jax.Array) -> bool:
    return not array.is_deleted() and _is_ready(array)


def _sleep_until(array: jax.Array | None) -> bool:
    """Sleep until an array is made; false, and at once, if it is or was."""
    if array is None or array.is_deleted() or _is_ready(array):
        return False
    jax.block_until_ready(array)
    return True


def _is_ready(array: Any) -> bool:
    return array.is_ready()  # public, but missing in jax's type stubs
