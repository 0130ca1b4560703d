"""Messages between processes over MPI, started and finished without the compute thread waiting for a send."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections import defaultdict, deque
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from bactrian.runtime import launch
from bactrian.runtime.transport import DeviceArray, Handle, device_array

_ALIGNMENT = 64  # XLA takes host memory without a copy only when it is aligned so
# Naps double from the first to the second.
_IDLE_NAP_SECONDS = 20e-6, 100e-6  # while nothing is computed on this rank: the core is free
_BUSY_NAP_SECONDS = 0.5e-3, 4e-3  # while XLA may need the core: a wake-up costs it tens of microseconds


class BufferPool:
    """Aligned host buffers, used again once nothing refers to them: XLA keeps a reference for as long as it reads."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._buffers: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
        probe = [np.empty(1, np.uint8)]
        self._idle = next(sys.getrefcount(raw) for raw in probe)

    def take(self, nbytes: int) -> np.ndarray[Any, Any]:
        """``nbytes`` bytes that nobody uses."""
        buffers = self._buffers[nbytes]
        found = None
        for raw in buffers:
            if sys.getrefcount(raw) == self._idle:
                found = raw
                break
        if found is None:
            found = np.empty(nbytes + _ALIGNMENT, np.uint8)
            if len(buffers) < self._keep:
                buffers.append(found)
        start = -found.ctypes.data % _ALIGNMENT
        return found[start : start + nbytes]


class _Send(Handle):
    __slots__ = ("source", "started", "tag")

    def __init__(self, source: jax.Array, tag: int) -> None:
        super().__init__()
        self.source: jax.Array | None = source
        self.tag = tag
        self.started = False


class _Receive(Handle):
    __slots__ = ("buffer", "dtype", "place", "shape")

    def __init__(self, buffer: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: Any, place: Sharding) -> None:
        super().__init__()
        self.buffer: np.ndarray[Any, Any] | None = buffer
        self.shape, self.dtype, self.place = shape, dtype, place


class MpiTransport:
    """Non-blocking sends and receives on a communicator of our own.

    A value is sent once XLA has made it: a helper thread waits for that, which costs the core nothing, and then looks
    after the messages from time to time. MPI itself can only be asked again and again. Each question takes time from
    the stage functions where ranks have one core each, so the main thread asks only when no work is left on this
    rank's device; before that an answer would be of no use. The helper needs ``MPI_THREAD_MULTIPLE``, since the main
    thread may be in another MPI call; without it (or with ``helper=False``) the main thread asks all the time, and a
    step ends only when its messages have left.
    """

    def __init__(
        self,
        comm: Any = None,
        *,
        helper: bool = True,
        nap_seconds: tuple[float, float] = _BUSY_NAP_SECONDS,
        device_array: DeviceArray = device_array,
    ) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self.comm = (comm or MPI.COMM_WORLD).Dup()
        self.rank: int = self.comm.Get_rank()
        self._naps = nap_seconds
        self._device_array = device_array
        self._pool = BufferPool()
        # By destination: values made or being made, in order.
        self._unsent: list[deque[_Send]] = [deque() for _ in range(self.comm.Get_size())]
        self._order: deque[_Send] = deque()  # all of them, for the helper
        self._requests: list[Any] = []
        self._handles: list[Any] = []
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._idle = False  # the helper has nothing to do and waits for `_work`
        self._closed = False
        self._error: BaseException | None = None
        helper = helper and MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._helper = threading.Thread(target=self._help, name="bactrian-mpi", daemon=True) if helper else None
        if self._helper:
            self._helper.start()
        atexit.register(self._finish)

    def send(self, array: jax.Array, destination: int, tag: int, *, move: bool = False) -> Handle:
        """Queue the array; it leaves when it is ready and what was queued before it has left."""
        del move  # the message is a copy
        handle = _Send(array, tag)
        self._unsent[destination].append(handle)
        if self._helper:
            self._order.append(handle)
            self._work.set()
        return handle

    def post_receive(self, source: int, tag: int, shape: tuple[int, ...], dtype: str, place: Sharding) -> Handle:
        """Post the receive into a buffer that XLA can take without a copy."""
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        size = 1
        for dim in shape:
            size *= dim
        handle = _Receive(self._pool.take(size * kind.itemsize), shape, kind, place)
        with self._lock:
            self._requests.append(self.comm.Irecv([handle.buffer, self._mpi.BYTE], source=source, tag=tag))
            self._handles.append(handle)
        if self._idle:
            self._work.set()
        return handle

    def test(self, handle: Handle) -> bool:
        """Whether the message has left, or arrived."""
        if not handle.done:
            self.poll()
        return handle.done

    def wait(self, handle: Handle, running: jax.Array | None = None) -> Any:
        """Wait, looking after all other messages meanwhile; while ``running`` is computed, only the helper does."""
        if not handle.done:
            self.poll()
            if not handle.done and running is not None and self._helper and not running.is_deleted():
                jax.block_until_ready(running)
                self.poll()
            nap, longest = _IDLE_NAP_SECONDS
            while not handle.done:
                time.sleep(nap)
                nap = min(2 * nap, longest)
                self.poll()
        if isinstance(handle, _Receive) and handle.array is None:
            assert handle.buffer is not None
            view = handle.buffer.view(handle.dtype).reshape(handle.shape)
            handle.array = self._device_array(view, handle.place, False)
            handle.buffer = None
        return handle.array

    def poll(self) -> None:
        """Start the sends whose values are ready; note which messages are done."""
        if self._error is not None:
            raise self._error
        with self._lock:
            for destination, queue in enumerate(self._unsent):
                while queue and (source := queue[0].source) is not None and _is_ready(source):
                    send = queue.popleft()
                    send.started = True
                    data = np.ascontiguousarray(np.asarray(source)).reshape(-1).view(np.uint8)
                    self._requests.append(self.comm.Isend([data, self._mpi.BYTE], dest=destination, tag=send.tag))
                    self._handles.append(send)
            if not self._requests:
                return
            done = self._mpi.Request.Testsome(self._requests)
            if done:
                for i in done:
                    handle = self._handles[i]
                    if isinstance(handle, _Send):
                        handle.source = None
                    handle.done = True
                finished = set(done)
                self._requests = [r for i, r in enumerate(self._requests) if i not in finished]
                self._handles = [h for i, h in enumerate(self._handles) if i not in finished]

    def busy(self) -> bool:
        """Whether any message is under way."""
        with self._lock:
            return bool(self._requests) or any(self._unsent)

    def _help(self) -> None:
        """Start each message when its value is made; in between look after those under way, less and less often."""
        shortest, longest = self._naps
        nap = shortest
        try:
            while not self._closed:
                while self._order and self._order[0].started:
                    self._order.popleft()
                if self._order:
                    source = self._order[0].source
                    if source is not None:
                        jax.block_until_ready(source)
                        nap = shortest
                elif self.busy():
                    self._work.wait(nap)
                    nap = min(2 * nap, longest)
                    self._work.clear()
                else:
                    self._sleep()
                    continue
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
        """Without a helper nobody would look after what is left."""
        if self._helper is None:
            self.flush()

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
        if not launch.failing():
            self.flush()
        self._closed = True
        self._work.set()
        if self._helper:
            self._helper.join()
        atexit.unregister(self._finish)


def _is_ready(array: Any) -> bool:
    return array.is_ready()  # public, but missing in jax's type stubs
