"""Slices, pads and reductions over windows: of a sharded dim, devices get the rows that they read of their neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import identity_of
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.forms.halo_exchange import halos_of_operand, read_rows
from bactrian.passes.spmd.forms.shard_reductions import fold_of
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Rule
from bactrian.passes.spmd.window_dims import ints, ones, padding_attribute, paddings, windows_of


def slice_of_rows(local: LocalOp) -> Sequence[ir.Value]:
    """The rows that a device reads begin with the first that it keeps."""
    names = ("start_indices", "limit_indices", "strides")
    starts, limits, strides = (ints(local.op, name, 0) for name in names)
    value = read_rows(local, 0)
    for halo, _ in halos_of_operand(local, 0):
        starts[halo.dim], limits[halo.dim] = 0, value_shape(value)[halo.dim]
    arrays = (ir.DenseI64ArrayAttr.get(each) for each in (starts, limits, strides))
    return local.clone([value], dict(zip(names, arrays, strict=True)))


def pad(local: LocalOp) -> Sequence[ir.Value]:
    """What is beyond the ends of a sharded dim comes with its halo."""
    names = ("edge_padding_low", "edge_padding_high")
    lows, highs = (ints(local.op, name, 0) for name in names)
    value = read_rows(local, 0, local.operands[1])
    for halo, axes in halos_of_operand(local, 0):
        lows[halo.dim], highs[halo.dim] = halo.local_padding(local.devices.group_size(axes))
    arrays = (ir.DenseI64ArrayAttr.get(each) for each in (lows, highs))
    return local.clone([value, local.operands[1]], dict(zip(names, arrays, strict=True)))


def windowed_reduction(local: LocalOp) -> Sequence[ir.Value]:
    """Beyond the ends of a sharded dim is what changes nothing: XLA leaves out what is beyond the ends."""
    count = len(local.op.results)
    values, initials = local.operands[:count], local.operands[count:]
    fold = fold_of(local.op.regions[0])
    fills = [None if fold is None else identity_of(fold, initial.type) for initial in initials]
    values = [read_rows(local, number, fill) for number, fill in enumerate(fills)]
    padding = paddings(local.op, len(value_shape(local.op.operands[0])))
    for halo, axes in halos_of_operand(local, 0):
        padding[halo.dim] = halo.local_padding(local.devices.group_size(axes))
    return local.clone([*values, *initials], {"padding": padding_attribute(padding)})


def rows_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a slice, a pad or a ``reduce_window``: a dim of the results belongs to the same dim of the operands.

    A factor has the size that divides both.
    """
    count = len(op.results)
    shape, made = (value_shape(value) for value in (op.operands[0], op.results[0]))
    sizes = tuple(math.gcd(*pair) for pair in zip(shape, made, strict=True))
    dims = tuple((factor,) for factor in range(len(sizes)))
    halos = tuple(
        window.halo(op.operands[operand], operand, dim, made[dim])
        for operand in range(count)
        for dim, window in enumerate(windows_of(op))
    )
    operands = (*((dims,) * count), *(((),) * (len(op.operands) - count)))
    return Rule(sizes, operands, (dims,) * count, replicated=ones(sizes), halos=halos)


def windowed_reduction_rule(op: ir.Operation, rule: Rule) -> Rule:
    """Dims whose windows reach beyond their ends are whole where nobody knows what changes nothing."""
    rule = rows_rule(op, rule)
    fold = fold_of(op.regions[0])
    if fold is not None:
        return replace(rule, halos=tuple(replace(halo, fill=fold) for halo in rule.halos))
    padded = {dim for dim, window in enumerate(windows_of(op)) if window.is_padded}
    return replace(rule, replicated=rule.replicated | padded)


def scatter_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a ``select_and_scatter``: dims whose windows lie one behind the other, without padding, so that those of
    a shard lie in it."""
    shape, made = (value_shape(value) for value in list(op.operands)[:2])
    dims = tuple((factor,) for factor in range(len(shape)))
    whole = {
        dim
        for dim, window in enumerate(windows_of(op))
        if window.is_padded or window.size > window.stride or made[dim] * window.stride != shape[dim]
    }
    return Rule(made, (dims, dims, ()), (dims,), replicated=ones(made) | whole)
