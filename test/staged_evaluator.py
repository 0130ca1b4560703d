"""A numpy evaluator of captured and staged modules, which also plays a careful runtime: a donated buffer is gone, an
accumulator is carried from microbatch to microbatch, and a state piece lives on from step to step on its stage only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import phase_of
from bactrian.passes.ir.gradient_boundary_op import boundary_words, find_boundary
from bactrian.passes.ir.regions import body, custom_call_target, main_function

Array = np.ndarray[Any, Any]
Env = dict[ir.Value, Array]

_BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "and": np.bitwise_and,
    "negate": np.negative,
    "cosine": np.cos,
    "transpose": np.transpose,
}


# --- The evaluator ---------------------------------------------------------------------------------------------------


def shape_and_dtype(value: ir.Value) -> tuple[tuple[int, ...], Any]:
    """Of a tensor, as numpy has them."""
    tensor = ir.RankedTensorType(value.type)
    kinds = {"f64": np.float64, "i32": np.int32, "i1": np.bool_}
    return tuple(tensor.shape), kinds[str(tensor.element_type)]


def _constant(op: ir.Operation) -> Array:
    shape, kind = shape_and_dtype(op.results[0])
    attribute = ir.DenseElementsAttr(op.attributes["value"])
    assert attribute.is_splat
    return np.full(shape, attribute.get_splat_value().value, kind)


def _place(starts: list[Array], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(int(at), int(at) + size) for at, size in zip(starts, shape, strict=True))


def evaluate(op: ir.Operation, env: Env, microbatch: int | None) -> None:
    """Run one op, its regions included."""
    args = [env[value] for value in op.operands]
    name = op.name.removeprefix("stablehlo.")
    if name in _BINARY:
        outs = [_BINARY[name](*args)]
    elif name == "constant":
        outs = [_constant(op)]
    elif name == "broadcast_in_dim":
        outs = [np.broadcast_to(args[0], shape_and_dtype(op.results[0])[0])]
    elif name == "reshape":
        outs = [args[0].reshape(shape_and_dtype(op.results[0])[0])]
    elif name == "concatenate":
        outs = [np.concatenate(args)]
    elif name == "reduce":
        inner = op.regions[0].blocks[0].operations[0].operation.name.removeprefix("stablehlo.")
        outs = [args[1]]
        for item in args[0].reshape(-1):
            outs = [_BINARY[inner](outs[0], item)]
    elif name == "optimization_barrier":
        outs = args
    elif name == "case":
        branch = op.regions[int(np.clip(args[0], 0, len(op.regions) - 1))].blocks[0]
        outs = run_block(branch, dict(env), microbatch)
    elif name == "while":
        condition, turn = (region.blocks[0] for region in op.regions)
        outs = args
        while run_block(condition, env | dict(zip(condition.arguments, outs, strict=True)), microbatch)[0]:
            outs = run_block(turn, env | dict(zip(turn.arguments, outs, strict=True)), microbatch)
    elif name == "compare":
        assert "LT" in str(op.attributes["comparison_direction"])
        outs = [np.asarray(args[0] < args[1])]
    elif name == "dynamic_slice":
        outs = [args[0][_place(args[1:], shape_and_dtype(op.results[0])[0])]]
    elif name == "dynamic_update_slice":
        place = _place(args[2:], args[1].shape)
        outs = [args[0].copy()]
        outs[0][place] = args[1]
    elif custom_call_target(op) == "bactrian.microbatch_index":
        assert microbatch is not None
        outs = [np.asarray(microbatch, np.int32)]
    else:
        raise NotImplementedError(op.name)
    env.update(zip(op.results, outs, strict=True))


def run_block(block: ir.Block, env: Env, microbatch: int | None) -> list[Array]:
    """Run a straight-line block to its return."""
    for view in block.operations:
        if view.operation.name in ("func.return", "stablehlo.return"):
            return [env[value] for value in view.operation.operands]
        evaluate(view.operation, env, microbatch)
    raise AssertionError("no return")


def _reduce(how: str, values: list[Array]) -> Array:
    if how == "concat":
        return np.concatenate(values)
    return {"last": values[-1], "sum": sum(values), "mean": sum(values) / len(values)}[how]  # type: ignore[return-value]


def run_captured(module: ir.Module, state: dict[int, Array], batches: list[dict[int, Array]]) -> list[Array]:
    """One step of the captured ``@main``: everything above the boundary once per microbatch."""
    main = main_function(module)
    boundary = find_boundary(main)
    operations = [view.operation for view in body(main).operations]
    split = operations.index(boundary)
    arguments = list(body(main).arguments)
    rows: list[list[Array]] = []
    env: Env = {}
    for microbatch, batch in enumerate(batches):
        env = {arguments[i]: value for i, value in {**state, **batch}.items()}
        for op in operations[:split]:
            evaluate(op, env, microbatch)
        rows.append([env[value] for value in boundary.operands])
    for number, how in enumerate(boundary_words(boundary, "reductions")):
        env[boundary.results[number]] = _reduce(how, [row[number] for row in rows])
    for op in operations[split + 1 : -1]:
        evaluate(op, env, None)
    return [env[value] for value in operations[-1].operands]


@dataclass
class StagedRun:
    """The staged module, run step by step; ``pieces`` is the state, by (argument, stage)."""

    module: ir.Module
    pieces: dict[tuple[int, int], Array]
    functions: dict[str, ir.Operation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for view in self.module.body.operations:
            if view.operation.name == "func.func":
                self.functions[ir.StringAttr(view.operation.attributes["sym_name"]).value] = view.operation

    def step(self, batches: list[dict[int, Array]]) -> dict[int, list[Array]]:
        """Run a step; returns each captured result's pieces, and keeps the next state."""
        main = self.functions["main"]
        operations = [view.operation for view in body(main).operations]
        once: Env = {}
        per_microbatch: list[tuple[int, ir.Value]] = []
        for value, entry in zip(body(main).arguments, _entries(main, "arg_attrs"), strict=True):
            if "bactrian.argument" not in entry:
                per_microbatch.append((-1, value))
                continue
            argument = ir.IntegerAttr(entry["bactrian.argument"]).value
            if ir.StringAttr(entry["bactrian.role"]).value == "batch":
                per_microbatch.append((argument, value))
            else:
                once[value] = self.pieces[argument, _stage(value)]
        carried: dict[tuple[str, int], Array] = {}
        calls = {
            name: [op for op in operations if phase_of(op) == name] for name in ("prepare", "initialize", "update")
        }
        middle = [op for op in operations[:-1] if phase_of(op) not in calls]
        for op in calls["prepare"] + calls["initialize"]:
            self._run(op, once, None, carried)
        for microbatch, batch in enumerate(batches):
            for argument, value in per_microbatch:
                once[value] = np.asarray(microbatch, np.int32) if argument < 0 else batch[argument]
            for op in middle:
                self._run(op, once, microbatch, carried)
        for op in calls["update"]:
            self._run(op, once, None, carried)
        return self._finish(main, operations[-1], once)

    def _finish(self, main: ir.Operation, end: ir.Operation, env: Env) -> dict[int, list[Array]]:
        results: dict[int, list[Array]] = {}
        fresh: dict[tuple[int, int], Array] = {}
        updated: set[int] = set()
        for value, entry in zip(end.operands, _entries(main, "res_attrs"), strict=True):
            results.setdefault(ir.IntegerAttr(entry["bactrian.result"]).value, []).append(env[value])
            if "bactrian.updates" in entry:
                argument = ir.IntegerAttr(entry["bactrian.updates"]).value
                fresh[argument, _stage(value)] = env[value]
                updated.add(argument)
        stages = dict.fromkeys(self.read_pieces(main))
        stale = [piece for piece in stages if piece[0] in updated and piece not in fresh]
        assert not stale, f"pieces that nobody brings up to date: {stale}"
        self.pieces.update(fresh)
        return results

    @staticmethod
    def read_pieces(main: ir.Operation) -> list[tuple[int, int]]:
        """(argument, stage) of every argument piece."""
        entries = zip(body(main).arguments, _entries(main, "arg_attrs"), strict=True)
        return [
            (ir.IntegerAttr(entry["bactrian.argument"]).value, _stage(value))
            for value, entry in entries
            if "bactrian.argument" in entry
        ]

    def _run(self, op: ir.Operation, env: Env, microbatch: int | None, carried: dict[tuple[str, int], Array]) -> None:
        if op.name == "mpmd.transfer":
            env[op.results[0]] = env[op.operands[0]]
            return
        symbol = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
        function = self.functions[symbol]
        entries = _entries(function, "arg_attrs")
        inputs = [
            carried[symbol, number] if (symbol, number) in carried else env[value]
            for number, value in enumerate(op.operands)
        ]
        outputs = run_block(body(function), dict(zip(body(function).arguments, inputs, strict=True)), microbatch)
        for number, entry in enumerate(entries):
            if "tf.aliasing_output" not in entry:
                continue
            alias = ir.IntegerAttr(entry["tf.aliasing_output"]).value
            assert body(function).arguments[number].type == op_type(function, alias)
            env.pop(op.operands[number], None)  # its buffer is gone
            if "bactrian.accumulator" in entry:
                carried[symbol, number] = outputs[alias]
        env.update(zip(op.results, outputs, strict=True))


def op_type(function: ir.Operation, number: int) -> ir.Type:
    """The type of a function's result."""
    return ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value).results[number]


def _entries(op: ir.Operation, key: str) -> list[ir.DictAttr]:
    return [ir.DictAttr(a) for a in ir.ArrayAttr(op.attributes[key])] if key in op.attributes else []


def _stage(value: ir.Value) -> int:
    return int(str(value.type).split('"stage')[1].split('"')[0])


# --- Comparing -------------------------------------------------------------------------------------------------------
