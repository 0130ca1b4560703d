"""The pass ``verify-program``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import ProgramError
from bactrian.passes.frame.location import describe
from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    NUM_MICROBATCHES,
    ROLE,
    ROLES,
    UPDATES,
    argument_attributes,
    integer_attribute,
    result_attributes,
)
from bactrian.passes.ir.boundary_leaks import argument_name, report_leaks
from bactrian.passes.ir.gradient_boundary_op import KINDS, REDUCTIONS
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import custom_call_target

# Custom calls that say they have side effects and have none that matters here.
PURE_TARGETS = frozenset({"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"})
_HOST_OPS = {
    "stablehlo.infeed": "an infeed",
    "stablehlo.outfeed": "an outfeed",
    "stablehlo.send": "a send to the host",
    "stablehlo.recv": "a receive from the host",
}
_CALLBACK = re.compile(r"callback|xla_ffi_python", re.IGNORECASE)


@dataclass(frozen=True)
class VerifyProgram(Pass):
    """Refuse what can't be run as a pipeline, with the user's lines.

    A step can be split into microbatches and stages only if it has one gradient boundary at its top level, if its ops
    have no effect but their results, if all shapes are known, and, with several microbatches, if what comes after the
    boundary depends on the batch through the boundary only: that is where the microbatches' values become one. All problems are reported
    together. The module is not changed.

    Requires: one flat function `@main` whose arguments have a `bactrian.role`.
    Ensures: exactly one well-formed boundary, no effects, no dynamic shapes; with several microbatches, no batch value
    used below the boundary.

    Input:

    ```mlir
    func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}, %arg1: tensor<f32> {bactrian.role = "batch"})
        -> (tensor<f32> {bactrian.updates = 0 : i64}) {
      %0 = stablehlo.multiply %arg0, %arg1 : tensor<f32>
      %1 = stablehlo.custom_call @bactrian.gradient_boundary(%0)
          {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
      %2 = stablehlo.subtract %arg0, %1 : tensor<f32>
      return %2 : tensor<f32>
    }
    ```

    Output:

    ```mlir
    func.func public @main(%arg0: tensor<f32> {bactrian.role = "state"}, %arg1: tensor<f32> {bactrian.role = "batch"})
        -> (tensor<f32> {bactrian.updates = 0 : i64}) {
      %0 = stablehlo.multiply %arg0, %arg1 : tensor<f32>
      %1 = stablehlo.custom_call @bactrian.gradient_boundary(%0)
          {mhlo.backend_config = {kinds = "gradient", reductions = "mean"}} : (tensor<f32>) -> tensor<f32>
      %2 = stablehlo.subtract %arg0, %1 : tensor<f32>
      return %2 : tensor<f32>
    }
    ```

    A program that is in order stays as it is.
    """

    name: ClassVar[str] = "verify-program"
    summary: ClassVar[str] = "refuse what can't be run as a pipeline, with the user's lines"
    requires: ClassVar[tuple[str, ...]] = ("formed",)
    ensures: ClassVar[tuple[str, ...]] = ("captured", "flat", "adopted", "verified")
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("num-ops", "Number of ops looked at"),)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        main = _main(module)
        _check_signature(main, ctx)
        boundaries: list[ir.Operation] = []
        static: set[ir.Type] = set()
        ops = _walk(main)
        ctx.count("num-ops", len(ops))
        for op in ops:
            _check_op(op, static, ctx)
            if custom_call_target(op) == GRADIENT_BOUNDARY:
                boundaries.append(op)
        boundary = _check_boundaries(main, boundaries, ctx)
        if boundary is not None:
            _check_segments(module, boundary, ctx)
            if integer_attribute(module.operation, NUM_MICROBATCHES) != 1:
                report_leaks(MainDataflow.of(main), _roles(main), ctx)


def _main(module: ir.Module) -> ir.Operation:
    """The one function of a flat module."""
    functions = [op.operation for op in module.body.operations if isinstance(op, func.FuncOp)]
    names = [ir.StringAttr(function.attributes["sym_name"]).value for function in functions]
    if names != ["main"] or len(functions[0].regions[0].blocks) != 1:
        others = [function for function, name in zip(functions, names, strict=True) if name != "main"]
        raise error_at(
            ProgramError,
            next(iter([*others, *functions]), module.operation),
            f"module is not flat: functions {', '.join(names) or 'none'}; needs @main only, of one block",
            fix="run flatten-calls first",
        )
    return functions[0]


def _walk(main: ir.Operation) -> list[ir.Operation]:
    """Every op of the function, also in regions, in order, without the function itself."""
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.append(op)
        return ir.WalkResult.ADVANCE

    main.walk(visit, ir.WalkOrder.PRE_ORDER)
    return found[1:]


def _roles(main: ir.Operation) -> list[str]:
    entries = argument_attributes(main)
    return [ir.StringAttr(each[ROLE]).value if ROLE in each else "" for each in entries]


def _check_signature(main: ir.Operation, ctx: PassContext) -> None:
    """Every argument has a role; every next value belongs to one state and has its type."""
    arguments = list(main.regions[0].blocks[0].arguments)
    roles = _roles(main)
    for index, (argument, role) in enumerate(zip(arguments, roles, strict=True)):
        if role not in ROLES:
            got = f"{ROLE} {role!r}" if role else f"no {ROLE}"
            ctx.error(argument, f"argument {index} has {got}, needs one of {', '.join(ROLES)}")
    results = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value).results
    owner: dict[int, int] = {}
    for index, (kind, attrs) in enumerate(zip(results, result_attributes(main), strict=True)):
        if UPDATES not in attrs:
            continue
        number = ir.IntegerAttr(attrs[UPDATES]).value
        if not (0 <= number < len(arguments) and roles[number] == "state"):
            ctx.error(main, f"result {index} updates argument {number}, which is no state")
        elif number in owner:
            ctx.error(main, f"results {owner[number]} and {index} both update argument {number}")
        elif arguments[number].type != kind:
            ctx.error(
                arguments[number],
                f"state {argument_name(arguments[number])} changes its type from {arguments[number].type} to {kind}",
                fix="return the state with the shape and dtype that it came with",
            )
        owner.setdefault(number, index)


def _check_op(op: ir.Operation, static: set[ir.Type], ctx: PassContext) -> None:
    """No effects, no calls to the host, no dynamic shapes. ``static`` are types known to be none."""
    target = custom_call_target(op) or ""
    if op.name in _HOST_OPS:
        ctx.error(op, f"cannot run {_HOST_OPS[op.name]} in a pipeline", fix="move it out of the train step")
    elif _CALLBACK.search(target):
        ctx.error(
            op,
            f"cannot call back to Python from a pipeline: custom call {target}",
            why="stages run on devices that don't share a Python process, once per microbatch",
            fix="remove jax.debug.print, pure_callback or io_callback from the step; return the value as aux instead",
        )
    elif target not in PURE_TARGETS and _has_side_effect(op):
        ctx.error(
            op,
            f"cannot run an op with side effects in a pipeline: custom call {target}",
            why="has_side_effect = true: it can be neither moved nor repeated",
            fix="move it out of the train step",
        )
    elif op.name == "func.call":
        ctx.error(op, "module is not flat: it has a call", fix="run flatten-calls first")
    for result in op.results:
        kind = result.type
        if kind in static:
            continue
        if isinstance(kind, ir.RankedTensorType) and not kind.has_static_shape:
            ctx.error(op, f"cannot plan for the dynamic shape {kind}", fix="use static shapes: pad or mask instead")
            break
        static.add(kind)


def _has_side_effect(op: ir.Operation) -> bool:
    return "has_side_effect" in op.attributes and ir.BoolAttr(op.attributes["has_side_effect"]).value


def _check_boundaries(main: ir.Operation, boundaries: list[ir.Operation], ctx: PassContext) -> ir.Operation | None:
    """Exactly one boundary, at the top level."""
    if not boundaries:
        ctx.error(
            main,
            "program has no gradient boundary",
            fix="take gradients with bactrian.value_and_grad or bactrian.grad, or pass forward_only=True",
        )
        return None
    for other in boundaries[1:]:
        ctx.error(
            other,
            f"program has {len(boundaries)} gradient boundaries, needs 1",
            why=f"the first one is at {describe(boundaries[0].location) or 'an unknown place'}",
            fix="compute all gradients with one bactrian.value_and_grad",
        )
    for boundary in boundaries:
        parent = boundary.parent
        if parent is not None and parent != main:
            ctx.error(
                boundary,
                f"gradient boundary is inside {parent.name}",
                why="everything below the boundary runs once per step, which the body of a loop or branch can't",
                fix="call bactrian.value_and_grad at the top level of the step, not in scan, cond, while or remat",
            )
            return None
    return boundaries[0] if len(boundaries) == 1 else None


def _segment_texts(boundary: ir.Operation, key: str) -> list[str] | None:
    config = boundary.attributes.get("mhlo.backend_config")
    if not isinstance(config, ir.DictAttr) or key not in config:
        return None
    text = config[key]
    if not isinstance(text, ir.StringAttr):
        return None
    return text.value.split(",") if text.value else []


def _check_segments(module: ir.Module, boundary: ir.Operation, ctx: PassContext) -> None:
    """Each operand has a known kind and a reduction that fits its type; each result has the type that follows."""
    kinds, reductions = _segment_texts(boundary, "kinds"), _segment_texts(boundary, "reductions")
    count = len(boundary.operands)
    if kinds is None or reductions is None or not len(kinds) == len(reductions) == count == len(boundary.results):
        ctx.error(
            boundary,
            f"gradient boundary has {count} operands and {len(boundary.results)} results, "
            f"kinds {kinds} and reductions {reductions}: needs one of each per operand",
        )
        return
    attrs = module.operation.attributes
    num_microbatches = ir.IntegerAttr(attrs[NUM_MICROBATCHES]).value if NUM_MICROBATCHES in attrs else 1
    for index, (kind, reduction) in enumerate(zip(kinds, reductions, strict=True)):
        operand = ir.RankedTensorType(boundary.operands[index].type)
        prefix = f"operand {index} of the gradient boundary ({kind})"
        if kind not in KINDS:
            ctx.error(boundary, f"{prefix} has an unknown kind, needs one of {', '.join(KINDS)}")
        elif reduction not in REDUCTIONS:
            ctx.error(boundary, f"{prefix} has reduction {reduction!r}, needs one of {', '.join(REDUCTIONS)}")
        elif reduction == "mean" and isinstance(operand.element_type, ir.IntegerType):
            ctx.error(
                boundary,
                f"{prefix} is {operand}: a mean over microbatches of integers is not defined",
                fix="reduce it with sum, last or concat, or convert it to float32",
            )
        elif reduction == "concat" and operand.rank == 0:
            ctx.error(
                boundary, f"{prefix} is a scalar: there is no dim to concatenate", fix="reduce it with mean or sum"
            )
        else:
            _check_segment_type(boundary, index, reduction, num_microbatches, ctx)


def _check_segment_type(
    boundary: ir.Operation, index: int, reduction: str, num_microbatches: int, ctx: PassContext
) -> None:
    operand = ir.RankedTensorType(boundary.operands[index].type)
    wanted = operand
    if operand.has_static_shape and reduction == "concat":
        shape = [operand.shape[0] * num_microbatches, *operand.shape[1:]]
        with boundary.location:
            wanted = ir.RankedTensorType.get(shape, operand.element_type, operand.encoding)
    result = boundary.results[index].type
    if result != wanted:
        ctx.error(boundary, f"result {index} of the gradient boundary is {result}, {reduction} gives {wanted}")
