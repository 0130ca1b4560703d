"""Train steps lowered to a flat module with roles and phases, for tests of the passes that come after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.passmanager import PassManager

from bactrian.passes.flatten_calls import FlattenCalls
from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.context import make_context
from bactrian.passes.infer_phases import InferPhases
from bactrian.passes.ir.regions import main_function


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
    lowered = jax.jit(step, keep_unused=True).lower(state, batch).compiler_ir("stablehlo")
    module = ir.Module.parse(str(lowered.operation.get_asm(enable_debug_info=True)), make_context())
    num_state, num_batch = len(jax.tree.leaves(state)), len(jax.tree.leaves(batch))
    with module.context, ir.Location.unknown():
        FlattenCalls().apply(module, PassContext(FlattenCalls()))
        PassManager.parse("builtin.module(canonicalize,cse,symbol-dce)").run(module.operation)
        main = main_function(module)
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


def sgd(params: Any, grads: Any) -> Any:
    """One step of gradient descent."""
    return jax.tree.map(lambda p, g: p - jnp.asarray(0.1, p.dtype) * g, params, grads)
