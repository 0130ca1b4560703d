"""Transforms and solves: each matrix, or row of numbers, is one device's."""

from __future__ import annotations

from dataclasses import replace

from jaxlib.mlir import ir

from bactrian.passes.spmd.sharding_rules import Rule


def narrow_fft(op: ir.Operation, rule: Rule) -> Rule:
    """The last dims are transformed."""
    transformed = len(ir.DenseI64ArrayAttr(op.attributes["fft_length"]))
    return _last_dims_whole(rule, transformed)


def narrow_cholesky(op: ir.Operation, rule: Rule) -> Rule:
    """The last two dims are those of a matrix."""
    return _last_dims_whole(rule, 2)


def narrow_triangular_solve(op: ir.Operation, rule: Rule) -> Rule:
    """Right-hand sides are solved one by one: columns where the matrix is on the left, else rows."""
    sides = rule.operands[1]
    each = sides[-1] if ir.BoolAttr(op.attributes["left_side"]).value else sides[-2]
    whole = _last_dims_whole(rule, 2)
    return replace(whole, replicated=whole.replicated - set(each), reduction=frozenset())


def _last_dims_whole(rule: Rule, count: int) -> Rule:
    tensors = (*rule.operands, *rule.results)
    whole = {factor for dims in tensors for dim in dims[len(dims) - count :] for factor in dim}
    return replace(rule, replicated=rule.replicated | whole)
