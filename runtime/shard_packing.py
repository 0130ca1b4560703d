"""Parts of arrays that several ranks hold: out of an array's shards into a message, and out of messages into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from bactrian.passes.frame.errors import RuntimeFault
from bactrian.runtime.box_routing import Box, box_words, num_elements, overlap

HostArray = np.ndarray[Any, Any]


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """A shard's index as a box.

    >>> box_of((slice(2, 4), slice(None)), (4, 3))
    ((2, 4), (0, 3))
    """
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def local_boxes(place: Sharding, shape: tuple[int, ...]) -> list[tuple[Any, Box]]:
    """This process's devices of a sharding, in the order of the mesh, and the part of a value that each holds."""
    indices = place.addressable_devices_indices_map(shape)
    return [(device, box_of(index or (), shape)) for device, index in indices.items()]


def put_shards(part: Callable[[Box], HostArray], shape: tuple[int, ...], place: Sharding) -> jax.Array:
    """An array at a place that this process has some devices of, without asking the others.

    ``part`` gives the values of a box; they must not change any more.
    """
    arrays = [jax.device_put(part(box), device) for device, box in local_boxes(place, shape)]
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


def packed(array: jax.Array, boxes: Sequence[Box]) -> HostArray:
    """Parts of an array, one after the other, as bytes. Each part lies within one of the array's shards here.

    A single part that is contiguous in its shard's memory is not copied; it keeps the memory alive.
    """
    held = {box_of(shard.index, array.shape): shard for shard in reversed(array.addressable_shards)}
    views = {box: np.asarray(shard.data) for box, shard in held.items()}
    return joined([_part(views, box) for box in boxes])


def joined(parts: Sequence[HostArray]) -> HostArray:
    """Arrays one after the other, as bytes."""
    flat = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


def unpacked(buffer: HostArray, boxes: Sequence[Box], dtype: np.dtype[Any]) -> dict[Box, HostArray]:
    """The parts in a message, as views of its bytes."""
    parts: dict[Box, HostArray] = {}
    start = 0
    for box in boxes:
        stop = start + num_elements([box]) * dtype.itemsize
        parts[box] = buffer[start:stop].view(dtype).reshape([b - a for a, b in box])
        start = stop
    return parts


def assembled(parts: dict[Box, HostArray], box: Box, dtype: np.dtype[Any]) -> HostArray:
    """One part of a value out of those that it overlaps with."""
    if box in parts:
        return parts[box]
    made = np.empty([stop - start for start, stop in box], dtype)
    for held, values in parts.items():
        common = overlap(held, box)
        if common is not None:
            made[_within(common, box)] = values[_within(common, held)]
    return made


def check_boxes(boxes: Iterable[Box], place: Sharding, shape: tuple[int, ...], where: str) -> None:
    """Refuse parts that do not make up what this process's devices hold of a value.

    Raises:
        RuntimeFault: elements are missing or come twice.
    """
    boxes = list(boxes)
    for box in dict.fromkeys(box for _, box in local_boxes(place, shape)):
        common = [c for c in (overlap(held, box) for held in boxes) if c is not None]
        if num_elements(common) != num_elements([box]):
            raise RuntimeFault(
                f"gets {num_elements(common)} elements of {box_words([box])}, which has {num_elements([box])}",
                where=where,
            )


def _part(views: dict[Box, HostArray], box: Box) -> HostArray:
    for held, view in views.items():
        if overlap(held, box) == box:
            return view[_within(box, held)]
    raise RuntimeFault(f"this rank holds no shard with {box_words([box])} of an array that it sends")


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True))
