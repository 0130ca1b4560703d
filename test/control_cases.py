"""Random cases of control flow, and why some ops of StableHLO have none."""

from __future__ import annotations

import numpy as np
from op_cases import Case, Generator, Type, any_numbers, pick, shape, type_of, whole_numbers

WITHOUT_CASES: dict[str, str] = {
    **dict.fromkeys(
        (
            "all_gather", "all_reduce", "all_to_all", "collective_broadcast", "collective_permute",
            "collective_reduce", "cross-replica-sum",
            "partition_id", "reduce_scatter", "replica_id",
        ),
        "`partition` itself writes them; in a program of whole tensors there are none",
    ),
    **dict.fromkeys(("after_all", "create_token", "infeed", "outfeed", "recv", "send"), "of tokens and of the host"),
    **dict.fromkeys(("async_done", "async_start"), "XLA's own, after all passes"),
    **dict.fromkeys(("get_tuple_element", "tuple"), "of tuples, which functions of tensors don't have"),
    **dict.fromkeys(
        (
            "dynamic_broadcast_in_dim", "dynamic_conv", "dynamic_gather", "dynamic_iota", "dynamic_pad",
            "dynamic_reshape", "get_dimension_size", "real_dynamic_slice", "set_dimension_size",
        ),
        "of shapes that are known only at run time, which programs for XLA don't have",
    ),
    **dict.fromkeys(("uniform_dequantize", "uniform_quantize"), "of quantized types, which XLA doesn't take"),
    **dict.fromkeys(("composite", "custom_call"), "whole: what they call says nothing of its dims"),
    **dict.fromkeys(("einsum", "unary_einsum"), "whole; deprecated"),
    "rng": "whole; its numbers are different in every run: test_spmd_programs.py compares devices",
    "return": "ends regions",
}  # fmt: skip
"""Ops of StableHLO's dialect that no case is drawn of, and why."""


def _branches(random: np.random.Generator, name: str, count: int, choice: np.ndarray) -> Case:
    """Each branch computes something else of the same two values."""
    element, dims = pick(random, ("f32", "i32", "bf16")), shape(random)
    values = any_numbers(random, dims, element), any_numbers(random, dims, element)
    type_ = type_of(values[0])
    folds = ("maximum", "minimum", "subtract", "add")
    regions = tuple(
        f'%b{branch} = "stablehlo.{folds[branch]}"($1, $2) : ({type_}, {type_}) -> {type_} '
        f'"stablehlo.return"(%b{branch}) : ({type_}) -> ()'
        for branch in range(count)
    )
    return Case(name, (choice, *values), (type_,), regions=regions, captured=2)


def _if(random: np.random.Generator) -> Case:
    return _branches(random, "if", 2, np.asarray(bool(random.integers(2))))


def _case(random: np.random.Generator) -> Case:
    """Indices out of range take the last branch."""
    return _branches(random, "case", int(random.integers(1, 5)), np.asarray(random.integers(-2, 7), np.int32))


def _while(random: np.random.Generator) -> Case:
    """A number of turns, and a value that each turn changes by one that is read from outside."""
    element, dims = pick(random, ("f32", "i32", "f64")), shape(random)
    values = whole_numbers(random, dims, element), whole_numbers(random, dims, element)
    index, type_ = "tensor<i32>", type_of(values[0])
    turns = int(random.integers(0, 4))
    condition = f"""^bb0(%i: {index}, %v: {type_}):
      %n = "stablehlo.constant"() <{{value = dense<{turns}> : {index}}}> : () -> {index}
      %c = "stablehlo.compare"(%i, %n) <{{comparison_direction = #stablehlo<comparison_direction LT>, compare_type = #stablehlo<comparison_type SIGNED>}}> : ({index}, {index}) -> tensor<i1>
      "stablehlo.return"(%c) : (tensor<i1>) -> ()"""
    body = f"""^bb0(%i: {index}, %v: {type_}):
      %n = "stablehlo.constant"() <{{value = dense<1> : {index}}}> : () -> {index}
      %j = "stablehlo.add"(%i, %n) : ({index}, {index}) -> {index}
      %w = "stablehlo.subtract"(%v, $2) : ({type_}, {type_}) -> {type_}
      "stablehlo.return"(%j, %w) : ({index}, {type_}) -> ()"""
    return Case(
        "while", (np.zeros((), np.int32), *values), (Type((), "i32"), type_), regions=(condition, body), captured=1
    )


GENERATORS: dict[str, Generator] = {"case": _case, "if": _if, "while": _while}
