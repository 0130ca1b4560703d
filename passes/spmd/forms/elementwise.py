"""Ops that are themselves on shards: they treat each position, or each row of an unsharded dim, on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Dims, Rule


def same_op(local: LocalOp) -> Sequence[ir.Value]:
    """The op with the types of shards."""
    return local.clone()


def narrow_reshape(op: ir.Operation, rule: Rule) -> Rule:
    """Parts of dims that are no parts of the other side's dims are whole: of ``5x16`` to ``2x40`` those of 5, of the 2, and
    of the upper 2 of 16."""
    (operand,), (result,) = rule.operands, rule.results
    return replace(rule, replicated=rule.replicated | _factors(operand) ^ _factors(result))


def _factors(tensor: Dims) -> frozenset[int]:
    return frozenset(factor for dim in tensor for factor in dim)
