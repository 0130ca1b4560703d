"""Live ranges of buffers in the order of work, and the bytes of a block that holds them all.

This follows XLA for CPUs: its concurrency-optimized scheduler (a queue of what is ready), its buffer assignment (a value may
be written over an operand that nobody reads afterwards, or into a donated argument), and its heap simulator (best fit, the
largest buffers first).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from bactrian.passes.peak.fusion import Fused, fuse
from bactrian.passes.peak.value_graph import Graph, Kind

_ALIGNMENT = 64


@dataclass
class Buffer:
    """Bytes with their live range, from one step to another (both included), and the node that was written there last."""

    first: int
    last: int
    nbytes: int
    node: int


@dataclass
class _DonatedBuffer:
    """The buffer of a donated argument, which its result takes over; other values may be there in between."""

    nbytes: int
    taken: list[tuple[int, int]]


def temporary_bytes(graph: Graph) -> int:
    """Bytes that a function needs beside its arguments and results.

    XLA queues the readers of a value in no fixed order. Two orders are tried, and the larger number counts.
    """
    fused = fuse(graph)
    _copy_donated(graph, fused)
    return max(_packed_bytes(buffers(graph, fused, flip)) for flip in (False, True))


def buffers(graph: Graph, fused: Fused, flip: bool = False) -> list[Buffer]:
    """The buffers beside arguments and results."""
    steps = schedule(graph, fused, flip)
    time = {number: at for at, step in enumerate(steps) for number in step}
    last = {number: time[number] for number in fused.made}
    for reader, reads in fused.reads.items():
        for number in reads:
            last[number] = max(last[number], time[reader])
    forwarded = {number: source for number in fused.made if (source := _forwarded(graph, fused, number)) is not None}
    for number, source in reversed(forwarded.items()):
        last[source] = max(last[source], last[number])
    for number, source in forwarded.items():
        last[number] = last[source]
    held = _held(graph, fused, steps, time, last)
    places = list[_DonatedBuffer]()
    for position, argument in graph.aliases.items():
        result = fused.results[position]
        if argument in time and result != argument:
            taken = [(-1, last[argument]), (time[result], len(steps))]
            places.append(_DonatedBuffer(graph.nodes[argument].nbytes, taken))
    places.reverse()  # among equal ones the last is looked at first
    places.sort(key=lambda place: place.nbytes)
    return _outside(held, places)


def schedule(graph: Graph, fused: Fused, flip: bool = False) -> list[list[int]]:
    """Steps in the order of work, each the nodes of one op: what is ready is queued. Combined collectives are one step.

    Args:
        graph: of one device.
        fused: what has a buffer.
        flip: queue the readers of a value in the opposite order.
    """
    step_of, steps = dict[int, int](), list[list[int]]()
    for group in _groups(graph, fused):
        step_of |= dict.fromkeys(group, len(steps))
        steps.append(group)
    readers: list[dict[int, None]] = [{} for _ in steps]
    waits = [0] * len(steps)
    for at, group in enumerate(steps):
        sources = dict.fromkeys(step_of[operand] for number in group for operand in fused.reads[number])
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
    assert len(order) == len(steps), "combined collectives depend on each other"
    return order


def _forwarded(graph: Graph, fused: Fused, number: int) -> int | None:
    """The value that a result of an optimization barrier is; None for what has a buffer of its own."""
    node = graph.nodes[number]
    if node.kind is not Kind.PART or node.place is None:
        return None
    whole = graph.nodes[node.operands[0]]
    return fused.root[whole.operands[node.place]] if whole.name == "optimization_barrier" else None


def _post_order(fused: Fused) -> list[int]:
    """The nodes in the order in which XLA's combiners see them: operands first, from the first result on."""
    order, seen = list[int](), set[int]()
    for result in fused.results:
        stack = [(result, False)]
        while stack:
            number, is_done = stack.pop()
            if is_done:
                order.append(number)
            elif number not in seen:
                seen.add(number)
                stack.append((number, True))
                stack += [(operand, False) for operand in reversed(fused.reads[number]) if operand not in seen]
    return order + [number for number in fused.made if number not in seen]


def _groups(graph: Graph, fused: Fused) -> list[list[int]]:
    """Collectives of one group that follow each other, and do not depend on each other, together; every other node
    alone."""
    groups, last = list[list[int]](), dict[object, int]()
    before = dict[int, int]()  # bits of the steps with collectives that a node depends on
    step_of = dict[int, int]()
    needs = dict[int, int]()  # the same for such a step

    def closed(bits: int) -> int:
        """With what these steps depend on, as they are now."""
        known, todo = 0, bits
        while todo:
            step = todo & -todo
            known |= step
            todo = (todo | needs[step.bit_length() - 1]) & ~known
        return known

    for number in _post_order(fused):
        bits = 0
        for operand in fused.reads[number]:
            bits |= before[operand] | (1 << step_of[operand] if operand in step_of else 0)
        group = graph.nodes[number].group
        if group is not None:
            bits = closed(bits)
            step = last.get(group)
            if step is None or bits >> step & 1:
                step = last[group] = len(groups)
                groups.append([])
            groups[step].append(number)
            step_of[number] = step
            needs[step] = needs.get(step, 0) | bits
        else:
            groups.append([number])
        before[number] = bits
    return groups


def _copy_donated(graph: Graph, fused: Fused) -> None:
    """Copy donated arguments with a reader that the result in their buffer does not depend on.

    XLA inserts the copy before it knows the order: the reader might come when the result is written already.
    """
    before = dict[int, int]()
    readers = dict[int, list[int]]()
    for step in schedule(graph, fused):
        bits = 0
        for number in step:
            bits |= 1 << number
            for operand in fused.reads[number]:
                bits |= before[operand]
                readers.setdefault(operand, []).append(number)
        before |= dict.fromkeys(step, bits)
    copies = dict[int, int]()
    for position, argument in graph.aliases.items():
        result = fused.results[position]
        if result == argument or all(before[result] >> reader & 1 for reader in readers.get(argument, ())):
            continue
        node = graph.nodes[argument]
        copies[argument] = copy = graph.add("copy", Kind.FIRM, (argument,), node.shape, node.nbytes)
        for reader in readers[argument]:
            fused.reads[reader][copy] = fused.reads[reader].pop(argument)
        fused.reads[copy] = {argument: True}
    fused.made[:] = [each for number in fused.made for each in (number, copies.get(number)) if each is not None]


def _held(
    graph: Graph, fused: Fused, steps: list[list[int]], time: dict[int, int], last: dict[int, int]
) -> list[Buffer]:
    """A buffer for each value that is neither argument nor result; some are written over an operand."""
    nodes = graph.nodes
    outside = {n for n in fused.made if nodes[n].kind in (Kind.ARGUMENT, Kind.CONSTANT)} | set(fused.results)
    found, place = list[Buffer](), dict[int, Buffer]()
    for at, step in enumerate(steps):
        for number in step:
            node = nodes[number]
            if node.inside:
                inner = max(map(temporary_bytes, node.inside))
                found.append(Buffer(at, at, inner, number))
            if number in outside or not node.nbytes:
                continue
            if (source := _forwarded(graph, fused, number)) is not None:
                if source in place:
                    place[number] = place[source]
                continue
            source = _taken_over(graph, fused, number, time, place, last)
            if source is None:
                first = time[node.operands[0]] if node.kind is Kind.PART else at
                place[number] = Buffer(first, last[number], node.nbytes, number)
                found.append(place[number])
            else:
                place[number] = place.pop(source)
                place[number].last, place[number].node = last[number], number
    return found


def _taken_over(
    graph: Graph, fused: Fused, number: int, time: dict[int, int], place: dict[int, Buffer], last: dict[int, int]
) -> int | None:
    """The operand over which a value is written: one that nobody reads afterwards; None if there is none."""
    node = graph.nodes[number]
    if node.kind is Kind.PART and node.place is not None:  # state of a loop
        whole = node.operands[0]
        source = fused.root[graph.nodes[node.operands[0]].operands[node.place]]
        fits = source in place and place[source].nbytes == node.nbytes and place[source].last == time[whole]
        return source if fits else None
    if node.kind is not Kind.LOOSE and node.name != "scatter":
        return None
    for source, in_place in fused.reads[number].items():
        if in_place and source in place and last[source] == time[number] and place[source].nbytes == node.nbytes:
            return source
    return None


def _outside(held: list[Buffer], places: list[_DonatedBuffer]) -> list[Buffer]:
    """The buffers that fit into no donated one; the largest choose first."""
    left, sizes = list[Buffer](), [place.nbytes for place in places]
    for buffer in sorted(held, key=lambda each: -each.nbytes):
        first, last = buffer.first, buffer.last
        for place in places[bisect_left(sizes, buffer.nbytes) :]:
            for begin, end in place.taken:
                if begin <= last and first <= end:
                    break
            else:
                place.taken.append((first, last))
                break
        else:
            left.append(buffer)
    return left


def _packed_bytes(held: list[Buffer]) -> int:
    """Bytes of a block that holds all buffers, packed by best fit: the largest first, each in the smallest gap it fits in."""
    placed = list[tuple[Buffer, int, int]]()  # begins and ends at
    total = 0
    for buffer in sorted(held, key=lambda each: (-each.nbytes, each.first - each.last, each.first)):
        nbytes = -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        beside = [(a, b) for other, a, b in placed if other.first <= buffer.last and buffer.first <= other.last]
        at, smallest, free = -1, -1, 0
        for begin, end in sorted(beside):
            if begin - free >= nbytes and (smallest < 0 or begin - free < smallest):
                at, smallest = free, begin - free
            free = max(free, end)
        at = free if smallest < 0 else at
        placed.append((buffer, at, at + nbytes))
        total = max(total, at + nbytes)
    return total
