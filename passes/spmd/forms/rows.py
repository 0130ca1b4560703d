"""Ops that put rows of a dim elsewhere: that dim is whole."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.sharding_rules import Rule
from bactrian.passes.spmd.window_dims import ints, ones


def concatenation_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a concatenation: the dim along which it goes is whole."""
    return _all_but({ir.IntegerAttr(op.attributes["dimension"]).value}, op)


def reversal_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a reversal: the reversed dims are whole."""
    return _all_but(set(ints(op, "dimensions", 0)), op)


def _all_but(whole: set[int], op: ir.Operation) -> Rule:
    shape = value_shape(op.results[0])
    dims = tuple((factor,) for factor in range(len(shape)))
    return Rule(shape, (dims,) * len(op.operands), (dims,), replicated=ones(shape) | whole)
