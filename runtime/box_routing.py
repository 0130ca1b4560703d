"""Which slices of a value go from which rank to which, where a mesh has the devices of several ranks. No jax.

The devices of a mesh, in its order, belong to consecutive ranks, equally many to each. A spec shards a value into tiles;
every rank holds the tiles of its devices. Between two such meshes each element crosses once: the overlap of a tile on one
side with a tile on the other is sent by one of the ranks that hold it and received by one of those that need it, or in
parts by several of each; ranks that need the same tile then pass on to each other what each has received.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bactrian.passes.machine.spec import MeshAxes, Spec

Box = tuple[tuple[int, int], ...]  # start and stop in each dim

_WHOLE_ELEMENTS = 1024  # overlaps of fewer elements are not split among the ranks that need them


@dataclass(frozen=True)
class Slices:
    """How one value goes from one mesh to another; ranks count from 0 on each side.

    ``sent`` holds, by (sender, receiver), the boxes of the one message between the two, in order. ``passed`` holds by
    (receiver, receiver) what the first passes on to the second.
    """

    sent: dict[tuple[int, int], tuple[Box, ...]]
    passed: dict[tuple[int, int], tuple[Box, ...]]


def num_elements(boxes: Sequence[Box]) -> int:
    """Elements of some boxes.

    >>> num_elements([((0, 2), (1, 4)), ((2, 3), (0, 1))])
    7
    """
    return sum(math.prod(stop - start for start, stop in box) for box in boxes)


def tiles(shape: Sequence[int], axes: MeshAxes, spec: Spec) -> tuple[Box, ...]:
    """The part of a value that each device of a mesh holds.

    >>> tiles((4, 2), (("a", 2), ("b", 2)), Spec((("b",), ())))
    (((0, 2), (0, 2)), ((2, 4), (0, 2)), ((0, 2), (0, 2)), ((2, 4), (0, 2)))
    """
    sizes = dict(axes)
    boxes: list[Box] = []
    for place in itertools.product(*(range(size) for _, size in axes)):
        at = dict(zip(sizes, place, strict=True))
        box: list[tuple[int, int]] = []
        for dim, size in enumerate(shape):
            names = spec.dims[dim] if dim < len(spec.dims) else ()
            number = 0
            for name in names:
                number = number * sizes[name] + at[name]
            length = size // math.prod(sizes[name] for name in names)
            box.append((number * length, (number + 1) * length))
        boxes.append(tuple(box))
    return tuple(boxes)


def rank_tiles(boxes: Sequence[Box], num_ranks: int) -> tuple[tuple[Box, ...], ...]:
    """The different tiles that each rank holds, from those of all devices in the order of the mesh."""
    each = len(boxes) // num_ranks
    return tuple(tuple(dict.fromkeys(boxes[rank * each : (rank + 1) * each])) for rank in range(num_ranks))


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes of one value have in common; of a dim without elements nothing is common too, and that is all.

    >>> overlap(((0, 4),), ((2, 6),)), overlap(((0, 2),), ((2, 4),))
    (((2, 4),), None)
    """
    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    fits = all(start < stop or one[dim] == other[dim] == (start, stop) for dim, (start, stop) in enumerate(box))
    return box if fits else None


@dataclass
class _Load:
    """Elements that each rank has to send and to receive so far."""

    send: dict[int, int] = field(default_factory=lambda: {})
    receive: dict[int, int] = field(default_factory=lambda: {})


def plan_slices(
    source: Sequence[Sequence[Box]], target: Sequence[Sequence[Box]], *, whole: int = _WHOLE_ELEMENTS
) -> Slices:
    """How a value gets from one mesh to another.

    Args:
        source: the tiles that each rank of the sending mesh holds.
        target: those that each rank of the receiving mesh needs.
        whole: overlaps of fewer elements are received by one rank, larger ones in parts by all that need them.
    """
    holders = _by_tile(source)
    sent: dict[tuple[int, int], list[Box]] = {}
    passed: dict[tuple[int, int], list[Box]] = {}
    load = _Load()
    share = sum(num_elements([tile]) for tile in holders) / len(source)
    parts: list[tuple[Box, list[int], list[int]]] = []
    for tile, needing in _by_tile(target).items():
        for held, holding in holders.items():
            common = overlap(held, tile)
            if common is not None:
                ways = len(needing) if num_elements([common]) >= whole else 1
                parts += [(part, holding, needing) for part in _parts(common, ways)]
    # The largest first: what is left for the end is small, and evens out what ranks send and receive (Graham 1969).
    for part, holding, needing in sorted(parts, key=lambda each: -num_elements([each[0]])):
        elements = num_elements([part])
        receiver = min(needing, key=lambda r: (load.receive.get(r, 0), r))
        sender = _sender(holding, receiver * len(source) // len(target), load.send, elements, share)
        load.receive[receiver] = load.receive.get(receiver, 0) + elements
        load.send[sender] = load.send.get(sender, 0) + elements
        sent.setdefault((sender, receiver), []).append(part)
        for other in needing:
            if other != receiver:
                passed.setdefault((receiver, other), []).append(part)
    return Slices(
        {pair: tuple(boxes) for pair, boxes in sorted(sent.items())},
        {pair: tuple(boxes) for pair, boxes in sorted(passed.items())},
    )


def _sender(holding: Sequence[int], place: int, sent: dict[int, int], elements: int, share: float) -> int:
    """Of the ranks that would not send more than their share, the next one from the receiver's place on: so pairs of
    ranks, and with them messages, are few. Of others the one that has the least to send."""

    def rank_by(rank: int) -> tuple[float, int]:
        return max(0.0, sent.get(rank, 0) + elements - share), (rank - place) % (max(holding) + 1)

    return min(holding, key=rank_by)


def _by_tile(ranks: Sequence[Sequence[Box]]) -> dict[Box, list[int]]:
    """The ranks that have each tile."""
    found: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(ranks):
        for box in boxes:
            found.setdefault(box, []).append(rank)
    return found


def _parts(box: Box, count: int) -> list[Box]:
    """A box in nearly equal parts along its first dim that is long enough, else the longest; none is empty."""
    if count == 1 or not box:
        return [box]
    lengths = [stop - start for start, stop in box]
    dim = next((d for d, length in enumerate(lengths) if length >= count), lengths.index(max(lengths)))
    start, length = box[dim][0], lengths[dim]
    count = max(1, min(count, length))
    edges = [start + length * i // count for i in range(count + 1)]
    return [(*box[:dim], edge, *box[dim + 1 :]) for edge in itertools.pairwise(edges)]


def box_words(boxes: Sequence[Box]) -> str:
    """Boxes as one reads them.

    >>> box_words([((0, 4), (2, 4)), ()])
    '[0:4, 2:4] []'
    """
    return " ".join("[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]" for box in boxes)
