"""The contract of staged modules: calls of stage functions and transfers between meshes."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    ACCUMULATOR,
    ALIAS,
    ARGUMENT,
    FUSED,
    PHASE,
    PHASES,
    RESULT,
    ROLE,
    ROUND,
    STAGE,
    argument_attributes,
    integer_attribute,
    result_attributes,
    string_attribute,
)
from bactrian.passes.ir.meshes import SHARDING, mesh_tensor_parts
from bactrian.passes.ir.regions import body, nested_operations, terminator

_PHASES = (*PHASES, FUSED)
_ROLES = ("state", "batch", "constant", "microbatch_index")


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 8."""
    main = view.main
    functions = {
        ir.StringAttr(each.operation.attributes["sym_name"]).value: each.operation
        for each in view.module.body.operations
        if each.operation.name == "func.func" and each.operation != main
    }
    _verify_signature(main)
    called = set[str]()
    for each in body(main).operations:
        op = each.operation
        if op.name == "mpmd.fragment_call":
            symbol = ir.FlatSymbolRefAttr(op.attributes["callee"]).value
            called.add(symbol)
            _verify_call(op, symbol, functions[symbol])
        elif op.name == "mpmd.transfer":
            (source, _, _), (target, _, _) = (mesh_tensor_parts(v.type) for v in (op.operands[0], op.results[0]))
            if source == target:
                raise error_at(PassError, op, f"a transfer goes from stage {source} to itself")
        elif op != terminator(main):
            raise error_at(PassError, op, "@main has an op that is no call, no transfer and no return")
    for symbol, function in functions.items():
        if symbol not in called:
            raise error_at(PassError, function, f"@{symbol} is called by nobody")
        _verify_function(function)


def _verify_signature(main: ir.Operation) -> None:
    for value, entry in zip(body(main).arguments, argument_attributes(main), strict=True):
        role = ir.StringAttr(entry[ROLE]).value if ROLE in entry else None
        if role not in _ROLES:
            raise error_at(PassError, value, f"bactrian.role is {role!r}, must be one of {', '.join(_ROLES)}")
        if role != "microbatch_index" and ARGUMENT not in entry:
            raise error_at(PassError, value, "a piece does not say of which argument: no bactrian.argument")
    for value, entry in zip(terminator(main).operands, result_attributes(main), strict=True):
        if RESULT not in entry:
            raise error_at(PassError, value, "a piece does not say of which result: no bactrian.result")


def _verify_call(call: ir.Operation, symbol: str, function: ir.Operation) -> None:
    stage, phase = integer_attribute(call, STAGE), string_attribute(call, PHASE)
    number = integer_attribute(call, ROUND) or 0
    if phase not in _PHASES:
        raise error_at(PassError, call, f"bactrian.phase is {phase}, must be one of {', '.join(_PHASES)}")
    wanted = f"stage{stage}.{phase}" + (f"_{number}" if number else "")
    if symbol != wanted:
        raise error_at(PassError, call, f"@{symbol} is called where stage and phase say @{wanted}")
    entries = argument_attributes(function), result_attributes(function)
    for values, attributes in zip((call.operands, call.results), entries, strict=True):
        for value, entry in zip(values, attributes, strict=True):
            home, _, sharding = mesh_tensor_parts(value.type)
            if home != stage:
                raise error_at(PassError, call, f"a call of stage {stage} reads or makes a value of stage {home}")
            if entry.get(SHARDING) != sharding:
                raise error_at(PassError, call, f"@{symbol} has {entry.get(SHARDING)} where its call has {sharding}")


def _verify_function(function: ir.Operation) -> None:
    results = list(terminator(function).operands)
    for value, entry in zip(body(function).arguments, argument_attributes(function), strict=True):
        if ALIAS in entry and results[ir.IntegerAttr(entry[ALIAS]).value].type != value.type:
            raise error_at(PassError, value, "an argument gives its buffer to a result of another type")
        if ACCUMULATOR in entry and ALIAS not in entry:
            raise error_at(PassError, value, "an accumulator does not give its buffer to the result that replaces it")
    for op in nested_operations(function):
        if PHASE in op.attributes or STAGE in op.attributes:
            raise error_at(PassError, op, "an op of a stage function has a phase or a stage of its own")
