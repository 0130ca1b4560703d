"""One op under all its strategies on a mesh of virtual devices, compared with one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sharded
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.ir.meshes import SHARDING, sharding_attribute
from bactrian.passes.ir.regions import body, main_function, set_operand
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.machine.cluster import CPU_HOST
from bactrian.passes.machine.spec import MeshAxes, Spec
from bactrian.passes.sharding.strategies import Strategy, strategies
from bactrian.passes.spmd.op_rules import annotate_rules, rule_of

Compare = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], None]


def same_bits(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Whether all elements are equal, signs of zeros included."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(got, expected)
    if jnp.issubdtype(got.dtype, jnp.inexact):
        for part in (np.real, np.imag) if np.iscomplexobj(got) else (np.asarray,):
            np.testing.assert_array_equal(np.signbit(part(got)), np.signbit(part(expected)))


def same_numbers(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Whether all elements are equal; of zeros XLA's sums for CPUs lose the sign."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(got, expected)


def nearly(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Whether sums are equal that were added up in another order."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    small = {2: 2e-2, 1: 0.5}.get(got.itemsize, 1e-5)
    np.testing.assert_allclose(got.astype(complex), expected.astype(complex), rtol=small, atol=small)


def check(
    function: Callable[..., Any],
    arguments: Sequence[np.ndarray[Any, Any]],
    name: str,
    axes: MeshAxes,
    compare: Compare = same_bits,
    pick: Callable[[list[Strategy]], list[Strategy]] = list,
) -> list[Strategy]:
    """Do the op once for each strategy, in one program.

    Args:
        function: with one op of that name; the others are done whole.
        arguments: of the function.
        name: of the op, ``stablehlo.gather``.
        axes: of the mesh.
        compare: a result with that of one device.
        pick: which of the strategies; the first one does everything on every device.

    Returns:
        The strategies.
    """
    module = sharded.lowered(function, arguments, axes)
    with module.context, ir.Location.unknown():
        annotate_rules(module)
        made = _strategies_in_place(module, name, axes, pick)
    results = sharded.run(module, axes, arguments)
    expected = [np.asarray(each) for each in jax.tree.leaves(jax.jit(function)(*arguments))]
    for number, strategy in enumerate(made):
        for got, wanted in zip(results[number * len(expected) :], expected, strict=False):
            try:
                adds = bool(strategy.reductions) and compare is same_bits
                (same_numbers if adds else compare)(got, wanted)
            except AssertionError as error:
                error.add_note(f"{name} on {axes}, strategy {strategy.operands} -> {strategy.results}")
                raise
    return made


def _strategies_in_place(
    module: ir.Module, name: str, axes: MeshAxes, pick: Callable[[list[Strategy]], list[Strategy]]
) -> list[Strategy]:
    """Let the function return what each strategy makes."""
    main = main_function(module)
    operations = [view.operation for view in body(main).operations]
    (op,) = (op for op in operations if op.name == name)
    end = operations[-1]
    rule = rule_of(op)
    assert rule is not None, f"{name} has no rule"
    sizes = tuple(1.0 for _ in op.results)
    picked = pick(list(strategies(rule, sizes, CPU_HOST.mesh(axes))))
    returned, specs = list[ir.Value](), list[Spec]()
    for strategy in picked:
        with ir.InsertionPoint(end):
            reads = [_resharded(op.operands[number], spec) for number, spec in enumerate(strategy.operands)]
            made = op.clone().operation
            for number, value in enumerate(reads):
                set_operand(made, number, value)
            partial = [sharding_attribute(spec, "stage0") for spec in strategy.partial]
            made.attributes[SHARDING] = sdy.TensorShardingPerValueAttr.get(partial)
            for value, before, spec in zip(made.results, strategy.partial, strategy.results, strict=True):
                returned.append(value if before == spec else _resharded(value, spec))
                specs.append(spec)
    assert list(end.operands) == list(op.results), "the function returns something else than its op's results"
    with ir.InsertionPoint(end):
        ir.Operation.create("func.return", operands=returned)
    end.erase()
    op.erase()
    types = [argument.type for argument in body(main).arguments]
    main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(types, [value.type for value in returned]))
    whole = [Spec.replicated(len(value_shape(argument))) for argument in body(main).arguments]
    for attribute, each in (("arg_attrs", whole), ("res_attrs", specs)):
        entries = [ir.DictAttr.get({SHARDING: sharding_attribute(spec, "stage0")}) for spec in each]
        main.attributes[attribute] = ir.ArrayAttr.get(entries)
    return picked


def _resharded(value: ir.Value, spec: Spec) -> ir.Value:
    attributes = {"sharding": sharding_attribute(spec, "stage0")}
    return ir.Operation.create("sdy.reshard", results=[value.type], operands=[value], attributes=attributes).results[0]
