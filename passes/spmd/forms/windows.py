"""Slices, pads and reductions over windows: of a sharded dim, devices get the rows that they read of their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.ir.builders import identity_of
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.forms.halo_exchange import halos_of_operand, read_rows
from bactrian.passes.spmd.forms.reductions import fold_of
from bactrian.passes.spmd.halo_rules import paddings, rows_rule, windows_of
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Rule


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
    """Beyond the ends of a dim is what changes nothing, since XLA leaves out what is beyond them."""
    count = len(local.op.results)
    values, initials = local.operands[:count], local.operands[count:]
    fold = fold_of(local.op.regions[0])
    fills = [None if fold is None else identity_of(fold, initial.type) for initial in initials]
    values = [read_rows(local, number, fill) for number, fill in enumerate(fills)]
    padding = paddings(local.op, len(value_shape(local.op.operands[0])))
    for halo, axes in halos_of_operand(local, 0):
        padding[halo.dim] = halo.local_padding(local.devices.group_size(axes))
    return local.clone([*values, *initials], {"padding": padding_attribute(padding)})


def windowed_reduction_rule(op: ir.Operation, rule: Rule) -> Rule:
    """Dims whose windows reach beyond their ends are whole where nobody knows what to fill up with."""
    rule = rows_rule(op, rule)
    if fold_of(op.regions[0]) is not None:
        return rule
    windows, highs = windows_of(op), [high for _, high in paddings(op, len(rule.sizes))]
    beyond = {dim for dim, window in enumerate(windows) if window.low > 0 or highs[dim] > 0}
    return replace(rule, replicated=rule.replicated | beyond)


def padding_attribute(padding: Sequence[tuple[int, int]]) -> ir.Attribute:
    """The attribute of what `paddings` reads."""
    return ir.DenseElementsAttr.get(np.array(padding, dtype=np.int64).reshape(-1, 2))
