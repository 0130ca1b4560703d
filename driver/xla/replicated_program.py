"""The program of one device as XLA compiles it: for as many replicas as there are devices, with nothing to partition."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import argument_attributes
from bactrian.passes.ir.meshes import SHARDING
from bactrian.passes.ir.regions import body, main_function, nested_operations, terminator


def replicate(module: ir.Module) -> None:
    """Put the body of the ``sdy.manual_computation`` of ``@main`` in its place.

    Partitions and replicas differ for XLA in one thing only: who makes the programs of the devices. A program with partitions
    goes through Shardy and XLA's partitioner, also where it has nothing but a manual computation, which costs a third of
    the compile time of a small stage; replicas are what a program is already. So channels go away, which would mean
    partitions, and a device's number is that of its replica.

    Args:
        module: as ``partition`` makes it, of one function.
    """
    main = main_function(module)
    outer = body(main)
    manual = outer.operations[0].operation
    assert manual.name == "sdy.manual_computation", manual.name
    inner, end = manual.regions[0].blocks[0], terminator(main)
    types = [argument.type for argument in inner.arguments]
    for argument, local in zip(outer.arguments, inner.arguments, strict=True):
        argument.set_type(local.type)
        local.replace_all_uses_with(argument)
    operations = [view.operation for view in inner.operations]
    returned = operations.pop()
    for op in operations:
        op.move_before(end)
    results = list(returned.operands)
    for number, value in enumerate(results):
        end.operands[number] = value
    manual.erase()
    main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(types, [value.type for value in results]))
    for name, entries in (("arg_attrs", argument_attributes(main)), ("res_attrs", None)):
        if entries is None:
            if name in main.attributes:
                del main.attributes[name]
            continue
        for entry in entries:
            entry.pop(SHARDING, None)
        main.attributes[name] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])
    for op in nested_operations(main):
        if op.name == "stablehlo.fft":
            _keep_row_major(op)
        _without_partitions(op)
    for view in list(module.body.operations):
        if view.operation.name == "sdy.mesh":
            view.operation.erase()
    root = module.operation.attributes
    i32 = ir.IntegerType.get_signless(32)
    root["mhlo.num_replicas"], root["mhlo.num_partitions"] = root["mhlo.num_partitions"], ir.IntegerAttr.get(i32, 1)


def _without_partitions(op: ir.Operation) -> None:
    for name in ("channel_handle", "use_global_device_ids"):
        if name in op.attributes:
            del op.attributes[name]
    if op.name == "stablehlo.partition_id":
        with ir.InsertionPoint(op), op.location:
            number = ir.Operation.create("stablehlo.replica_id", results=[op.results[0].type]).results[0]
        op.results[0].replace_all_uses_with(number)
        op.erase()


def _keep_row_major(op: ir.Operation) -> None:
    """Let XLA lay out what an op reads and makes row by row.

    On CPUs XLA gives values that are gathered another layout, and ops beside them too; its Fourier transforms then fail
    when they run (RET_CHECK in ``fft_thunk.cc``, jaxlib 0.10.2), and the other devices wait for ever.
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
