"""``fold-reversals``: convolutions with reversed kernels reverse their windows instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.regions import erase_dead, main_function, nested_operations, set_operand

_REVERSAL = "window_reversal"


@dataclass(frozen=True)
class FoldReversals(Pass):
    """Let a convolution read its kernel as it is, and reverse its windows, where it would read a reversed kernel.

    The gradient of a convolution's image is a convolution with the kernel reversed along its spatial dims. A reversed kernel
    is another value: where kernels are sharded, devices would gather both. So one gather serves forward and backward. XLA
    folds reversals alike, after it has been told what to gather.

    Requires: one flat function `@main`.
    Ensures: no convolution reads what reverses spatial dims of a kernel only.

    Input:

    ```mlir
    func.func public @main(%x: tensor<1x8x2xf32>, %k: tensor<3x2x2xf32>) -> tensor<1x6x2xf32> {
      %r = stablehlo.reverse %k, dims = [0] : tensor<3x2x2xf32>
      %y = stablehlo.convolution(%x, %r) dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f], window = {} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x2xf32>, tensor<3x2x2xf32>) -> tensor<1x6x2xf32>
      return %y : tensor<1x6x2xf32>
    }
    ```

    Output:

    ```mlir
    func.func public @main(%arg0: tensor<1x8x2xf32>, %arg1: tensor<3x2x2xf32>) -> tensor<1x6x2xf32> {
      %0 = stablehlo.convolution(%arg0, %arg1) dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f], window = {reverse = [true]} {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x2xf32>, tensor<3x2x2xf32>) -> tensor<1x6x2xf32>
      return %0 : tensor<1x6x2xf32>
    }
    ```
    """

    name: ClassVar[str] = "fold-reversals"
    summary: ClassVar[str] = "let convolutions reverse their windows instead of their kernels"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat")
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("folded", "kernels that are read as they are"),)

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Fold, and erase reversals that nobody reads any more."""
        reversals = list[ir.Operation]()
        for op in nested_operations(main_function(module)):
            if op.name != "stablehlo.convolution" or isinstance(op.operands[1].owner, ir.Block):
                continue
            reversal = op.operands[1].owner.operation
            if reversal.name == "stablehlo.reverse" and _fold(op, reversal):
                reversals.append(reversal)
                ctx.count("folded")
        erase_dead(reversals)


def _fold(op: ir.Operation, reversal: ir.Operation) -> bool:
    """Make a convolution read the operand of a reversal, if that reverses spatial dims of the kernel only."""
    spatial = list(stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"]).kernel_spatial_dimensions)
    reversed_ = set(ir.DenseI64ArrayAttr(reversal.attributes["dimensions"]))
    if not reversed_ <= set(spatial):
        return False
    before = [False] * len(spatial)
    if _REVERSAL in op.attributes:
        before = list(ir.DenseBoolArrayAttr(op.attributes[_REVERSAL]))
    after = [present != (dim in reversed_) for dim, present in zip(spatial, before, strict=True)]
    op.attributes[_REVERSAL] = ir.DenseBoolArrayAttr.get(after)
    set_operand(op, 1, reversal.operands[0])
    return True
