"""The control plane: what the ranks of a job tell each other beside the values of a step. No jax.

Plans, fingerprints, traces and gathered state go here, the values of a step through a transport (`transports/`). All
that is called collective must be called by every rank, in the same order.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

HostArray = np.ndarray[Any, Any]
_CHUNK_BYTES = 1 << 30  # MPI counts are 32 bits
_NAP_SECONDS = 0.01


class Control(Protocol):
    """The ranks of a job, or of a group of it."""

    rank: int
    size: int

    @property
    def serves_threads(self) -> bool:
        """Whether several threads may use it, and others of their own, at once."""
        ...

    def barrier(self) -> None:
        """Wait until every rank has come here. Collective; who waits sleeps, and leaves the cores to who works."""
        ...

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """The root's value (pickled), on every rank. Collective."""
        ...

    def broadcast_array(self, array: HostArray, root: int) -> None:
        """Fill ``array`` on every rank with the root's. Collective."""
        ...

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's value (pickled), by rank. Collective."""
        ...

    def send(self, value: Any, rank: int) -> None:
        """Send a small value (pickled) to a rank that is in `receive`, or will be."""
        ...

    def receive(self, rank: int) -> Any:
        """The value that a rank sends."""
        ...

    def poll(self) -> Any:
        """A value that some rank has sent here; None, and at once, if there is none."""
        ...

    def duplicate(self) -> Control:
        """Another one for the same ranks, whose messages are its own. Collective; who waits sleeps."""
        ...

    def split(self, group: int) -> Control:
        """The ranks that give the same number, numbered in the order that they have here. Collective."""
        ...


class SingleProcess:
    """The control plane of a job of one process."""

    rank = 0
    size = 1
    serves_threads = True

    def barrier(self) -> None:
        """Does nothing."""

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """The value."""
        return value

    def broadcast_array(self, array: HostArray, root: int) -> None:
        """Does nothing: the root is the only rank."""

    def allgather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def send(self, value: Any, rank: int) -> None:
        """There is nobody to send to."""
        raise ValueError(f"rank {rank} of a job of one process")

    def receive(self, rank: int) -> Any:
        """There is nobody to receive from."""
        raise ValueError(f"rank {rank} of a job of one process")

    def poll(self) -> Any:
        """There is nobody who sends."""

    def duplicate(self) -> SingleProcess:
        """Itself."""
        return self

    def split(self, group: int) -> SingleProcess:
        """Itself."""
        return self


class MpiControl:
    """The control plane over an mpi4py communicator, which must see no other messages."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    @property
    def serves_threads(self) -> bool:
        """Whether MPI has started so."""
        from mpi4py import MPI

        return MPI.Query_thread() == MPI.THREAD_MULTIPLE

    def barrier(self) -> None:
        """Asks now and then whether all have come."""
        _nap_until_done(self.comm.Ibarrier())

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """Broadcasts the pickled value."""
        return self.comm.bcast(value, root=root)

    def broadcast_array(self, array: HostArray, root: int) -> None:
        """Broadcasts the bytes, whatever the dtype."""
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _CHUNK_BYTES):
            self.comm.Bcast(data[start : start + _CHUNK_BYTES], root=root)

    def allgather(self, value: Any) -> list[Any]:
        """Gathers pickled values."""
        return self.comm.allgather(value)

    def send(self, value: Any, rank: int) -> None:
        """Sends the pickled value."""
        self.comm.send(value, dest=rank)

    def receive(self, rank: int) -> Any:
        """Receives a pickled value."""
        return self.comm.recv(source=rank)

    def poll(self) -> Any:
        """Receives what was sent with `send`."""
        message = self.comm.improbe()
        return None if message is None else message.recv()

    def duplicate(self) -> MpiControl:
        """A duplicate of the communicator."""
        comm, made = self.comm.Idup()
        _nap_until_done(made)
        return MpiControl(comm)

    def split(self, group: int) -> MpiControl:
        """A new communicator."""
        return MpiControl(self.comm.Split(group, self.rank))


def _nap_until_done(request: Any) -> None:
    while not request.Test():
        time.sleep(_NAP_SECONDS)
