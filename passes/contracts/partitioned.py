"""The contract of partitioned modules: a stage function on several devices is the program of one of them."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import argument_attributes, result_attributes
from bactrian.passes.ir.meshes import SHARDING, mesh_axes, spec_of
from bactrian.passes.ir.regions import body, nested_operations, terminator
from bactrian.passes.machine.spec import num_devices

_MANUAL = "sdy.manual_computation"


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 8a."""
    meshes = mesh_axes(view.module)
    if all(num_devices(axes) == 1 for axes in meshes.values()):
        return  # nothing was sharded
    for each in view.module.body.operations:
        op = each.operation
        if op.name != "func.func" or op == view.main:
            continue
        axes = meshes.get(ir.StringAttr(op.attributes["sym_name"]).value.partition(".")[0], ())
        if num_devices(axes) > 1:
            _verify_function(op)
        else:
            _verify_program(op)


def _verify_function(function: ir.Operation) -> None:
    operations = [each.operation for each in body(function).operations]
    if [op.name for op in operations] != [_MANUAL, "func.return"]:
        raise error_at(PassError, function, f"a stage function on several devices is not one {_MANUAL}")
    manual = operations[0]
    if list(manual.operands) != list(body(function).arguments) or list(operations[1].operands) != list(manual.results):
        raise error_at(PassError, manual, f"{_MANUAL} does not read and make what its function does, in order")
    signature = (
        ("in_shardings", argument_attributes(function), body(function).arguments),
        ("out_shardings", result_attributes(function), terminator(function).operands),
    )
    for name, entries, values in signature:
        shardings = sdy.TensorShardingPerValueAttr(manual.attributes[name]).shardings
        for sharding, entry, value in zip(shardings, entries, values, strict=True):
            if SHARDING in entry and spec_of(entry[SHARDING]) != spec_of(sharding):
                raise error_at(PassError, value, f"{name} has {sharding} where the function has {entry[SHARDING]}")
    _verify_program(manual)


def _verify_program(around: ir.Operation) -> None:
    """What one device runs is without shardings."""
    for op in nested_operations(around):
        if SHARDING in op.attributes:
            raise error_at(PassError, op, f"an op of the program of one device has {SHARDING}")
        if op.name.startswith("sdy.") and op.name != "sdy.return":
            raise error_at(PassError, op, f"{op.name} is left in the program of one device")
