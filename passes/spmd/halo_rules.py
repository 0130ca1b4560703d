"""Ops with windows (convolutions, poolings, pads, slices): the dims that can be sharded, and the halos to exchange."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.op_costs import element_bytes
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.sharding_rules import Rule

WINDOWED = frozenset(
    f"stablehlo.{name}" for name in ("convolution", "pad", "reduce_window", "select_and_scatter", "slice")
)
"""The ops whose rules have halos, or windows that lie in a shard."""
FEATURE_GROUPS, BATCH_GROUPS, _BATCH, _INPUTS, _OUTPUTS = range(5)
"""The first factors of a convolution's rule; `convolution_rule` says what they are."""


@dataclass(frozen=True)
class Window:
    """The windows over a dim.

    Attributes:
        size: rows of one.
        stride: from one to the next.
        low: padding in front of the dim.
        base_dilation: of the dim: one more than the gap between two rows.
        window_dilation: of the window.
    """

    size: int = 1
    stride: int = 1
    low: int = 0
    base_dilation: int = 1
    window_dilation: int = 1

    @property
    def reach(self) -> int:
        """From the first position of a window to behind its last."""
        return (self.size - 1) * self.window_dilation + 1


def windows_of(op: ir.Operation) -> list[Window]:
    """The windows of an op, for each dim of its first operand, or each spatial dim of a convolution.

    Args:
        op: a slice, a pad, a convolution, or one with window_dimensions.
    """
    count = len(value_shape(op.operands[0]))
    if op.name == "stablehlo.slice":
        starts, strides = (_ints(op, name, count) for name in ("start_indices", "strides"))
        return [Window(stride=stride, low=-start) for start, stride in zip(starts, strides, strict=True)]
    if op.name == "stablehlo.pad":
        lows, gaps = (_ints(op, name, count) for name in ("edge_padding_low", "interior_padding"))
        return [Window(low=low, base_dilation=1 + gap) for low, gap in zip(lows, gaps, strict=True)]
    if op.name == "stablehlo.convolution":
        numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
        kernel = value_shape(op.operands[1])
        sizes, names = [kernel[dim] for dim in numbers.kernel_spatial_dimensions], ("lhs_dilation", "rhs_dilation")
    else:
        sizes, names = _ints(op, "window_dimensions", count), ("base_dilations", "window_dilations")
    strides, *dilations = (_ints(op, name, len(sizes)) for name in ("window_strides", *names))
    lows = [low for low, _ in paddings(op, len(sizes))]
    return [Window(*each) for each in zip(sizes, strides, lows, *dilations, strict=True)]


def paddings(op: ir.Operation, count: int) -> list[tuple[int, int]]:
    """The ``padding`` of an op, in front of and behind each of ``count`` dims."""
    if "padding" not in op.attributes:
        return [(0, 0)] * count
    values = [int(value) for value in ir.DenseIntElementsAttr(op.attributes["padding"])]
    values = values if len(values) == 2 * count else values * count
    return list(zip(values[::2], values[1::2], strict=True))


def halos_of(op: ir.Operation) -> tuple[Halo, ...]:
    """The halos of an op, operand by operand and dim by dim; none for an op without windows.

    A dim is sharded with one of the result or, in a convolution whose kernel is larger than its result, with one of the
    kernel.
    """
    match op.name:
        case "stablehlo.convolution":
            return tuple(_of_convolution(op))
        case "stablehlo.slice" | "stablehlo.pad" | "stablehlo.reduce_window":
            return tuple(_of_rows(op))
        case _:
            return ()


def rows_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a slice, a pad or a ``reduce_window``: a dim of the result belongs to the same dim of the operands.

    A factor has the size that divides both.
    """
    count = len(op.results) if op.name == "stablehlo.reduce_window" else 1
    shapes = [value_shape(op.operands[0]), value_shape(op.results[0])]
    sizes = tuple(math.gcd(*pair) for pair in zip(*shapes, strict=True))
    dims = tuple((factor,) for factor in range(len(sizes)))
    scalars = ((),) * (len(op.operands) - count)
    return Rule(sizes, (*((dims,) * count), *scalars), (dims,) * count, replicated=_ones(sizes), halos=halos_of(op))


def scatter_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a ``select_and_scatter``: dims whose windows lie one behind the other, without padding, so that those of
    a shard lie in it."""
    shape, made = (value_shape(value) for value in list(op.operands)[:2])
    dims = tuple((factor,) for factor in range(len(shape)))
    count = len(shape)
    high = [each for _, each in paddings(op, count)]
    whole = {
        dim
        for dim, window in enumerate(windows_of(op))
        if (window.low, high[dim]) != (0, 0) or window.size > window.stride or made[dim] * window.stride != shape[dim]
    }
    return Rule(made, (dims, dims, ()), (dims,), replicated=frozenset(whole) | _ones(made))


def concatenation_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a concatenation: the dim along which it goes is whole."""
    shape = value_shape(op.results[0])
    dims = tuple((factor,) for factor in range(len(shape)))
    along = ir.IntegerAttr(op.attributes["dimension"]).value
    return Rule(shape, (dims,) * len(op.operands), (dims,), replicated=frozenset({along}) | _ones(shape))


def reversal_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a reversal: the reversed dims are whole."""
    shape = value_shape(op.results[0])
    dims = tuple((factor,) for factor in range(len(shape)))
    along = _ints(op, "dimensions", 0)
    return Rule(shape, (dims,), (dims,), replicated=frozenset(along) | _ones(shape))


def convolution_rule(op: ir.Operation, rule: Rule) -> Rule:
    """The rule of a convolution.

    Its factors are the groups of features, those of the batch, the rest of the batch, input features and output
    features of a group, then one for each spatial dim. Groups are the major part of the dims that they are in. Input
    features are summed over, and spatial dims that are sharded with the kernel.
    """
    numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    image, kernel, made = (value_shape(value) for value in (*op.operands, op.results[0]))
    features, batches = (group_count(op, name) for name in ("feature_group_count", "batch_group_count"))
    outputs = kernel[numbers.kernel_output_feature_dimension] // (features * batches)
    inputs, rows = kernel[numbers.kernel_input_feature_dimension], made[numbers.output_batch_dimension]
    sizes = [features, batches, rows, inputs, outputs]
    tensors: list[list[tuple[int, ...]]] = [[()] * len(image) for _ in range(3)]
    left, right, result = tensors
    left[numbers.input_batch_dimension] = (BATCH_GROUPS, _BATCH)
    left[numbers.input_feature_dimension] = (FEATURE_GROUPS, _INPUTS)
    right[numbers.kernel_input_feature_dimension] = (_INPUTS,)
    right[numbers.kernel_output_feature_dimension] = (FEATURE_GROUPS, BATCH_GROUPS, _OUTPUTS)
    result[numbers.output_batch_dimension] = (_BATCH,)
    result[numbers.output_feature_dimension] = (FEATURE_GROUPS, BATCH_GROUPS, _OUTPUTS)
    reduction, whole = {_INPUTS}, set[int]()
    for at, (dim, inside, out) in enumerate(_spatial_dims(numbers)):
        together, alone = len(sizes), len(sizes) + 1
        by_kernel = _is_by_kernel(op, inside, out)
        left[dim] = (together,)
        right[inside], result[out] = ((together,), (alone,)) if by_kernel else ((alone,), (together,))
        sizes += [math.gcd(image[dim], max(kernel[inside], made[out])), min(kernel[inside], made[out])]
        whole.add(alone)
        if by_kernel:
            reduction.add(together)
            whole |= {together} if _reversals(op)[at] else set()
    return Rule(
        tuple(sizes),
        (tuple(left), tuple(right)),
        (tuple(result),),
        reduction=frozenset(reduction),
        replicated=frozenset(whole) | _ones(sizes),
        halos=halos_of(op),
    )


def group_count(op: ir.Operation, name: str) -> int:
    """``feature_group_count`` or ``batch_group_count`` of a convolution."""
    return ir.IntegerAttr(op.attributes[name]).value


def _of_convolution(op: ir.Operation) -> Iterator[Halo]:
    numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    image, kernel, made = (value_shape(value) for value in (*op.operands, op.results[0]))
    for window, (dim, inside, out) in zip(windows_of(op), _spatial_dims(numbers), strict=True):
        by_kernel = _is_by_kernel(op, inside, out)
        if by_kernel:
            advance = kernel[inside] * window.window_dilation
            overlap = (made[out] - 1) * window.stride + 1 - window.window_dilation
        else:
            advance, overlap = made[out] * window.stride, window.reach - window.stride
        yield Halo(
            operand=0, dim=dim, partner=1 if by_kernel else None, partner_dim=inside if by_kernel else out, shape=image,
            element_bytes=_element_bytes(op.operands[0]), advance=advance, overlap=overlap, padding=window.low,
            dilation=window.base_dilation,
        )  # fmt: skip


def _of_rows(op: ir.Operation) -> Iterator[Halo]:
    made = value_shape(op.results[0])
    for operand in range(len(op.results)):
        shape = value_shape(op.operands[operand])
        for dim, window in enumerate(windows_of(op)):
            yield Halo(
                operand=operand, dim=dim, partner=None, partner_dim=dim, shape=shape,
                element_bytes=_element_bytes(op.operands[operand]), advance=made[dim] * window.stride,
                overlap=window.reach - window.stride, padding=window.low, dilation=window.base_dilation,
            )  # fmt: skip


def _spatial_dims(numbers: stablehlo.ConvDimensionNumbers) -> Iterator[tuple[int, int, int]]:
    """The spatial dims of a convolution: of the image, the kernel and the result."""
    return zip(
        numbers.input_spatial_dimensions,
        numbers.kernel_spatial_dimensions,
        numbers.output_spatial_dimensions,
        strict=True,
    )


def _is_by_kernel(op: ir.Operation, inside: int, out: int) -> bool:
    """Whether a spatial dim of the image is sharded with that of the kernel, as in a kernel's gradient."""
    return value_shape(op.operands[1])[inside] > value_shape(op.results[0])[out]


def _reversals(op: ir.Operation) -> list[bool]:
    """For each spatial dim of a convolution whether the kernel is read from its end."""
    count = len(windows_of(op))
    return (
        list(ir.DenseBoolArrayAttr(op.attributes["window_reversal"]))
        if "window_reversal" in op.attributes
        else [False] * count
    )


def _element_bytes(value: ir.Value) -> int:
    return element_bytes(ir.RankedTensorType(value.type).element_type)


def _ints(op: ir.Operation, name: str, count: int) -> list[int]:
    """An array of an op; ones where it is left out."""
    return list(ir.DenseI64ArrayAttr(op.attributes[name])) if name in op.attributes else [1] * count


def _ones(sizes: Sequence[int]) -> frozenset[int]:
    """Factors that no axis can shard."""
    return frozenset(factor for factor, size in enumerate(sizes) if size <= 1)
