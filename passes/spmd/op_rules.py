"""The sharding rule of an op: Shardy's, less what no form can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy
from jaxlib.mlir.passmanager import PassManager

from bactrian.passes.ir.regions import nested_operations
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.form_table import FORMS
from bactrian.passes.spmd.sharding_rules import Dims, Rule, elementwise

RULE = "sdy.sharding_rule"

_MOST_RULES = 4096
_SOURCES = ("stablehlo.constant", "stablehlo.iota")
_POPULATE = "builtin.module(func.func(sdy-populate-op-sharding-rules))"


def annotate_rules(module: ir.Module) -> None:
    """Give every op of a module Shardy's rule."""
    PassManager.parse(_POPULATE).run(module.operation)


def drop_rules(root: ir.Operation) -> None:
    """Take the rules off all ops inside of one."""
    for op in nested_operations(root):
        if RULE in op.attributes:
            del op.attributes[RULE]


def rule_of(op: ir.Operation) -> Rule | None:
    """The rule of an op: which dims its form can shard. None where it has no form, or Shardy has annotated no rule.

    The choice of shardings offers what the rule says, and ``partition`` writes it.
    """
    form = FORMS.get(op.name)
    if form is None:
        return None
    if op.name in _SOURCES:  # every device makes its own shard
        return _without_empty(elementwise(value_shape(op.results[0]), 0))
    if op.name == "stablehlo.map":  # Shardy has no rule for it
        return _without_empty(elementwise(value_shape(op.results[0]), len(op.operands)))
    if RULE not in op.attributes:
        return None
    made = _read(op.attributes[RULE])
    shapes = [value_shape(value) for value in (*list(op.operands)[: len(made.operands)], *op.results)]
    uneven = _uneven((*made.operands, *made.results), shapes, made.sizes)
    return _without_empty(form.narrow(op, replace(made, replicated=made.replicated | uneven) if uneven else made))


_read_rules: dict[str, Rule] = {}  # by their texts: a program has few, and attributes take long to read


def _read(attribute: ir.Attribute) -> Rule:
    text = str(attribute)
    if text not in _read_rules:
        if len(_read_rules) == _MOST_RULES:
            _read_rules.clear()
        rule = sdy.OpShardingRuleAttr(attribute)
        _read_rules[text] = Rule(
            sizes=tuple(rule.factor_sizes),
            operands=tuple(_dims(mapping) for mapping in rule.operand_mappings),
            results=tuple(_dims(mapping) for mapping in rule.result_mappings),
            reduction=frozenset(rule.reduction_factors),
            replicated=frozenset(rule.need_replication_factors),
            permuted=frozenset(rule.permutation_factors),
        )
    return _read_rules[text]


def _without_empty(rule: Rule) -> Rule:
    """Factors of size 0 replicated: there is nothing to shard."""
    empty = frozenset(factor for factor, size in enumerate(rule.sizes) if size == 0)
    return replace(rule, replicated=rule.replicated | empty) if empty else rule


def _dims(mapping: ir.Attribute) -> Dims:
    tensor = sdy.TensorMappingAttr(mapping)
    return tuple(tuple(sdy.DimMappingAttr(dim).factor_indices) for dim in tensor.dim_mappings)


def _uneven(tensors: Sequence[Dims], shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> frozenset[int]:
    """Factors of a dim that is smaller than they are, such as the result of a slice: equal shards of one are none of the
    other."""
    return frozenset(
        factor
        for tensor, shape in zip(tensors, shapes, strict=True)
        for dim, size in zip(tensor, shape, strict=True)
        if math.prod(sizes[factor] for factor in dim) != size
        for factor in dim
    )
