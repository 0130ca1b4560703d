"""When values in memory are made, how long they stay, and what they take together."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate

from bactrian.passes.peak.fusion import Fused
from bactrian.passes.peak.graph import Graph, Kind


@dataclass
class Interval:
    """A buffer: from when to when, and what is in it at the end."""

    first: int
    last: int
    nbytes: int
    node: int


@dataclass
class Temporaries:
    """What a function needs beside arguments and results.

    Attributes:
        nbytes: at the fullest time.
        at: that time.
        buffers: all of them.
    """

    nbytes: int = 0
    at: int = 0
    buffers: list[Interval] = field(default_factory=list[Interval])
    order: list[int] = field(default_factory=list[int])


def schedule(graph: Graph, fused: Fused, flip: bool = False) -> list[list[int]]:
    """Steps in the order of work: whatever is ready is queued. Collectives of one group are one step."""
    nodes = graph.nodes
    step_of, steps = dict[int, int](), list[list[int]]()
    for group in _groups(graph, fused):
        for number in group:
            step_of[number] = len(steps)
        steps.append(group)
    readers: list[dict[int, None]] = [{} for _ in steps]
    waits = [0] * len(steps)
    for at, group in enumerate(steps):
        sources = dict.fromkeys(step_of[o] for number in group for o in fused.reads[number])
        waits[at] = len(sources)
        for source in sources:
            readers[source][at] = None
    queue = deque(at for at in range(len(steps)) if not waits[at])
    order = list[list[int]]()
    while queue:
        at = queue.popleft()
        order.append(steps[at])
        for reader in reversed(readers[at]) if flip else readers[at]:
            waits[reader] -= 1
            if not waits[reader]:
                queue.append(reader)
    assert len(order) == len(steps), "a group of collectives depends on itself"
    return order


def _groups(graph: Graph, fused: Fused) -> list[list[int]]:
    """Nodes that are one op together: collectives alike, none of which depends on another."""
    groups, open_groups = list[list[int]](), dict[object, list[list[int]]]()
    before = dict[int, int]()  # bits of the grouped nodes that a node depends on
    for number in fused.made:
        bits = 0
        for operand in fused.reads[number]:
            bits |= before[operand]
            if graph.nodes[operand].group is not None:
                bits |= 1 << operand
        before[number] = bits
        group = graph.nodes[number].group
        if group is not None:
            fitting = next((g for g in open_groups.get(group, ()) if not any(bits >> m & 1 for m in g)), None)
            if fitting is not None:
                fitting.append(number)
                continue
        groups.append([number])
        if group is not None:
            open_groups.setdefault(group, []).append(groups[-1])
    return groups


def temporaries(graph: Graph, fused: Fused) -> Temporaries:
    """Simulate the function's run, in two orders where readers of a value tie: the larger counts."""
    _copy_donated(graph, fused)
    return max((_run(graph, fused, flip) for flip in (False, True)), key=lambda found: found.nbytes)


def _run(graph: Graph, fused: Fused, flip: bool) -> Temporaries:
    order = schedule(graph, fused, flip)
    time = {number: at for at, group in enumerate(order) for number in group}
    end = len(order)
    last = {number: time[number] for number in fused.made}
    for reader, reads in fused.reads.items():
        for number in reads:
            last[number] = max(last[number], time[reader])
    nodes = graph.nodes
    outside = {n for n in fused.made if nodes[n].kind in (Kind.ARGUMENT, Kind.CONSTANT)} | set(fused.results)
    buffers = _buffers(graph, fused, order, time, last, outside)
    found = _beside(buffers, _donated(graph, fused, time, last, end))
    return Temporaries(_packed(found), _fullest(found, end), found, [n for g in order for n in g])


def _copy_donated(graph: Graph, fused: Fused) -> None:
    """Copies of arguments that are read by what the result in their place does not depend on.

    XLA decides it before it knows the order: such a reader might come after the result is written.
    """
    nodes = graph.nodes
    before = dict[int, int]()
    for number in fused.made:
        bits = 1 << number
        for operand in fused.reads[number]:
            bits |= before[operand]
        before[number] = bits
    readers = dict[int, list[int]]()
    for reader, reads in fused.reads.items():
        for number in reads:
            readers.setdefault(number, []).append(reader)
    for position, argument in graph.aliases.items():
        result = fused.results[position]
        if result == argument or all(before[result] >> reader & 1 for reader in readers.get(argument, ())):
            continue
        node = nodes[argument]
        copy = graph.add("copy", Kind.FIRM, (argument,), node.shape, node.nbytes)
        for reader in readers[argument]:
            fused.reads[reader][copy] = fused.reads[reader].pop(argument)
        fused.reads[copy] = {argument: True}
        fused.made.insert(fused.made.index(argument) + 1, copy)


def _buffers(graph: Graph, fused: Fused, order: list[list[int]], time: dict[int, int], last: dict[int, int], outside: set[int]) -> list[Interval]:
    """Of each value that is in memory and neither argument nor result, the buffer; some take over that of an operand."""
    nodes = graph.nodes
    buffers, at_place = list[Interval](), dict[int, Interval]()
    for group in order:
        taken = set[int]()
        for number in group:
            node = nodes[number]
            if number in outside or not node.nbytes:
                continue
            begin = time[number]
            if node.kind is Kind.PART:
                begin = time[node.operands[0]]
            for source, same in fused.reads[number].items():
                buffer = at_place.get(source)
                if (
                    same and buffer is not None and source not in taken and last[source] == time[number]
                    and buffer.nbytes == node.nbytes and (node.kind is Kind.LOOSE or node.name == "scatter")
                ):  # fmt: skip
                    taken.add(source)
                    buffer.last, buffer.node = last[number], number
                    at_place[number] = buffer
                    break
            else:
                at_place[number] = Interval(begin, last[number], node.nbytes, number)
                buffers.append(at_place[number])
    return buffers


def _fullest(buffers: list[Interval], end: int) -> int:
    change = [0] * (end + 2)
    for buffer in buffers:
        change[buffer.first] += buffer.nbytes
        change[buffer.last + 1] -= buffer.nbytes
    held = list(accumulate(change))
    return held.index(max(held))


def _packed(buffers: list[Interval]) -> int:
    """Bytes of a block that holds all buffers: the largest are placed first, each in the smallest gap that it fits in."""
    placed = list[tuple[int, int, int, int]]()  # first, last, offset, end
    total = 0
    for buffer in sorted(buffers, key=lambda each: (-each.nbytes, each.first - each.last, each.first)):
        busy = sorted((a, b) for first, last, a, b in placed if first <= buffer.last and buffer.first <= last)
        best, at, free = None, 0, 0
        for a, b in busy:
            if a - free >= buffer.nbytes and (best is None or a - free < best):
                best, at = a - free, free
            free = max(free, b)
        if best is None:
            at = free
        placed.append((buffer.first, buffer.last, at, at + buffer.nbytes))
        total = max(total, at + buffer.nbytes)
    return total


def _donated(graph: Graph, fused: Fused, time: dict[int, int], last: dict[int, int], end: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """The places of arguments that results take over: their bytes, and when they are taken."""
    places = list[tuple[int, list[tuple[int, int]]]]()
    for position, argument in graph.aliases.items():
        result = fused.results[position]
        if argument in time and result != argument:
            places.append((graph.nodes[argument].nbytes, [(-1, last[argument]), (time[result], end)]))
    return sorted(places, key=lambda place: place[0])


def _beside(buffers: list[Interval], places: list[tuple[int, list[tuple[int, int]]]]) -> list[Interval]:
    """The buffers that find no room in an argument's place while nothing is there; the largest choose first."""
    left = list[Interval]()
    for buffer in sorted(buffers, key=lambda each: -each.nbytes):
        for nbytes, taken in places:
            if nbytes >= buffer.nbytes and all(buffer.last < first or until < buffer.first for first, until in taken):
                taken.append((buffer.first, buffer.last))
                break
        else:
            left.append(buffer)
    return left
