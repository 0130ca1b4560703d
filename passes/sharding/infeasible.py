"""Explains out-of-memory: no sharding of a stage fits its devices; what holds the memory, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bactrian.passes.frame.errors import InfeasiblePlanError, SourcePlace
from bactrian.passes.frame.location import describe, user_place, where_text
from bactrian.passes.frame.units import human_bytes
from bactrian.passes.ir.attributes import UPDATE
from bactrian.passes.sharding.cost_breakdown import memory_classes
from bactrian.passes.sharding.sharding_model import ShardingModel
from bactrian.passes.sharding.work_from_ir import Reading

_PER_MICROBATCH = frozenset({"batch", "activations", "received"})


def out_of_memory(
    model: ShardingModel, reading: Reading, roles: Sequence[str], stage: int
) -> InfeasiblePlanError | None:
    """The error for a stage that does not fit with the smallest shards of every value; None if it fits with these.

    Every sharding can be resharded to every other, so the smallest shards of each value are a choice for all: their
    peak is the least there is.

    Args:
        model: with its memory limit.
        reading: what the model was made of.
        roles: of the arguments.
        stage: its number.
    """
    network = model.network
    if model.memory is None or not network.usages:
        return None
    least = [int(usage.min()) for usage in network.usages]
    change = np.zeros(max(end for _, end in network.intervals) + 1, dtype=np.int64)
    for (first, end), nbytes in zip(network.intervals, least, strict=True):
        change[first] += nbytes
        change[end] -= nbytes
    held = np.cumsum(change)
    time = int(held.argmax())
    needed = int(held[time])
    if needed <= model.memory:
        return None
    there = [
        (nbytes, name, node)
        for node, ((first, end), nbytes, name) in enumerate(
            zip(network.intervals, least, memory_classes(model, reading, roles), strict=True)
        )
        if first <= time < end and nbytes
    ]
    sums = dict[str, int]()
    for nbytes, name, _ in there:
        sums[name] = sums.get(name, 0) + nbytes
    parts = ", ".join(f"{human_bytes(nbytes)} {name}" for name, nbytes in sorted(sums.items(), key=lambda x: -x[1]))
    largest, _, node = max(there, key=lambda each: each[0])
    missing = needed - model.memory
    where, place = _at(reading, time)
    return InfeasiblePlanError(
        f"cannot fit stage {stage} into a device: it needs at least {human_bytes(needed)}, a device has "
        f"{human_bytes(model.memory)}, {human_bytes(missing)} are missing",
        where=where,
        place=place,
        why=f"with all values sharded as far as possible there are {parts}; the largest shard, "
        f"{human_bytes(largest)}, is of {_name(model, reading, node)}",
        fix=_help(missing, needed, sums),
        stage=stage,
        needed_bytes=needed,
    )


def _at(reading: Reading, time: int) -> tuple[str, SourcePlace | None]:
    """The op at which memory peaks, and its line."""
    if not reading.ops:
        return "", None
    index = reading.ops[min(time, len(reading.ops) - 1)].index
    op, phase = reading.flow.ops[index], reading.flow.phases[index]
    where, place = where_text(op), user_place(op.location)
    return (f"{where}, {'in the update' if phase == UPDATE else phase}" if phase else where), place


def _name(model: ShardingModel, reading: Reading, node: int) -> str:
    """The value whose sharding a node decides, for people."""
    found = reading.flow.values[model.nodes.value(node)]
    return f"{describe(found.location) or 'a value'}: {found.type}"


def _help(missing: int, needed: int, sums: dict[str, int]) -> str:
    """What would make room for so much."""
    moving = sum(nbytes for name, nbytes in sums.items() if name in _PER_MICROBATCH)
    more = "more devices or stages"
    if moving > missing:
        more = "more microbatches, " + more
    return f"take {more}, or devices with {human_bytes(needed)} or more"
