"""The program of one device as XLA takes it."""

from __future__ import annotations

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.passes.ir.attributes import argument_attributes, result_attributes
from bactrian.passes.ir.meshes import SHARDING, mesh_name, sharding_attribute, spec_of
from bactrian.passes.ir.regions import body, main_function, nested_operations
from bactrian.passes.machine.spec import Spec


def prepare_for_xla(module: ir.Module) -> None:
    """Say of values what XLA must know, and no more.

    A value that is unreduced is to XLA a whole value of each device: nothing may add it up but the program itself.

    Args:
        module: of one function; on several devices as ``partition`` makes it.
    """
    main = main_function(module)
    for op in nested_operations(main):
        if op.name == "stablehlo.fft":
            _keep_row_major(op)
        if op.name == "stablehlo.rng_bit_generator":
            _draw_unsigned(op)
    first = body(main).operations[0].operation
    if first.name != "sdy.manual_computation":
        return
    for name in ("in_shardings", "out_shardings"):
        shardings = sdy.TensorShardingPerValueAttr(first.attributes[name]).shardings
        first.attributes[name] = sdy.TensorShardingPerValueAttr.get([_reduced(each) for each in shardings])
    for name, entries in (("arg_attrs", argument_attributes(main)), ("res_attrs", result_attributes(main))):
        for entry in entries:
            if SHARDING in entry:
                entry[SHARDING] = _reduced(entry[SHARDING])
        if name in main.attributes:
            main.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])


def _reduced(sharding: ir.Attribute) -> ir.Attribute:
    return sharding_attribute(Spec(spec_of(sharding).dims), mesh_name(sharding))


def _draw_unsigned(op: ir.Operation) -> None:
    """Draw signed integers as the unsigned ones of the same bits.

    XLA's import makes them unsigned itself, and doesn't say so to what encloses them: a manual computation then has
    results of another type than it declares (RET_CHECK in ``custom_call_handler.cc``, jaxlib 0.10.2).
    """
    drawn = op.results[1]
    declared = ir.RankedTensorType(drawn.type)
    if not (isinstance(declared.element_type, ir.IntegerType) and declared.element_type.is_signless):
        return
    with op.location:
        unsigned = ir.IntegerType.get_unsigned(declared.element_type.width)
        drawn.set_type(ir.RankedTensorType.get(declared.shape, unsigned))
        with ir.InsertionPoint.after(op):
            signed = stablehlo.bitcast_convert(declared, drawn)
    drawn.replace_all_uses_except(signed, ir.OpResult(signed).owner.operation)


def _keep_row_major(op: ir.Operation) -> None:
    """Let XLA lay out what a Fourier transform reads and makes row by row.

    On CPUs XLA gives values that are gathered another layout, and ops beside them too; its transforms then fail when they
    run (RET_CHECK in ``fft_thunk.cc``, jaxlib 0.10.2), and the other devices wait for ever.
    """
    (operand,), (result,) = op.operands, op.results
    with op.location:
        with ir.InsertionPoint(op):
            op.operands[0] = _row_major(operand)
        with ir.InsertionPoint.after(op):
            made = _row_major(result)
    result.replace_all_uses_except(made, ir.OpResult(made).owner.operation)


def _row_major(value: ir.Value) -> ir.Value:
    rank = ir.RankedTensorType(value.type).rank
    layout = ir.Attribute.parse(f"dense<{list(reversed(range(rank)))}> : tensor<{rank}xindex>")
    return ir.Operation.create(
        "stablehlo.custom_call",
        results=[value.type],
        operands=[value],
        attributes={
            "call_target_name": ir.StringAttr.get("LayoutConstraint"),
            "operand_layouts": ir.ArrayAttr.get([layout]),
            "result_layouts": ir.ArrayAttr.get([layout]),
        },
    ).results[0]
