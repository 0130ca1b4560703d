"""Convolutions, with groups of features or of the batch, over images whose rows may be sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.forms.halo_exchange import halos_of_operand, read_rows
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Rule
from bactrian.passes.spmd.window_dims import ones, padding_attribute, paddings, windows_of

_FEATURE_GROUPS, _BATCH_GROUPS, _BATCH, _INPUTS, _OUTPUTS = range(5)  # factors, before those of the spatial dims


def convolution(local: LocalOp) -> Sequence[ir.Value]:
    """A convolution of the rows that a device reads, with its own groups; sums over sharded input features, and over rows
    sharded with the kernel's, are added up."""
    numbers = stablehlo.ConvDimensionNumbers(local.op.attributes["dimension_numbers"])
    dims = list(numbers.input_spatial_dimensions)
    padding = paddings(local.op, len(dims))
    for halo, axes in halos_of_operand(local, 0):
        padding[dims.index(halo.dim)] = halo.local_padding(local.devices.group_size(axes))
    attributes = {"padding": padding_attribute(padding)}
    for factor, name in ((_FEATURE_GROUPS, "feature_group_count"), (_BATCH_GROUPS, "batch_group_count")):
        count = _groups(local.op, name) // local.devices.group_size(local.axes_of.get(factor, ()))
        attributes[name] = ir.IntegerAttr.get(ir.IntegerType.get_signless(64), count)
    kernel, reversals = local.operands[1], _reversals(local.op)
    if any(reversals):  # XLA for CPUs has fast convolutions for windows that are not reversed
        dims = [dim for dim, turned in zip(numbers.kernel_spatial_dimensions, reversals, strict=True) if turned]
        kernel = stablehlo.reverse(kernel, ir.DenseI64ArrayAttr.get(dims))
        attributes["window_reversal"] = ir.DenseBoolArrayAttr.get([False] * len(reversals))
    (made,) = local.clone([read_rows(local, 0), kernel], attributes)
    return [local.add_up(made)]


def convolution_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a convolution.

    Its factors are the groups of features and those of the batch, the rest of the batch, the input and the output
    features of a group, then two for each spatial dim. Groups are the major part of the dims that they are in: they are
    sharded first.

    A spatial dim of the image is sharded with that of the result, and its kernel is whole; or, if the kernel is larger
    than the result, as for a kernel's gradient, with that of the kernel, and its result is summed over.
    """
    numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    image, made = value_shape(op.operands[0]), value_shape(op.results[0])
    left, right, result = (list[tuple[int, ...]]([()] * len(image)) for _ in range(3))
    left[numbers.input_batch_dimension] = (_BATCH_GROUPS, _BATCH)
    left[numbers.input_feature_dimension] = (_FEATURE_GROUPS, _INPUTS)
    right[numbers.kernel_input_feature_dimension] = (_INPUTS,)
    right[numbers.kernel_output_feature_dimension] = (_FEATURE_GROUPS, _BATCH_GROUPS, _OUTPUTS)
    result[numbers.output_batch_dimension] = (_BATCH,)
    result[numbers.output_feature_dimension] = (_FEATURE_GROUPS, _BATCH_GROUPS, _OUTPUTS)
    sizes = _plain_sizes(op, numbers)
    halos, reduction, whole = list[Halo](), {_INPUTS}, set[int]()
    reversals = _reversals(op)
    for at, window in enumerate(windows_of(op)):
        dim, inside, out = _spatial_dims(numbers, at)
        count, together, alone = made[out], len(sizes), len(sizes) + 1
        whole.add(alone)
        left[dim] = (together,)
        if window.size > count:
            right[inside], result[out] = (together,), (alone,)
            sizes += [math.gcd(image[dim], window.size), count]
            halos.append(window.halo_of_kernel(op.operands[0], 0, dim, count))
            reduction.add(together)
            if reversals[at]:  # the last rows of the kernel belong to the first of the image
                whole.add(together)
        else:
            right[inside], result[out] = (alone,), (together,)
            sizes += [math.gcd(image[dim], count), window.size]
            halos.append(window.halo(op.operands[0], 0, dim, count))
    return Rule(
        tuple(sizes),
        (tuple(left), tuple(right)),
        (tuple(result),),
        reduction=frozenset(reduction),
        replicated=ones(sizes) | whole,
        halos=tuple(halos),
    )


def _plain_sizes(op: ir.Operation, numbers: stablehlo.ConvDimensionNumbers) -> list[int]:
    """Of the factors that are not spatial."""
    kernel, made = value_shape(op.operands[1]), value_shape(op.results[0])
    features, batches = (_groups(op, name) for name in ("feature_group_count", "batch_group_count"))
    inputs, outputs = kernel[numbers.kernel_input_feature_dimension], kernel[numbers.kernel_output_feature_dimension]
    return [features, batches, made[numbers.output_batch_dimension], inputs, outputs // (features * batches)]


def _spatial_dims(numbers: stablehlo.ConvDimensionNumbers, at: int) -> tuple[int, int, int]:
    """A spatial dim in the image, the kernel and the result."""
    return (
        numbers.input_spatial_dimensions[at],
        numbers.kernel_spatial_dimensions[at],
        numbers.output_spatial_dimensions[at],
    )


def _reversals(op: ir.Operation) -> list[bool]:
    """For each spatial dim whether the kernel is read from its end."""
    if "window_reversal" not in op.attributes:
        return [False] * len(windows_of(op))
    return list(ir.DenseBoolArrayAttr(op.attributes["window_reversal"]))


def _groups(op: ir.Operation, name: str) -> int:
    return ir.IntegerAttr(op.attributes[name]).value
