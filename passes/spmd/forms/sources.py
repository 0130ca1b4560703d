"""Ops without operands: each device makes its own shard."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir

from bactrian.passes.ir.builders import binary
from bactrian.passes.spmd.local_op import LocalOp


def constant(local: LocalOp) -> Sequence[ir.Value]:
    """Each device takes its shard from the whole; of a constant of one number that is another one."""
    (whole,) = local.clone(types=[local.op.results[0].type])
    return [local.resharder.slice(whole, local.makes[0].dims)]


def iota(local: LocalOp) -> Sequence[ir.Value]:
    """Numbers of the whole dim. They are counted as integers: sums of rounded numbers would differ."""
    dim = ir.IntegerAttr(local.op.attributes["iota_dimension"]).value
    type_ = local.local_type(local.op.results[0].type, local.makes[0])
    axes = local.makes[0].dims[dim]
    if not axes:
        return local.clone()
    integers = ir.RankedTensorType.get(type_.shape, ir.IntegerType.get_signless(32))
    (numbers,) = local.clone(types=[integers])
    first = local.first_row(axes, type_.shape[dim])
    spread = ir.Operation.create(
        "stablehlo.broadcast_in_dim",
        results=[integers],
        operands=[first],
        attributes={"broadcast_dimensions": ir.DenseI64ArrayAttr.get([])},
    ).results[0]
    numbers = binary("stablehlo.add", numbers, spread)
    if type_ == integers:
        return [numbers]
    return list(ir.Operation.create("stablehlo.convert", results=[type_], operands=[numbers]).results)
