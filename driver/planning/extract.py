"""From the staged module to the runtime's plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import PassError, ProgramError
from bactrian.passes.ir.attributes import (
    ACCUMULATOR,
    ARGUMENT,
    ORDER,
    RESULT,
    ROLE,
    ROWS,
    UPDATE,
    UPDATES,
    argument_attributes,
    phase_of,
    read_num_microbatches,
    read_num_stages,
    read_schedule,
    round_of,
    stage_of,
)
from bactrian.passes.ir.meshes import mesh_tensor_parts, spec_or_replicated, stage_axes
from bactrian.passes.ir.regions import body, main_function, terminator
from bactrian.runtime.staged_program import ArgumentPiece, Call, ResultPiece, StagedProgram, Transfer, Value

_DTYPES = {
    "i1": "bool",
    "i4": "int4",
    "ui4": "uint4",
    "bf16": "bfloat16",
    "complex<f32>": "complex64",
    "complex<f64>": "complex128",
    "f8E4M3FN": "float8_e4m3fn",
    "f8E5M2": "float8_e5m2",
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"ui{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
}


def numpy_dtype(element: ir.Type) -> str:
    """The numpy name of a tensor's element type."""
    text = str(element)
    if text not in _DTYPES:
        raise ProgramError(f"element type {text} can't cross between stages", fix="cast the value to a standard dtype")
    return _DTYPES[text]


@dataclass
class _Reader:
    values: list[Value] = field(default_factory=list[Value])
    number: dict[ir.Value, int] = field(default_factory=dict[ir.Value, int])

    def add(self, value: ir.Value, per_microbatch: bool) -> int:
        """Number one value of the staged ``@main``."""
        stage, tensor, sharding = mesh_tensor_parts(value.type)
        number = len(self.values)
        shape, dtype = tuple(tensor.shape), numpy_dtype(tensor.element_type)
        self.values.append(Value(number, stage, shape, dtype, per_microbatch, spec_or_replicated(sharding, tensor)))
        self.number[value] = number
        return number


def extract(module: ir.Module) -> StagedProgram:
    """Read a scheduled module (``docs/ir.md`` section 9) into a `StagedProgram`."""
    with module.context:
        return _extract(module)


def _extract(module: ir.Module) -> StagedProgram:
    root, main = module.operation, main_function(module)
    functions = {
        ir.StringAttr(view.operation.attributes["sym_name"]).value: view.operation
        for view in module.body.operations
        if view.operation.name == "func.func"
    }
    reader = _Reader()
    arguments: list[ArgumentPiece] = []
    counters: set[ir.Value] = set()
    for value, entry in zip(body(main).arguments, ir.ArrayAttr(main.attributes["arg_attrs"]), strict=True):
        attributes = ir.DictAttr(entry)
        role = ir.StringAttr(attributes[ROLE]).value
        if role == "microbatch_index":
            counters.add(value)
            continue
        argument = ir.IntegerAttr(attributes[ARGUMENT]).value
        number = reader.add(value, role == "batch")
        piece = f"argument {argument} on stage {reader.values[number].stage}"
        rows = _rows(attributes, reader.values[number], piece)
        if rows is not None and role == "batch":
            raise PassError(f"{piece} is some rows of a batch", why="microbatches are cut from all of its rows")
        arguments.append(ArgumentPiece(argument, role, number, rows))
    calls: list[Call] = []
    transfers: list[Transfer] = []
    for view in body(main).operations:
        op = view.operation
        if op.name == "mpmd.fragment_call":
            calls.append(_call(op, functions, reader, counters))
        elif op.name == "mpmd.transfer":
            source = reader.number[op.operands[0]]
            once = phase_of(op) == UPDATE
            target = reader.add(op.results[0], reader.values[source].per_microbatch and not once)
            transfers.append(Transfer(source, target))
    results = _results(main, reader)
    _check_one_piece([(piece.argument, piece.value) for piece in arguments], reader.values, "argument")
    _check_one_piece([(p.result, p.value) for p in results if p.updates is not None], reader.values, "result")
    num_stages = read_num_stages(module)
    return StagedProgram(
        num_stages=num_stages,
        num_microbatches=read_num_microbatches(module),
        schedule=read_schedule(module) or "",
        values=tuple(reader.values),
        calls=tuple(calls),
        transfers=tuple(transfers),
        arguments=tuple(arguments),
        results=tuple(results),
        order=tuple(
            tuple(ir.StringAttr(token).value for token in ir.ArrayAttr(tokens))
            for tokens in ir.ArrayAttr(root.attributes[ORDER])
        ),
        meshes=stage_axes(module, num_stages),
    )


def _call(op: ir.Operation, functions: dict[str, ir.Operation], reader: _Reader, counters: set[ir.Value]) -> Call:
    symbol = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
    phase = phase_of(op) or ""
    stage = stage_of(op) or 0
    inputs = tuple(-1 if value in counters else reader.number[value] for value in op.operands)
    per_microbatch = phase in ("forward", "backward", "forward_backward")
    outputs = tuple(reader.add(value, per_microbatch) for value in op.results)
    donated: list[int] = []
    carries: list[tuple[int, int]] = []
    for position, attributes in enumerate(argument_attributes(functions[symbol])):
        if "tf.aliasing_output" in attributes:
            donated.append(position)
            if ACCUMULATOR in attributes:
                carries.append((position, ir.IntegerAttr(attributes["tf.aliasing_output"]).value))
    return Call(
        function=symbol,
        stage=stage,
        phase=phase,
        round=round_of(op),
        inputs=inputs,
        outputs=outputs,
        donated=tuple(donated),
        carries=tuple(carries),
        index_input=inputs.index(-1) if -1 in inputs else None,
    )


def _results(main: ir.Operation, reader: _Reader) -> list[ResultPiece]:
    entries = ir.ArrayAttr(main.attributes["res_attrs"])
    pieces: list[ResultPiece] = []
    for value, entry in zip(terminator(main).operands, entries, strict=True):
        attributes = ir.DictAttr(entry)
        updates = ir.IntegerAttr(attributes[UPDATES]).value if UPDATES in attributes else None
        result, number = ir.IntegerAttr(attributes[RESULT]).value, reader.number[value]
        piece = f"result {result} on stage {reader.values[number].stage}"
        rows = _rows(attributes, reader.values[number], piece)
        if rows is not None and updates is None:
            raise PassError(f"{piece} is some rows of a result", why="only what stays on its stages can be in pieces")
        pieces.append(ResultPiece(result, number, updates, rows))
    return pieces


def _rows(attributes: ir.DictAttr, value: Value, piece: str) -> tuple[int, int] | None:
    """The rows of an argument or result that a piece holds; None where it holds all of them."""
    if ROWS not in attributes:
        return None
    start, stop = (ir.IntegerAttr(bound).value for bound in ir.ArrayAttr(attributes[ROWS]))
    if not 0 <= start < stop or value.shape[:1] != (stop - start,):
        raise PassError(f"{piece} is rows [{start}, {stop}), but has the shape {list(value.shape)}")
    return start, stop


def _check_one_piece(pieces: Sequence[tuple[int, int]], values: Sequence[Value], what: str) -> None:
    """Refuse two pieces of one argument or result on one stage; ``pieces`` are (number, value)."""
    seen = set[tuple[int, int]]()
    for number, value in pieces:
        if (number, values[value].stage) in seen:
            raise PassError(f"stage {values[value].stage} has two pieces of {what} {number}")
        seen.add((number, values[value].stage))
