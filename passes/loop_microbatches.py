"""``loop-microbatches``: the whole step of a single stage as one function with a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.attributes import (
    ACCUMULATOR,
    ALIAS,
    FUSED,
    LOOPED_MICROBATCHES,
    NUM_MICROBATCHES,
    ONCE_PER_STEP,
    ROLE,
    integer,
    phase_of,
    read_num_microbatches,
    read_num_stages,
)
from bactrian.passes.ir.builders import binary, less, rows_from, scalar_i32, splat
from bactrian.passes.ir.meshes import mesh_tensor_parts, stage_axes
from bactrian.passes.ir.regions import body, main_function, terminator
from bactrian.passes.machine.spec import num_devices


@dataclass(frozen=True)
class LoopMicrobatches(Pass):
    """Put a step that one stage does alone into one function: accumulators, a loop over the microbatches, the update.

    With a single stage nobody waits for a microbatch, so there is nothing to schedule between two of them, and each call
    of a stage function costs its entry and hands every accumulator over. The loop slices the batch itself. With several
    stages, with forward and backward functions apart (``gpipe``), or on a mesh of several devices (a microbatch is no
    slice of what each of them holds of a batch), the module stays as it is.

    Requires: the staged form (``split-stages``).
    Ensures: where it applies, one function ``stage0.forward_backward`` that takes whole batches, and
    ``bactrian.num_microbatches = 1`` with the number of turns in ``bactrian.looped_microbatches``.

    Input:

    ```mlir
    module attributes {bactrian.num_microbatches = 2 : i64, bactrian.num_stages = 1 : i64} {
      func.func public @main(%x: !mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.argument = 0 : i64, bactrian.role = "batch"}) -> (!mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.result = 0 : i64}) attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>>} {
        %a = mpmd.fragment_call<mesh="stage0", origin=["initialize"]> @stage0.initialize() {bactrian.phase = "initialize", bactrian.stage = 0 : i64} : () -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
        %g = mpmd.fragment_call<mesh="stage0", origin=["forward_backward"]> @stage0.forward_backward(%a, %x) {bactrian.phase = "forward_backward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<4xf32>>, !mpmd.mesh_tensor<"stage0", tensor<4xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
        return %g : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      }
      func.func private @stage0.initialize() -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        %zeros = stablehlo.constant dense<0.0> : tensor<4xf32>
        return %zeros : tensor<4xf32>
      }
      func.func private @stage0.forward_backward(%a: tensor<4xf32> {bactrian.accumulator, tf.aliasing_output = 0 : i32}, %x: tensor<4xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        %s = stablehlo.add %a, %x : tensor<4xf32>
        return %s : tensor<4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.looped_microbatches = 2 : i64, bactrian.num_microbatches = 1 : i64, bactrian.num_stages = 1 : i64} {
      func.func public @main(%arg0: !mpmd.mesh_tensor<"stage0", tensor<8xf32>> {bactrian.argument = 0 : i64, bactrian.role = "batch"}) -> (!mpmd.mesh_tensor<"stage0", tensor<4xf32>> {bactrian.result = 0 : i64}) attributes {topology = #mpmd.topology<<"stage0" : <["data"=1]>>>} {
        %0 = mpmd.fragment_call<mesh="stage0", origin=["forward_backward"]> @stage0.forward_backward(%arg0) {bactrian.phase = "forward_backward", bactrian.stage = 0 : i64} : (!mpmd.mesh_tensor<"stage0", tensor<8xf32>>) -> !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
        return %0 : !mpmd.mesh_tensor<"stage0", tensor<4xf32>>
      }
      func.func private @stage0.forward_backward(%arg0: tensor<8xf32>) -> tensor<4xf32> attributes {mesh_shape = #sdy.mesh<["data"=1]>} {
        %cst = stablehlo.constant dense<0.000000e+00> : tensor<4xf32>
        %c = stablehlo.constant dense<0> : tensor<i32>
        %0:3 = stablehlo.while(%iterArg = %c, %iterArg_0 = %cst, %iterArg_1 = %arg0) : tensor<i32>, tensor<4xf32>, tensor<8xf32>
        cond {
          %c_2 = stablehlo.constant dense<2> : tensor<i32>
          %1 = stablehlo.compare LT, %iterArg, %c_2 : (tensor<i32>, tensor<i32>) -> tensor<i1>
          stablehlo.return %1 : tensor<i1>
        } do {
          %c_2 = stablehlo.constant dense<4> : tensor<i32>
          %1 = stablehlo.multiply %iterArg, %c_2 : tensor<i32>
          %2 = stablehlo.dynamic_slice %iterArg_1, %1, sizes = [4] : (tensor<8xf32>, tensor<i32>) -> tensor<4xf32>
          %3 = stablehlo.add %iterArg_0, %2 : tensor<4xf32>
          %c_3 = stablehlo.constant dense<1> : tensor<i32>
          %4 = stablehlo.add %iterArg, %c_3 : tensor<i32>
          stablehlo.return %4, %3, %iterArg_1 : tensor<i32>, tensor<4xf32>, tensor<8xf32>
        }
        return %0#1 : tensor<4xf32>
      }
    }
    ```

    The accumulator never leaves the function, and the batch comes as a whole.
    """

    name: ClassVar[str] = "loop-microbatches"
    summary: ClassVar[str] = "with one stage, loop over the microbatches inside one function"
    requires: ClassVar[tuple[str, ...]] = ("formed", "typed", "called")
    ensures: ClassVar[tuple[str, ...]] = ("split",)
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("turns", "microbatches that the loop goes through"),)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Merge the stage functions, if there is one stage and its forward and backward are one function."""
        main = main_function(module)
        count = read_num_microbatches(module)
        stages = read_num_stages(module)
        calls = [view.operation for view in body(main).operations if view.operation.name == "mpmd.fragment_call"]
        phases = [phase_of(call) for call in calls]
        if num_devices(stage_axes(module, 1)[0]) > 1:
            return
        if count == 1 or stages != 1 or phases.count(FUSED) != 1 or {*phases} - {*ONCE_PER_STEP, FUSED}:
            return
        _Merger(module, main, calls, count).merge()
        module.operation.attributes[NUM_MICROBATCHES] = integer(1)
        module.operation.attributes[LOOPED_MICROBATCHES] = integer(count)
        ctx.count("turns", count)


class _Merger:
    """Writes the merged function and the new ``@main`` around it."""

    def __init__(self, module: ir.Module, main: ir.Operation, calls: list[ir.Operation], count: int) -> None:
        self._module, self._main, self._calls, self._count = module, main, calls, count
        self._functions = {
            ir.StringAttr(view.operation.attributes["sym_name"]).value: view.operation
            for view in module.body.operations
            if view.operation.name == "func.func"
        }
        self._roles = [_role(entry) for entry in ir.ArrayAttr(main.attributes["arg_attrs"])]
        self._inner: dict[ir.Value, ir.Value] = {}  # value of `@main` -> the same in the merged function
        self._aliases: dict[ir.Value, ir.Value] = {}  # argument of `@main` -> the result that takes its buffer

    def merge(self) -> None:
        """Replace all calls by one."""
        main, block = self._main, body(self._main)
        pieces = [
            (argument, role)
            for argument, role in zip(block.arguments, self._roles, strict=True)
            if role != "microbatch_index"
        ]
        mesh = str(pieces[0][0].type).split(", ")[0] if pieces else '!mpmd.mesh_tensor<"stage0"'
        ins = [
            self._whole(_tensor(argument.type)) if role == "batch" else _tensor(argument.type)
            for argument, role in pieces
        ]
        results = [v for v in dict.fromkeys(terminator(main).operands) if self._role(v) in (None, "batch")]
        outs = [_tensor(value.type) for value in results]
        with ir.InsertionPoint(self._module.body), main.location:
            merged = func.FuncOp(f"stage0.{FUSED}.looped", (ins, outs), visibility="private")
        inner = merged.add_entry_block([ir.Location.unknown() for _ in ins])
        for (argument, _), value in zip(pieces, inner.arguments, strict=True):
            self._inner[argument] = value
        for call in self._calls:
            function = self._functions[ir.FlatSymbolRefAttr(call.attributes["callee"]).value]
            self._note_aliases(call, function)
            if phase_of(call) == FUSED:
                self._loop(call, function, inner)
            else:
                self._inline(call, function, inner)
        with ir.InsertionPoint(inner), main.location:
            func.ReturnOp([self._last(value) for value in results])
        merged.operation.attributes["mesh_shape"] = next(iter(self._functions_called())).attributes["mesh_shape"]
        merged.operation.attributes["arg_attrs"] = ir.ArrayAttr.get(
            [self._argument_attributes(argument, results) for argument, _ in pieces]
        )
        self._call_merged(pieces, ins, results, mesh)
        for function in self._functions_called():
            function.erase()
        merged.operation.attributes["sym_name"] = ir.StringAttr.get(f"stage0.{FUSED}")

    def _functions_called(self) -> list[ir.Operation]:
        return [op for name, op in self._functions.items() if name.startswith("stage0.")]

    def _whole(self, piece: ir.Type) -> ir.Type:
        tensor = ir.RankedTensorType(piece)
        rows, *rest = tensor.shape
        return ir.RankedTensorType.get([rows * self._count, *rest], tensor.element_type)

    def _note_aliases(self, call: ir.Operation, function: ir.Operation) -> None:
        """Remember which argument of the step gives its buffer to which result."""
        if "arg_attrs" not in function.attributes:
            return
        for operand, entry in zip(call.operands, ir.ArrayAttr(function.attributes["arg_attrs"]), strict=True):
            attributes = ir.DictAttr(entry)
            if ALIAS in attributes and isinstance(operand.owner, ir.Block):
                self._aliases[operand] = call.results[ir.IntegerAttr(attributes[ALIAS]).value]

    def _argument_attributes(self, argument: ir.Value, results: list[ir.Value]) -> ir.DictAttr:
        alias = self._aliases.get(argument)
        if alias is None or alias not in results:
            return ir.DictAttr.get({})
        place = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), results.index(alias))
        return ir.DictAttr.get({ALIAS: place})

    def _inline(self, call: ir.Operation, function: ir.Operation, block: ir.Block) -> None:
        with ir.InsertionPoint(block), call.location:
            values = [self._last(operand) for operand in call.operands]
        returned = _move_body(function, values, block)
        self._inner.update(zip(call.results, returned, strict=True))

    def _loop(self, call: ir.Operation, function: ir.Operation, block: ir.Block) -> None:
        """The loop: its number, what each turn hands to the next, and what every turn reads."""
        carries = _carries(function)
        outs = list(call.results)
        scalar = scalar_i32()
        source = {out: self._inner[call.operands[position]] for position, out in carries.items()}
        read = [
            operand
            for position, operand in enumerate(call.operands)
            if position not in carries and self._role(operand) != "microbatch_index"
        ]
        read = list(dict.fromkeys(read))
        with ir.InsertionPoint(block), call.location:
            first = [source[n] if n in source else splat(_tensor(out.type), 0) for n, out in enumerate(outs)]
            start = [splat(scalar, 0), *first, *(self._inner[value] for value in read)]
            types = [value.type for value in start]
            loop = ir.Operation.create("stablehlo.while", results=types, operands=start, regions=2)
        locations = [call.location] * len(types)
        condition = ir.Block.create_at_start(loop.regions[0], types, locations)
        with ir.InsertionPoint(condition), call.location:
            more = less(condition.arguments[0], splat(scalar, self._count))
            ir.Operation.create("stablehlo.return", operands=[more])
        turn = ir.Block.create_at_start(loop.regions[1], types, locations)
        number, *rest = turn.arguments
        invariants: dict[ir.Value, ir.Value] = dict(zip(read, rest[len(outs) :], strict=True))
        with ir.InsertionPoint(turn), call.location:
            for operand, value in invariants.items():
                if self._role(operand) == "batch":
                    invariants[operand] = _piece(value, number, _tensor(operand.type))
        values = [
            rest[carries[position]]
            if position in carries
            else number
            if self._role(operand) == "microbatch_index"
            else invariants[operand]
            for position, operand in enumerate(call.operands)
        ]
        made = _move_body(function, values, turn)
        with ir.InsertionPoint(turn), call.location:
            following = binary("stablehlo.add", number, splat(scalar, 1))
            ir.Operation.create("stablehlo.return", operands=[following, *made, *rest[len(outs) :]])
        self._inner.update(zip(outs, list(loop.results)[1 : 1 + len(outs)], strict=True))

    def _last(self, value: ir.Value) -> ir.Value:
        """A value after the loop: of the batch, that is the last microbatch."""
        inner = self._inner[value]
        if self._role(value) != "batch":
            return inner
        return _piece(inner, splat(scalar_i32(), self._count - 1), _tensor(value.type))

    def _role(self, value: ir.Value) -> str | None:
        """The role of an argument of ``@main``; None for what a call gives."""
        return self._roles[ir.BlockArgument(value).arg_number] if isinstance(value.owner, ir.Block) else None

    def _call_merged(
        self, pieces: Sequence[tuple[ir.Value, str]], ins: list[ir.Type], results: list[ir.Value], mesh: str
    ) -> None:
        """A new ``@main``: whole batches in, one call."""
        old = self._main
        wide = [ir.Type.parse(f"{mesh}, {type_}>") for type_ in ins]
        outs = [value.type for value in terminator(old).operands]
        with ir.InsertionPoint(old), old.location:
            new = func.FuncOp("main", (wide, outs), visibility="public")
        for attribute in old.attributes:
            if attribute not in ("arg_attrs", "function_type", "sym_name", "sym_visibility"):
                new.operation.attributes[attribute] = old.attributes[attribute]
        entries = zip(self._roles, ir.ArrayAttr(old.attributes["arg_attrs"]), strict=True)
        new.operation.attributes["arg_attrs"] = ir.ArrayAttr.get(
            [e for role, e in entries if role != "microbatch_index"]
        )
        entry = new.add_entry_block([argument.location for argument, _ in pieces])
        here: dict[ir.Value, ir.Value] = {a: v for (a, _), v in zip(pieces, entry.arguments, strict=True)}
        fused = next(call for call in self._calls if phase_of(call) == FUSED)
        attributes = {name: fused.attributes[name] for name in fused.attributes}
        with ir.InsertionPoint(entry), old.location:
            call = ir.Operation.create(
                "mpmd.fragment_call",
                results=[value.type for value in results],
                operands=list(entry.arguments),
                attributes=attributes,
            )
            here.update(zip(results, call.results, strict=True))
            func.ReturnOp([here[value] for value in terminator(old).operands])
        old.erase()


def _role(entry: ir.Attribute) -> str:
    return ir.StringAttr(ir.DictAttr(entry)[ROLE]).value


def _tensor(type_: ir.Type) -> ir.Type:
    return mesh_tensor_parts(type_)[1]


def _carries(function: ir.Operation) -> dict[int, int]:
    """Input position -> the output that is this input in the next turn."""
    carries: dict[int, int] = {}
    if "arg_attrs" not in function.attributes:
        return carries
    for position, entry in enumerate(ir.ArrayAttr(function.attributes["arg_attrs"])):
        attributes = ir.DictAttr(entry)
        if ACCUMULATOR in attributes:
            carries[position] = ir.IntegerAttr(attributes[ALIAS]).value
    return carries


def _move_body(function: ir.Operation, values: Sequence[ir.Value], block: ir.Block) -> list[ir.Value]:
    """Move a function's ops to the end of a block, with values for its arguments; returns what it returned."""
    source = body(function)
    for argument, value in zip(source.arguments, values, strict=True):
        argument.replace_all_uses_with(value)
    *operations, end = [view.operation for view in source.operations]
    returned = list(end.operands)
    end.erase()
    for operation in operations:
        block.append(operation)
    return returned


def _piece(whole: ir.Value, number: ir.Value, piece: ir.Type) -> ir.Value:
    """The rows of microbatch ``number``."""
    rows = ir.RankedTensorType(piece).shape[0]
    return rows_from(whole, binary("stablehlo.multiply", number, splat(number.type, rows)), piece)
