"""Ops with windows (convolutions, poolings, pads, slices): the dims that can be sharded, and the halos to exchange."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.op_costs import element_bytes
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.halo import Halo
from bactrian.passes.spmd.sharding_rules import Rule

RULE = "sdy.sharding_rule"
_ROW_BY_ROW = frozenset(f"stablehlo.{name}" for name in ("reduce_window", "select_and_scatter", "pad", "slice"))
_WITH_WINDOWS = _ROW_BY_ROW | {"stablehlo.convolution"}


def with_halos(op: ir.Operation, rule: Rule, shapes: Sequence[tuple[int, ...]]) -> Rule:
    """A rule with the halos that devices exchange. Other windowed dims stay replicated.

    Of a convolution's image Shardy's factors are the number of windows, of which devices need their neighbours' part,
    and the size of the window, over which it may sum. The major one can be sharded, into shards that are equal in all
    tensors. Of other ops dims of two sizes have two factors; here they have one.

    Args:
        op: whose rule it is.
        rule: as Shardy has it.
        shapes: of the operands and the results.
    """
    if op.name not in _WITH_WINDOWS:
        return rule
    windowed, plain = windowed_dims(op), product_dims(op)
    if not windowed and not plain:
        return rule
    first, count = rule.operands[0], len(rule.operands)
    tensors = [list(dims) for dims in (*rule.operands, *rule.results)]
    halos, cut = list[Halo](), set[int]()
    whole, sizes = {factor for dim in windowed for factor in first[dim]}, list(rule.sizes)
    tied = [(halo.dim, halo.partner, halo.partner_dim, halo) for halo in halos_of(op)]
    for dim, partner, partner_dim, halo in [*tied, *((dim, 1, dim, None) for dim in non_overlapping_dims(op))]:
        other = tensors[count if partner is None else partner]
        if not first[dim]:
            continue
        factor = first[dim][0]
        if op.name == "stablehlo.convolution":
            if other[partner_dim][:1] != (factor,):
                continue
        else:
            whole |= set(other[partner_dim])
            other[partner_dim] = (factor,)
        cut.add(factor)
        if halo is not None:
            halos.append(halo)
    for factor in cut:
        dims = [
            (dim, size)
            for tensor, shape in zip(tensors, shapes, strict=True)
            for dim, size in zip(tensor, shape, strict=True)
            if factor in dim
        ]
        sizes[factor] = math.gcd(*(size for _, size in dims))
        whole |= {minor for dim, _ in dims for minor in dim[1:]}
    return replace(
        rule,
        sizes=tuple(sizes),
        operands=tuple(map(tuple, tensors[:count])),
        results=tuple(map(tuple, tensors[count:])),
        replicated=(rule.replicated | whole) - cut,
        permuted=rule.permuted - cut - {first[dim][0] for dim in plain if first[dim]},
        halos=tuple(halos),
    )


class PaddingValues:
    """What images are padded with, for ops whose windows are the same.

    XLA exchanges the halo of an image once for all windows that are the same, and fills up what is beyond the image
    with what the first of them wants: a convolution and a maximum with windows of 3 can't both be sharded. Here this
    goes for all images of one shape, since equal ops are one to XLA; convolutions come first.

    Args:
        ops: of a program.
    """

    def __init__(self, ops: Iterable[ir.Operation]) -> None:
        named = ((op.name, op) for op in ops)
        windowed = [(name != "stablehlo.convolution", op) for name, op in named if name in _WITH_WINDOWS]
        self._known = dict[object, object]()
        for _, op in sorted(windowed, key=lambda pair: pair[0]):
            windows = _padded_windows(op)
            if windows is not None:
                self._known.setdefault(windows, _padding_value(op))

    def agreed(self, op: ir.Operation, rule: Rule) -> Rule:
        """The rule, with windowed dims replicated if another op pads the same windows with something else."""
        windows = _padded_windows(op)
        if windows is None or self._known[windows] == _padding_value(op):
            return rule
        whole = {rule.factor_of(halo) for halo in rule.halos}
        return replace(rule, replicated=rule.replicated | whole, halos=())


def _padded_windows(op: ir.Operation) -> object:
    """Equal for ops with the same windows on images of one shape; None where these end with the image.

    Not of which dim of the result they are, nor in which order: images are exchanged alike for all.
    """
    halos = [halo for halo in halos_of(op) if halo.partner is None]
    if not any(halo.is_padded for halo in halos):
        return None
    windows = sorted((each.dim, each.advance, each.overlap, each.padding, each.dilation) for each in halos)
    return halos[0].shape, halos[0].element_bytes, tuple(windows)


def _padding_value(op: ir.Operation) -> object:
    """The padding value of an op, where it is known."""
    if op.name not in ("stablehlo.reduce_window", "stablehlo.pad"):
        return 0.0
    number = splat_of(op.operands[1])
    if number is None:
        return object()  # like no other
    return ir.FloatAttr(number).value if isinstance(number, ir.FloatAttr) else str(number)


def halos_of(op: ir.Operation) -> tuple[Halo, ...]:
    """The halos of an op that XLA exchanges, operand by operand and dim by dim; none for an op without windows.

    A dim may be sharded with one of the result or with one of the kernel: then there is a halo for each. Left out are
    windows of one row, and those of which XLA makes something else: of convolutions with groups it gathers the image
    for some.
    """
    match op.name:
        case "stablehlo.convolution":
            return tuple(_of_convolution(op)) if not _has_groups(op) else ()
        case "stablehlo.reduce_window":
            return tuple(_of_reduce_window(op)) if len(op.results) == 1 else ()
        case "stablehlo.pad":
            low, interior = (_ints(op, name, 0) for name in ("edge_padding_low", "interior_padding"))
            return tuple(_of_rows(op, [1] * len(low), [1 + each for each in interior], low))
        case "stablehlo.slice":
            starts, strides = (_ints(op, name, 0) for name in ("start_indices", "strides"))
            return tuple(_of_rows(op, strides, [1] * len(starts), [-start for start in starts]))
        case _:
            return ()


def product_dims(op: ir.Operation) -> frozenset[int]:
    """The spatial dims of a convolution's image that are as those of a product."""
    if op.name != "stablehlo.convolution":
        return frozenset()
    numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    dims = numbers.input_spatial_dimensions
    return frozenset(dim for at, dim in enumerate(dims) if _is_product_dim(op, numbers, at))


def windowed_dims(op: ir.Operation) -> frozenset[int]:
    """Dims of the first operand that are read through a window or with an offset."""
    if op.name == "stablehlo.convolution":
        numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
        return frozenset(numbers.input_spatial_dimensions) - product_dims(op)
    if op.name not in _ROW_BY_ROW:
        return frozenset()
    shape, made = value_shape(op.operands[0]), value_shape(op.results[0])
    sizes, strides = (_ints(op, name, len(shape)) for name in ("window_dimensions", "window_strides"))
    low = _ints(op, "edge_padding_low", 0) if op.name == "stablehlo.pad" else _padding(op, len(shape))
    windows = zip(sizes, strides, low, made, shape, strict=True)
    return frozenset(dim for dim, (*window, size) in enumerate(windows) if window != [1, 1, 0, size])


def non_overlapping_dims(op: ir.Operation) -> frozenset[int]:
    """The dims with non-overlapping windows of a ``select_and_scatter``, without gaps or padding."""
    if op.name != "stablehlo.select_and_scatter":
        return frozenset()
    shape, windows = value_shape(op.operands[0]), value_shape(op.operands[1])
    sizes, strides = (_ints(op, name, len(shape)) for name in ("window_dimensions", "window_strides"))
    padding = _padding(op, len(shape))
    return frozenset(
        dim for dim, size in enumerate(shape)
        if padding[dim] == 0 and sizes[dim] == strides[dim] and windows[dim] * sizes[dim] == size
    )  # fmt: skip


def _of_convolution(op: ir.Operation) -> Iterator[Halo]:
    numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    image, kernel, made = (value_shape(value) for value in (*op.operands, op.results[0]))
    nbytes, count = _element_bytes(op.operands[0]), len(numbers.input_spatial_dimensions)
    strides, dilations, windows = (
        _ints(op, name, count) for name in ("window_strides", "lhs_dilation", "rhs_dilation")
    )
    padding = _padding(op, count)
    kinds = numbers.input_spatial_dimensions, numbers.kernel_spatial_dimensions, numbers.output_spatial_dimensions
    dims = zip(*kinds, strict=True)
    for at, (dim, inside, out) in enumerate(dims):
        if _is_product_dim(op, numbers, at):
            continue
        yield Halo(
            operand=0, dim=dim, partner=None, partner_dim=out, shape=image, element_bytes=nbytes,
            advance=strides[at] * made[out], overlap=1 + (kernel[inside] - 1) * windows[at] - strides[at],
            padding=padding[at], dilation=dilations[at],
        )  # fmt: skip
        if dilations[at] == 1 and not _reverses(op):
            yield Halo(
                operand=0, dim=dim, partner=1, partner_dim=inside, shape=image, element_bytes=nbytes,
                advance=kernel[inside] * windows[at], overlap=(made[out] - 1) * strides[at] - (windows[at] - 1),
                padding=padding[at],
            )  # fmt: skip


def _is_product_dim(op: ir.Operation, numbers: stablehlo.ConvDimensionNumbers, at: int) -> bool:
    """Whether a spatial dim is one of a product: windows of one row, or one window of all."""
    image, kernel = (value_shape(value) for value in op.operands)
    size, inside = image[numbers.input_spatial_dimensions[at]], kernel[numbers.kernel_spatial_dimensions[at]]
    made = value_shape(op.results[0])[numbers.output_spatial_dimensions[at]]
    count = len(numbers.input_spatial_dimensions)
    names = ("window_strides", "lhs_dilation", "rhs_dilation")
    if _padding(op, count)[at] or _reverses(op) or any(_ints(op, name, count)[at] != 1 for name in names):
        return False
    return (inside, made) in ((1, size), (size, 1))


def _of_reduce_window(op: ir.Operation) -> Iterator[Halo]:
    count = len(value_shape(op.results[0]))
    names = ("window_dimensions", "window_strides", "base_dilations", "window_dilations")
    sizes, strides, dilations, windows = (_ints(op, name, count) for name in names)
    overlaps = [1 + (size - 1) * window - stride for size, window, stride in zip(sizes, windows, strides, strict=True)]
    return _of_rows(op, strides, dilations, _padding(op, count), overlaps)


def _of_rows(
    op: ir.Operation,
    strides: Sequence[int],
    dilations: Sequence[int],
    padding: Sequence[int],
    overlaps: Sequence[int] | None = None,
) -> Iterator[Halo]:
    """The halos of an op that makes each dim of the result of the same dim of its first operand."""
    shape, made = value_shape(op.operands[0]), value_shape(op.results[0])
    for dim in sorted(windowed_dims(op)):
        yield Halo(
            operand=0, dim=dim, partner=None, partner_dim=dim, shape=shape, element_bytes=_element_bytes(op.operands[0]),
            advance=strides[dim] * made[dim], overlap=overlaps[dim] if overlaps is not None else 1 - strides[dim],
            padding=padding[dim], dilation=dilations[dim],
        )  # fmt: skip


def _element_bytes(value: ir.Value) -> int:
    return element_bytes(ir.RankedTensorType(value.type).element_type)


def _ints(op: ir.Operation, name: str, count: int) -> list[int]:
    return list(ir.DenseI64ArrayAttr(op.attributes[name])) if name in op.attributes else [1] * count


def _padding(op: ir.Operation, count: int) -> list[int]:
    """In front of each dim."""
    if "padding" not in op.attributes:
        return [0] * count
    values = [int(value) for value in ir.DenseIntElementsAttr(op.attributes["padding"])]
    return values[::2] if len(values) == 2 * count else values * count


def _reverses(op: ir.Operation) -> bool:
    return "window_reversal" in op.attributes and any(ir.DenseBoolArrayAttr(op.attributes["window_reversal"]))


def _has_groups(op: ir.Operation) -> bool:
    names = ("feature_group_count", "batch_group_count")
    return any(ir.IntegerAttr(op.attributes[name]).value != 1 for name in names)
