"""Messages between streams that run in one process, on devices of its own."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import jax
from jax.sharding import Sharding

from bactrian.runtime.transports.interface import Handle, WouldBlock, put


class LocalNetwork:
    """The mailboxes of streams that run in one process. ``network.transport(rank)`` is one rank's end."""

    def __init__(self) -> None:
        self.posted: dict[tuple[int, int, int], deque[tuple[Handle, Sharding]]] = defaultdict(deque)
        self.sent: dict[tuple[int, int, int], deque[tuple[Handle, jax.Array, bool]]] = defaultdict(deque)

    def transport(self, rank: int) -> InProcessTransport:
        """The end of one rank."""
        return InProcessTransport(self, rank)


class InProcessTransport:
    """Messages between virtual devices of one process: asynchronous `jax.device_put` as soon as both ends are there.

    One Python thread runs all streams in turn; a stream that would wait raises `WouldBlock` and is taken up again later.
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
