"""Ops that put rows of a dim elsewhere: concatenations and reversals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Rule, elementwise
from bactrian.passes.spmd.window_dims import ints, ones


def reversal(local: LocalOp) -> Sequence[ir.Value]:
    """Each device reverses its shard; then those of a reversed dim change places, the first one with the last."""
    (made,) = local.clone()
    axes = [axis for factor in sorted(local.rule.mirrored) for axis in local.axes_of.get(factor, ())]
    devices = local.devices
    if devices.group_size(axes) == 1:
        return [made]
    sources = dict[int, int]()
    for device in range(devices.count):
        place = dict(devices.coordinates(device))
        place |= {axis: devices.sizes[axis] - 1 - place[axis] for axis in axes}
        sources[device] = devices.number(place)
    return [local.collectives.permute(made, sources)]


def reversal_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a reversal: elementwise, but for the places of shards."""
    shape = value_shape(op.results[0])
    return replace(elementwise(shape, 1), replicated=ones(shape), mirrored=frozenset(ints(op, "dimensions", 0)))


def concatenation_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a concatenation: the dim along which it goes is whole."""
    shape = value_shape(op.results[0])
    along = ir.IntegerAttr(op.attributes["dimension"]).value
    return replace(elementwise(shape, len(op.operands)), replicated=ones(shape) | {along})
