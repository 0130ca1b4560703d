"""Convolutions, with groups of features or of the batch, over images whose rows may be sharded."""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.spmd.forms.halo_exchange import halos_of_operand, read_rows
from bactrian.passes.spmd.forms.windows import padding_attribute
from bactrian.passes.spmd.halo_rules import BATCH_GROUPS, FEATURE_GROUPS, group_count, paddings
from bactrian.passes.spmd.local_op import LocalOp


def convolution(local: LocalOp) -> Sequence[ir.Value]:
    """A convolution of the rows that a device reads, with its own groups; sums over sharded input features, and over rows
    sharded with the kernel's, are added up."""
    numbers = stablehlo.ConvDimensionNumbers(local.op.attributes["dimension_numbers"])
    dims = list(numbers.input_spatial_dimensions)
    padding = paddings(local.op, len(dims))
    for halo, axes in halos_of_operand(local, 0):
        padding[dims.index(halo.dim)] = halo.local_padding(local.devices.group_size(axes))
    attributes = {"padding": padding_attribute(padding)}
    for factor, name in ((FEATURE_GROUPS, "feature_group_count"), (BATCH_GROUPS, "batch_group_count")):
        count = group_count(local.op, name) // local.devices.group_size(local.axes_of.get(factor, ()))
        attributes[name] = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), count)
    (made,) = local.clone([read_rows(local, 0), local.operands[1]], attributes)
    return [local.add_up(made)]
