"""Slices, pads and reductions over windows: of a sharded dim, devices get the rows that they read of their neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.forms.halo_exchange import halos_of_operand, read_rows
from bactrian.passes.spmd.halo_rules import paddings
from bactrian.passes.spmd.local_op import LocalOp


def slice_of_rows(local: LocalOp) -> Sequence[ir.Value]:
    """The rows that a device reads begin with the first that it keeps."""
    names = ("start_indices", "limit_indices", "strides")
    starts, limits, strides = (list(ir.DenseI64ArrayAttr(local.op.attributes[name])) for name in names)
    value = read_rows(local, 0)
    for halo, _ in halos_of_operand(local, 0):
        starts[halo.dim], limits[halo.dim] = 0, ir.RankedTensorType(value.type).shape[halo.dim]
    arrays = (ir.DenseI64ArrayAttr.get(each) for each in (starts, limits, strides))
    return local.clone([value], dict(zip(names, arrays, strict=True)))


def pad(local: LocalOp) -> Sequence[ir.Value]:
    """What is beyond the ends of the dim comes with the halo."""
    names = ("edge_padding_low", "edge_padding_high")
    lows, highs = (list(ir.DenseI64ArrayAttr(local.op.attributes[name])) for name in names)
    value = read_rows(local, 0, local.operands[1])
    for halo, axes in halos_of_operand(local, 0):
        lows[halo.dim], highs[halo.dim] = halo.local_padding(local.devices.group_size(axes))
    arrays = (ir.DenseI64ArrayAttr.get(each) for each in (lows, highs))
    return local.clone([value, local.operands[1]], dict(zip(names, arrays, strict=True)))


def windowed_reduction(local: LocalOp) -> Sequence[ir.Value]:
    """Beyond the ends of a dim are the initial values, as StableHLO has it."""
    count = len(local.op.results)
    values, initials = local.operands[:count], local.operands[count:]
    values = [read_rows(local, number, initial) for number, initial in enumerate(initials)]
    padding = paddings(local.op, len(value_shape(local.op.operands[0])))
    for halo, axes in halos_of_operand(local, 0):
        padding[halo.dim] = halo.local_padding(local.devices.group_size(axes))
    return local.clone([*values, *initials], {"padding": padding_attribute(padding)})


def padding_attribute(padding: Sequence[tuple[int, int]]) -> ir.Attribute:
    """The attribute of what `paddings` reads."""
    return ir.DenseElementsAttr.get(np.array(padding, dtype=np.int64).reshape(-1, 2))
