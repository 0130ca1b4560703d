"""``flatten-calls``: every call becomes straight-line code, in one function."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import func

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.frame.location import name_stack

ENTRY = "main"
_COMPOSITES = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"
_CHLO = "builtin.module(func.func(chlo-legalize-to-stablehlo))"


@dataclass(frozen=True)
class FlattenCalls(Pass):
    """Turn every call into straight-line code and leave one function.

    JAX lowers ``jit``, ``scan`` bodies and library functions to private functions. Every later pass reasons about one
    block of ops, so each call, also inside a ``while`` or ``case``, is replaced by its function's ops; their name
    stacks are put behind the call's. CHLO ops are then rewritten to StableHLO, and nothing but ``@main`` is left.

    Requires: a public ``@main``; functions of one block each; no recursion.
    Ensures: ``@main`` is the only function, there is no ``func.call`` and no CHLO op anywhere.

    Input:

    ```mlir
    func.func public @main(%arg0: tensor<4xf32>) -> tensor<4xf32> {
      %0 = call @double(%arg0) : (tensor<4xf32>) -> tensor<4xf32>
      %1 = call @double(%0) : (tensor<4xf32>) -> tensor<4xf32>
      return %1 : tensor<4xf32>
    }
    func.func private @double(%arg0: tensor<4xf32>) -> tensor<4xf32> {
      %0 = stablehlo.add %arg0, %arg0 : tensor<4xf32>
      return %0 : tensor<4xf32>
    }
    ```

    Output:

    ```mlir
    func.func public @main(%arg0: tensor<4xf32>) -> tensor<4xf32> {
      %0 = stablehlo.add %arg0, %arg0 : tensor<4xf32>
      %1 = stablehlo.add %0, %0 : tensor<4xf32>
      return %1 : tensor<4xf32>
    }
    ```

    The two calls become two additions.
    """

    name: ClassVar[str] = "flatten-calls"
    summary: ClassVar[str] = "turn every call into straight-line code and leave one function"
    requires: ClassVar[tuple[str, ...]] = ("formed",)
    ensures: ClassVar[tuple[str, ...]] = ("flat",)
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("inlined", "calls replaced by their function's ops"),
        Statistic("functions-dropped", "functions erased"),
        Statistic("chlo-ops", "CHLO ops rewritten to StableHLO"),
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        if _count(module, "stablehlo.composite"):
            passmanager.PassManager.parse(_COMPOSITES).run(module.operation)
        functions = _functions(module)
        if ENTRY not in functions:
            raise ctx.fatal(
                next(iter(functions.values()), module.operation),
                f"the module has no @{ENTRY}",
                why=f"its functions are {', '.join(f'@{name}' for name in functions)}" if functions else "it is empty",
                fix="start from `step.trace(*args).text`, or pass a module with one public @main",
            )
        order = _callees_first(functions, ctx)
        ctx.fail_if_errors()
        uses = Counter(_callee(call) for function in functions.values() for call in _calls(function))
        for name in order:
            for call in _calls(functions[name]):
                callee = _callee(call)
                uses[callee] -= 1
                _inline(call, functions[callee], last=uses[callee] == 0)
                ctx.count("inlined")
        for name, function in functions.items():
            if name != ENTRY:
                function.erase()
                ctx.count("functions-dropped")
        num_chlo = _count(module, "chlo.")
        if num_chlo:
            ctx.count("chlo-ops", num_chlo)
            passmanager.PassManager.parse(_CHLO).run(module.operation)


def _functions(module: ir.Module) -> dict[str, ir.Operation]:
    return {
        ir.StringAttr(op.operation.attributes["sym_name"]).value: op.operation
        for op in module.body.operations
        if isinstance(op, func.FuncOp)
    }


def _calls(function: ir.Operation) -> list[ir.Operation]:
    """Every call in a function, also in regions, in order."""
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.append(op)
        return ir.WalkResult.ADVANCE

    function.walk(visit, ir.WalkOrder.PRE_ORDER, func.CallOp)
    return [op.operation for op in found]


def _callee(call: ir.Operation) -> str:
    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def _callees_first(functions: dict[str, ir.Operation], ctx: PassContext) -> list[str]:
    """The functions that ``@main`` reaches, each after all it calls; reports what can't be inlined."""
    order: list[str] = []
    open_names: list[str] = []

    def visit(name: str) -> None:
        open_names.append(name)
        function = functions[name]
        if not function.regions[0].blocks or len(function.regions[0].blocks) > 1:
            blocks = len(function.regions[0].blocks)
            ctx.error(function, f"cannot flatten @{name}: it has {blocks} blocks, needs exactly 1")
        for call in _calls(function):
            callee = _callee(call)
            if callee in open_names:
                cycle = " -> ".join([*open_names[open_names.index(callee) :], callee])
                ctx.error(call, f"cannot flatten the recursive function @{callee}", why=cycle)
            elif callee not in order:
                visit(callee)
        open_names.pop()
        order.append(name)

    visit(ENTRY)
    return order


def _inline(call: ir.Operation, callee: ir.Operation, last: bool) -> None:
    """Replace a call by the ops of its flat function; the last call takes the ops themselves, others a copy."""
    source = callee if last else callee.clone(ip=False)
    block = source.regions[0].blocks[0]
    for argument, operand in zip(block.arguments, call.operands, strict=True):
        argument.replace_all_uses_with(operand)
    stack = name_stack(call.location)
    renamed: dict[ir.Attribute, ir.Location] = {}
    body = [op.operation for op in block.operations]
    for op in body[:-1]:
        op.move_before(call)
        if stack:
            _prefix(op, stack, renamed)
    for result, value in zip(call.results, body[-1].operands, strict=True):
        result.replace_all_uses_with(value)
    call.erase()
    if not last:
        source.erase()


def _prefix(op: ir.Operation, stack: str, renamed: dict[ir.Attribute, ir.Location]) -> None:
    """Put the call's name stack before an op's own, unless that one starts at the same root already."""
    root = stack.split("/", 1)[0] + "/"

    def visit(inner: ir.Operation) -> ir.WalkResult:
        location = inner.location
        key = location.attr
        if key not in renamed:
            name = name_stack(location)
            if name.startswith(root):
                renamed[key] = location
            else:
                child = location.child_loc if isinstance(location, ir.NameLoc) else location
                renamed[key] = ir.Location.name(f"{stack}/{name}" if name else stack, child)
        inner.location = renamed[key]
        return ir.WalkResult.ADVANCE

    op.walk(visit)


def _count(module: ir.Module, prefix: str) -> int:
    """How many ops have a name with this prefix."""
    count = 0

    def visit(op: ir.Operation) -> ir.WalkResult:
        nonlocal count
        count += op.name.startswith(prefix)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return count
