"""Roofline time of an op on one device, assuming that elementwise ops fuse into their users."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import ACCUMULATE
from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.op_costs import CostModel, repacks
from bactrian.passes.ir.op_traits import COSTED_ALONE
from bactrian.passes.machine.device import Device
from bactrian.passes.sharding.loop_dataflow import CONDITION, END, LoopFlow

DYNAMIC_UPDATE_SLICE = "stablehlo.dynamic_update_slice"
_PRODUCTS = ("stablehlo.dot_general", "stablehlo.convolution")


def read_from_memory(flow: LoopFlow, value_of: list[int]) -> list[bool]:
    """Which values must exist: an op that is not fused, another phase or the caller reads them."""
    read = [False] * len(flow.values)
    for value in flow.operands[-1]:
        read[value_of[value]] = True
    for index in range(len(flow.ops) - 1):
        separate = is_separate(flow, index) or flow.kinds[index] in (END, CONDITION)
        for value in flow.operands[index]:
            source = value_of[value]
            producer = flow.producer[source]
            if separate or source != value or producer < 0 or _never_fused(flow, producer, index):
                read[source] = True
    return read


def is_separate(flow: LoopFlow, index: int) -> bool:
    """Whether an op is not fused with others; what a loop stacks is written where it is computed."""
    name = flow.ops[index].name
    return name in COSTED_ALONE and not (name == DYNAMIC_UPDATE_SLICE and flow.tops[index] is not flow.ops[index])


def accumulating_scatters(flow: LoopFlow) -> frozenset[int]:
    """Sums of an accumulator and a scatter into zeros that nothing else reads, and these scatters.

    XLA makes one op of the two, which scatters into the accumulator in its place.
    """
    found = set[int]()
    for index, op in enumerate(flow.ops):
        if ACCUMULATE in op.attributes and op.name == "stablehlo.add":
            producer = flow.producer[flow.operands[index][1]]
            if producer >= 0 and _adds_to_zeros(flow.ops[producer]) and flow.phases[producer] == flow.phases[index]:
                found |= {index, producer}
    return frozenset(found)


def _adds_to_zeros(op: ir.Operation) -> bool:
    if op.name != "stablehlo.scatter" or len(op.results) > 1 or len(list(op.results[0].uses)) > 1:
        return False
    combines = [view.operation.name for view in op.regions[0].blocks[0].operations]
    initial = splat_of(op.operands[0])
    is_zero = isinstance(initial, ir.FloatAttr) and initial.value == 0.0
    return is_zero and combines == ["stablehlo.add", "stablehlo.return"]


def _never_fused(flow: LoopFlow, producer: int, reader: int) -> bool:
    """Whether two ops are of two phases, or in two loops."""
    if flow.phases[producer] != flow.phases[reader]:
        return True
    inside = flow.tops[reader] is not flow.ops[reader]
    return inside and flow.ops[producer].block != flow.ops[reader].block


def remark_missing_rates(
    ops: Iterable[ir.Operation], device: Device, remark: Callable[[ir.Operation, str], None]
) -> None:
    """Tell of products in element types that a device has no rate for, once for each type: they are no small part of a
    step, and the rate of another type may be many times theirs."""
    seen = set[str]()
    for op in ops:
        if op.name not in _PRODUCTS:
            continue
        dtype = str(ir.ShapedType(op.operands[0].type).element_type)
        if dtype in seen:
            continue
        seen.add(dtype)
        nearest = device.rated_as(dtype)
        if nearest not in (dtype, "default"):
            remark(
                op,
                f"{device.name} has no rate for {dtype}: products in it are timed at the {device.rate(dtype) / 1e12:g} "
                f"TFLOPS of {nearest}; give peak_tflops.{dtype} in the cluster file",
            )


def repack_seconds(op: ir.Operation, device: Device) -> float:
    """Seconds per byte of a device's shards of the operands, to bring them into the order that a product needs."""
    return 1 / device.repack_bytes_per_second if repacks(op) else 0.0


def op_seconds(
    op: ir.Operation,
    model: CostModel,
    device: Device,
    keeps: bool,
    separate: bool,
    from_memory: list[bool],
    operands: tuple[int, ...],
    in_place: bool,
) -> float:
    """Roofline time on one device; of a fused op only what it brings to and from memory.

    Args:
        keeps: whether its results must exist.
        separate: whether it is not fused with others.
        from_memory: by value.
        operands: the values that it reads.
        in_place: whether it is one of `accumulating_scatters`: of these, the scatter reads and writes what it changes.
    """
    cost = model.cost(op)
    if in_place and not separate:
        return 0.0
    if in_place:
        indices, updates = (model.size_of(value).bytes for value in list(op.operands)[1:])
        return device.seconds(replace(cost, bytes=float(indices + 3 * updates)))
    if separate:
        return device.seconds(cost)
    flops = cost.flops / device.rate(cost.dtype)
    made = [model.size_of(value).bytes for value in op.results]
    read = [
        model.size_of(value).bytes if from_memory[number] else 0
        for value, number in zip(op.operands, operands, strict=False)
    ]
    if op.name == "stablehlo.dynamic_slice":
        read[:1] = [min(read[0], *made)]
    if op.name == DYNAMIC_UPDATE_SLICE:
        made, read[0] = [model.size_of(op.operands[1]).bytes], 0
    moved = sum(read) + (sum(made) if keeps else 0)
    return max(flops, moved / device.bytes_per_second)
