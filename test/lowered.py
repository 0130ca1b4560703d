"""Train steps lowered to a flat module with roles and phases, for tests of the passes that come after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.context import make_context
from bactrian.passes.infer_phases import InferPhases
from jaxlib.mlir import ir
from jaxlib.mlir.passmanager import PassManager


def boundary(loss: Any, grads: Any, aux: Any = ()) -> tuple[Any, Any, Any]:
    """The gradient boundary around loss, gradients and aux values."""
    leaves, tree = jax.tree.flatten((loss, grads, aux))
    sizes = [len(jax.tree.leaves(part)) for part in (loss, grads, aux)]
    kinds = ["loss"] * sizes[0] + ["gradient"] * sizes[1] + ["aux"] * sizes[2]
    reductions = ["mean"] * (sizes[0] + sizes[1]) + ["last"] * sizes[2]
    call = jax.ffi.ffi_call("bactrian.gradient_boundary", [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    outs = call(*leaves, kinds=",".join(kinds), reductions=",".join(reductions))
    return jax.tree.unflatten(tree, outs)


@jax.custom_vjp
def stage_boundary(x: jax.Array) -> jax.Array:
    """The marker between layers; it marks the cotangent, too."""
    return _mark(x)


def _mark(x: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call("bactrian.stage_boundary", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


stage_boundary.defvjp(lambda x: (_mark(x), None), lambda _, g: (_mark(g),))


def lower(step: Callable[..., Any], state: Any, batch: Any) -> ir.Module:
    """``new_state, ... = step(state, batch)`` as a module with roles and phases, in a fresh context (entered)."""
    text = str(jax.jit(step, keep_unused=True).lower(state, batch).compiler_ir("stablehlo").operation.get_asm(enable_debug_info=True))
    module = ir.Module.parse(text, make_context())
    num_state, num_batch = len(jax.tree.leaves(state)), len(jax.tree.leaves(batch))
    with module.context, ir.Location.unknown():
        _flatten(module)
        main = next(op.operation for op in module.body.operations if op.operation.attributes["sym_name"].value == "main")
        roles = ["state"] * num_state + ["batch"] * num_batch
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(
            [ir.DictAttr.get({"bactrian.role": ir.StringAttr.get(role)}) for role in roles]
        )
        i64 = ir.IntegerType.get_signless(64)
        results = len(main.attributes["function_type"].value.results)
        main.attributes["res_attrs"] = ir.ArrayAttr.get(
            [
                ir.DictAttr.get({"bactrian.updates": ir.IntegerAttr.get(i64, n)} if n < num_state else {})
                for n in range(results)
            ]
        )
        InferPhases().apply(module, PassContext(InferPhases()))
    return module


def _flatten(module: ir.Module) -> None:
    pipeline = "sdy-import-func-calls,func.func(sdy-sink-data-flow-edges),canonicalize,cse,symbol-dce"
    PassManager.parse(f"builtin.module({pipeline})").run(module.operation)
    calls: list[ir.Operation] = []

    def found(op: ir.Operation) -> ir.WalkResult:
        if op.name == "sdy.named_computation":
            calls.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(found)
    for call in calls:
        block = call.regions[0].blocks[0]
        for argument, operand in zip(list(block.arguments), list(call.operands), strict=True):
            argument.replace_all_uses_with(operand)
        *inner, end = [view.operation for view in block.operations]
        for op in inner:
            op.move_before(call)
        for result, operand in zip(list(call.results), list(end.operands), strict=True):
            result.replace_all_uses_with(operand)
        call.erase()
    PassManager.parse("builtin.module(func.func(chlo-legalize-to-stablehlo),canonicalize,cse,symbol-dce)").run(module.operation)


def sgd(params: Any, grads: Any) -> Any:
    """One step of gradient descent."""
    return jax.tree.map(lambda p, g: p - jnp.asarray(0.1, p.dtype) * g, params, grads)
