"""How the values of a step travel between ranks: what a transport is, and how arrays come to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from bactrian.runtime.box_routing import Box
from bactrian.runtime.shard_packing import put_shards

# A host array at a place: `device_array`, or a faster equal.
DeviceArray = Callable[[Any, Sharding, bool], jax.Array]


class WouldBlock(Exception):
    """The cooperative executor has to let another stream go on first."""


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
class ShardTransport(Transport, Protocol):
    """A transport between processes that can also send shards of values that several ranks hold."""

    def send_boxes(self, array: jax.Array, boxes: tuple[Box, ...], destination: int, tag: int) -> Handle:
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

        return put_shards(part, host.shape, place)
    # `may_alias=False` would not do: jax copies, but perhaps only after it has returned.
    return jax.device_put(np.array(view) if copy else view, place)
