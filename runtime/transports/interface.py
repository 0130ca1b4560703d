"""How values travel between ranks: the interface, and the transport of lists that share one process."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from bactrian.runtime.box_routing import Box
from bactrian.runtime.shard_packing import put_parts

Place = jax.Device | Sharding
# A host array at a place: `device_array`, or a faster equal.
DeviceArray = Callable[[Any, Sharding, bool], jax.Array]


class WouldBlock(Exception):
    """The cooperative executor has to let another list go on first."""


class Handle:
    """A send or a receive under way. ``array`` is the received value once ``done``."""

    __slots__ = ("array", "done")

    def __init__(self) -> None:
        self.done = False
        self.array: jax.Array | None = None


class Transport(Protocol):
    """What an executor asks of a transport. Starting never waits."""

    def send(self, array: jax.Array, destination: int, tag: int, *, move: bool = False) -> Handle:
        """Start sending; ``move``: the caller drops the array right after."""
        ...

    def post_receive(
        self, source: int, tag: int, shape: tuple[int, ...], dtype: str, place: Sharding, *, passing: bool = False
    ) -> Handle:
        """Start receiving a value that is to live at ``place``.

        ``passing``: what reads the array is over before the caller drops it, so its memory may then be used again.
        """
        ...

    def test(self, handle: Handle) -> bool:
        """Whether the send's buffer may be donated, or the received value read."""
        ...

    def wait(self, handle: Handle, running: jax.Array | None = None) -> Any:
        """Wait for it. Gives a receive's array. May raise `WouldBlock` in cooperative execution.

        ``running`` is made by the last work that was given to this rank's device: until it is ready, the device has
        something to do, and nothing is gained by finding the message earlier.
        """
        ...

    def end_step(self) -> None:
        """All instructions of a step are done; messages may still be under way."""
        ...

    def close(self) -> None:
        """Finish what is under way and release resources."""
        ...


@runtime_checkable
class PartsTransport(Transport, Protocol):
    """A transport between processes that can also send parts of values that several ranks hold."""

    def send_parts(self, array: jax.Array, boxes: tuple[Box, ...], destination: int, tag: int) -> Handle:
        """Start sending some parts of an array, one after the other."""
        ...

    def send_bytes(self, data: np.ndarray[Any, Any], destination: int, tag: int) -> Handle:
        """Start sending bytes that do not change any more."""
        ...

    def post_bytes(self, source: int, tag: int, nbytes: int) -> Handle:
        """Start receiving bytes; `wait` gives them in host memory that nobody else uses for as long as it is held."""
        ...


def put(array: jax.Array, place: Sharding, *, alias: bool) -> jax.Array:
    """The array at another place, asynchronously. Where it is there already: itself if ``alias``, else a copy."""
    if array.sharding == place:
        return array if alias else jax.device_put(array, place, may_alias=False)
    return jax.device_put(array, place)


def device_array(view: Any, place: Sharding, copy: bool) -> jax.Array:
    """A host array on a device, asynchronously. Without ``copy``, memory that XLA can use is used where it is, and
    must not change any more; with it, the array may be written to as soon as this returns. Of a place that has devices of
    other processes too, only this one's get their parts, and the others are not asked."""
    if not place.is_fully_addressable:
        host = np.asarray(view)

        def part(box: Box) -> np.ndarray[Any, Any]:
            values = host[tuple(slice(start, stop) for start, stop in box)]
            return np.array(values) if copy else np.ascontiguousarray(values)

        return put_parts(part, host.shape, place)
    # `may_alias=False` would not do: jax copies, but perhaps only after it has returned.
    return jax.device_put(np.array(view) if copy else view, place)


class LocalNetwork:
    """The mailboxes of lists that run in one process. ``network.transport(rank)`` is one rank's end."""

    def __init__(self) -> None:
        self.posted: dict[tuple[int, int, int], deque[tuple[Handle, Sharding]]] = defaultdict(deque)
        self.sent: dict[tuple[int, int, int], deque[tuple[Handle, jax.Array, bool]]] = defaultdict(deque)

    def transport(self, rank: int) -> InProcessTransport:
        """The end of one rank."""
        return InProcessTransport(self, rank)


class InProcessTransport:
    """Messages between virtual devices of one process: asynchronous `jax.device_put` as soon as both ends are there.

    One Python thread runs all lists in turn; a list that would wait raises `WouldBlock` and is taken up again later.
    """

    def __init__(self, network: LocalNetwork, rank: int) -> None:
        self.network, self.rank = network, rank

    def send(self, array: jax.Array, destination: int, tag: int, *, move: bool = False) -> Handle:
        """Copy to the receiver's device if its receive is posted, else leave the array for it to find."""
        where = self.rank, destination, tag
        handle = Handle()
        if self.network.posted[where]:
            receive, place = self.network.posted[where].popleft()
            receive.array, receive.done, handle.done = put(array, place, alias=move), True, True
        else:
            self.network.sent[where].append((handle, array, move))
        return handle

    def post_receive(
        self, source: int, tag: int, shape: tuple[int, ...], dtype: str, place: Sharding, *, passing: bool = False
    ) -> Handle:
        """Take the value if it was sent already."""
        del shape, dtype, passing  # the first two were proved equal to the sender's before launch
        where = source, self.rank, tag
        handle = Handle()
        if self.network.sent[where]:
            send, array, move = self.network.sent[where].popleft()
            handle.array, handle.done, send.done = put(array, place, alias=move), True, True
        else:
            self.network.posted[where].append((handle, place))
        return handle

    def test(self, handle: Handle) -> bool:
        """Whether both ends have met; XLA orders the copy itself."""
        return handle.done

    def wait(self, handle: Handle, running: jax.Array | None = None) -> Any:
        """The received array, or `WouldBlock`."""
        del running
        if not handle.done:
            raise WouldBlock
        return handle.array

    def end_step(self) -> None:
        """Both ends of every message have met."""

    def close(self) -> None:
        """Nothing to release."""
