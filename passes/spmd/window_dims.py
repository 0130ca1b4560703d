"""Windows over the dims of an op's first operand, as its attributes say them, and their halos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.constants import splat_text
from bactrian.passes.ir.op_costs import element_bytes
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.halo import Halo


@dataclass(frozen=True)
class Window:
    """The windows over a dim.

    Attributes:
        size: rows of one.
        stride: from one to the next.
        low, high: padding in front of and behind the dim.
        base_dilation: of the dim: one more than the gap between two rows.
        window_dilation: of the window.
        fill: as in `Halo`.
    """

    size: int = 1
    stride: int = 1
    low: int = 0
    high: int = 0
    base_dilation: int = 1
    window_dilation: int = 1
    fill: str | None = "zeros"

    @property
    def is_padded(self) -> bool:
        """Whether windows reach beyond the dim."""
        return self.low > 0 or self.high > 0

    def halo(self, value: ir.Value, operand: int, dim: int, count: int) -> Halo:
        """Where a dim is sharded as its windows are.

        Args:
            value: of which the dim is.
            operand: its number.
            dim: of it.
            count: windows.
        """
        overlap = 1 + (self.size - 1) * self.window_dilation - self.stride
        return self._halo(value, operand, dim, count * self.stride, overlap)

    def halo_of_kernel(self, value: ir.Value, operand: int, dim: int, count: int) -> Halo:
        """Where a dim is sharded as the rows of one window are: all devices have a part of all windows."""
        overlap = 1 + (count - 1) * self.stride - self.window_dilation
        return self._halo(value, operand, dim, self.size * self.window_dilation, overlap)

    def _halo(self, value: ir.Value, operand: int, dim: int, advance: int, overlap: int) -> Halo:
        nbytes = element_bytes(ir.RankedTensorType(value.type).element_type)
        return Halo(operand, dim, value_shape(value), nbytes, advance, overlap, self.low, self.base_dilation, self.fill)


def windows_of(op: ir.Operation) -> list[Window]:
    """The windows of an op, for each dim of its first operand, or each spatial dim of a convolution.

    Args:
        op: a slice, a pad, a convolution, or one with window_dimensions.
    """
    count = len(value_shape(op.operands[0]))
    if op.name == "stablehlo.slice":
        starts, strides = (ints(op, name, count) for name in ("start_indices", "strides"))
        return [Window(stride=stride, low=-start) for start, stride in zip(starts, strides, strict=True)]
    if op.name == "stablehlo.pad":
        edges = [ints(op, name, count) for name in ("edge_padding_low", "edge_padding_high", "interior_padding")]
        fill = splat_text(op.operands[1])
        return [Window(1, 1, low, high, 1 + gap, fill=fill) for low, high, gap in zip(*edges, strict=True)]
    if op.name == "stablehlo.convolution":
        numbers = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
        kernel = value_shape(op.operands[1])
        sizes, names = [kernel[dim] for dim in numbers.kernel_spatial_dimensions], ("lhs_dilation", "rhs_dilation")
    else:
        sizes, names = ints(op, "window_dimensions", count), ("base_dilations", "window_dilations")
    strides, *dilations = (ints(op, name, len(sizes)) for name in ("window_strides", *names))
    lows, highs = zip(*paddings(op, len(sizes)), strict=True) if sizes else ((), ())
    return [Window(*each) for each in zip(sizes, strides, lows, highs, *dilations, strict=True)]


def paddings(op: ir.Operation, count: int) -> list[tuple[int, int]]:
    """The ``padding`` of an op, in front of and behind each of ``count`` dims."""
    if "padding" not in op.attributes:
        return [(0, 0)] * count
    values = [int(value) for value in ir.DenseIntElementsAttr(op.attributes["padding"])]
    values = values if len(values) == 2 * count else values * count
    return list(zip(values[::2], values[1::2], strict=True))


def padding_attribute(padding: Sequence[tuple[int, int]]) -> ir.Attribute:
    """The attribute that `paddings` reads."""
    return ir.DenseElementsAttr.get(cast(Any, np.array(padding, dtype=np.int64).reshape(-1, 2)))


def ints(op: ir.Operation, name: str, count: int) -> list[int]:
    """An array of an op; ``count`` ones where it is left out."""
    return list(ir.DenseI64ArrayAttr(op.attributes[name])) if name in op.attributes else [1] * count


def ones(sizes: Sequence[int]) -> frozenset[int]:
    """Factors that no axis can shard."""
    return frozenset(factor for factor, size in enumerate(sizes) if size <= 1)
