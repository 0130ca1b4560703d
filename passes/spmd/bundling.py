"""Small reduce-scatters sent together: each collective costs its latency, and XLA combines all-reduces only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.ir.builders import reshaped, transposed
from bactrian.passes.ir.regions import nested_operations
from bactrian.passes.ir.tensor_sizes import type_bytes
from bactrian.passes.spmd.collectives import Collectives

_SMALL_BYTES = 1 << 18  # on a device: for larger ones the latency of a collective is less than the copies into a bundle
_BUNDLE_BYTES = 1 << 22


def bundle_reduce_scatters(block: ir.Block, collectives: Collectives) -> None:
    """Make one reduce-scatter of several small ones over the same devices, none of which needs another one's result.

    Args:
        block: of the program of one device; loops in it stay as they are.
        collectives: writes the new ones.
    """
    together = [bundle for bundle in _bundles(block) if len(bundle) > 1]
    for bundle in together:
        _write(bundle, collectives)
    if together:
        _sort(block)


def _bundles(block: ir.Block) -> list[list[ir.Operation]]:
    """The reduce-scatters of a block, those that go together in one list."""
    found, held, needs = list[list[ir.Operation]](), list[int](), list[int]()
    open_ = dict[tuple[str, str], list[int]]()
    before = dict[ir.Operation, int]()  # bits of the bundles that an op depends on

    def closed(bits: int) -> int:
        known, todo = 0, bits
        while todo:
            number = (todo & -todo).bit_length() - 1
            known |= 1 << number
            todo = (todo | needs[number]) & ~known
        return known

    for view in block.operations:
        op, bits = view.operation, 0
        for owner in _owners(op):
            bits |= before.get(owner, 0)
        if op.name == "stablehlo.reduce_scatter":
            nbytes = type_bytes(op.operands[0].type)
            key = str(op.attributes["replica_groups"]), str(ir.RankedTensorType(op.operands[0].type).element_type)
            reach = closed(bits)
            fitting = (
                number
                for number in open_.get(key, ())
                if not reach >> number & 1 and held[number] + nbytes <= _BUNDLE_BYTES
            )
            number = next(fitting, -1) if nbytes <= _SMALL_BYTES else -1
            if number < 0:
                number = len(found)
                found.append([])
                held.append(0)
                needs.append(0)
                if nbytes <= _SMALL_BYTES:
                    open_.setdefault(key, []).append(number)
            found[number].append(op)
            held[number] += nbytes
            needs[number] |= bits
            bits = 1 << number
        before[op] = bits
    return found


def _owners(op: ir.Operation) -> list[ir.Operation]:
    """The ops that make what an op and its regions read."""
    inside = nested_operations(op) if len(op.regions) else ()
    owners = (value.owner for each in (op, *inside) for value in each.operands)
    return [owner.operation for owner in owners if not isinstance(owner, ir.Block)]


def _write(bundle: Sequence[ir.Operation], collectives: Collectives) -> None:
    """Rows of what goes to each device, side by side, and one reduce-scatter of these in the place of the last op."""
    last = bundle[-1]
    count = np.array(ir.DenseElementsAttr(last.attributes["replica_groups"])).shape[1]
    with ir.InsertionPoint(last), last.location:
        packed = [_rows(op, count) for op in bundle]
        widths = [ir.RankedTensorType(rows.type).shape[1] for rows in packed]
        element = ir.RankedTensorType(packed[0].type).element_type
        joined = ir.Operation.create(
            "stablehlo.concatenate",
            results=[ir.RankedTensorType.get([count, sum(widths)], element)],
            operands=packed,
            attributes={"dimension": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), 1)},
        ).results[0]
        made = collectives.scatter_rows(joined, last.attributes["replica_groups"])
        begin = 0
        for op, width in zip(bundle, widths, strict=True):
            bounds = {"start_indices": [0, begin], "limit_indices": [1, begin + width], "strides": [1, 1]}
            attributes: dict[str, ir.Attribute] = {name: ir.DenseI64ArrayAttr.get(x) for name, x in bounds.items()}
            type_ = ir.RankedTensorType.get([1, width], element)
            row = ir.Operation.create("stablehlo.slice", results=[type_], operands=[made], attributes=attributes)
            kept = reshaped(row.results[0], ir.RankedTensorType(op.results[0].type).shape)
            op.results[0].replace_all_uses_with(kept)
            begin += width
    for op in bundle:
        op.erase()


def _rows(op: ir.Operation, count: int) -> ir.Value:
    """What a reduce-scatter reads, a row for each device of its group."""
    value, dim = op.operands[0], ir.IntegerAttr(op.attributes["scatter_dimension"]).value
    shape = list(ir.RankedTensorType(value.type).shape)
    if dim:
        split = [*shape[:dim], count, shape[dim] // count, *shape[dim + 1 :]]
        order = [dim, *(each for each in range(len(split)) if each != dim)]
        value = transposed(reshaped(value, split), order)
    return reshaped(value, [count, math.prod(shape) // count])


def _sort(block: ir.Block) -> None:
    """Bring the ops of a block into an order in which operands come first; else it stays as it is."""
    operations = [view.operation for view in block.operations]
    end = operations.pop()
    index = {op: number for number, op in enumerate(operations)}
    waits, readers = [0] * len(operations), [list[int]() for _ in operations]
    for number, op in enumerate(operations):
        sources = {index[owner] for owner in _owners(op) if owner in index}
        waits[number] = len(sources)
        for source in sources:
            readers[source].append(number)
    ready = [number for number, wait in enumerate(waits) if not wait]
    written = 0
    while ready:
        number = heapq.heappop(ready)
        operations[number].move_before(end)
        written += 1
        for reader in readers[number]:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    assert written == len(operations), "reduce-scatters that are sent together need each other's results"
