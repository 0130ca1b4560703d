"""What a StableHLO op costs: floating-point operations and bytes moved.

Operations count two per multiply-add; bytes are what an unfused op reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.op_traits import NO_FLOPS, NO_READ_TRAFFIC, NO_TRAFFIC, POLYNOMIAL_FLOPS
from bactrian.passes.machine.device import OpCost

_POLYNOMIAL_FLOPS = 8  # about what a vectorized polynomial costs; XLA's own estimate on CPU is of that size


@dataclass(frozen=True, slots=True)
class TensorSize:
    """Elements, bytes and element type of one tensor type."""

    elements: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]


_UNKNOWN = OpCost(0.0, 0.0, "f32")


@dataclass
class CostModel:
    """Costs of ops, with the sizes of types remembered (a train step has a few hundred types for 20,000 ops).

    Args:
        unknown_trip_count: how often the body of a ``while`` runs when the IR does not say.
    """

    unknown_trip_count: int = 1
    _sizes: dict[ir.Type, TensorSize] = field(default_factory=dict[ir.Type, TensorSize], repr=False)

    def size(self, type_: ir.Type) -> TensorSize:
        """Size of a statically shaped tensor type; zero for tokens and for tensors with a dynamic dim."""
        known = self._sizes.get(type_)
        if known is None:
            known = self._sizes[type_] = tensor_size(type_)
        return known

    def size_of(self, value: ir.Value) -> TensorSize:
        """Size of a value."""
        return self.size(value.type)

    def cost(self, op: ir.Operation) -> OpCost:
        """Flops and bytes of one op, ops in its regions included."""
        results = op.results
        if not len(results):
            return _UNKNOWN
        first = self.size_of(results[0])
        name = op.name
        if name in NO_TRAFFIC:
            return OpCost(0.0, 0.0, first.dtype)
        if len(op.regions) and name in _CONTROL_FLOW:
            return _CONTROL_FLOW[name](self, op)
        operands = [self.size_of(value) for value in op.operands]
        written = first.bytes if len(results) == 1 else sum(self.size_of(value).bytes for value in results)
        traffic = float(written + sum(operand.bytes for operand in operands))
        if name in _SPECIAL:
            flops, traffic, dtype = _SPECIAL[name](op, operands, first, traffic)
            return OpCost(flops, traffic, dtype)
        if name in NO_FLOPS:
            return OpCost(0.0, traffic if name not in NO_READ_TRAFFIC else float(written), first.dtype)
        per_element = _POLYNOMIAL_FLOPS if name in POLYNOMIAL_FLOPS else 1
        return OpCost(float(per_element * first.elements), traffic, first.dtype)

    def flops(self, op: ir.Operation) -> float:
        """Flops of one op."""
        return self.cost(op).flops

    def result_bytes(self, op: ir.Operation) -> list[int]:
        """Bytes of each result of an op."""
        return [self.size_of(value).bytes for value in op.results]

    def block_cost(self, block: ir.Block) -> OpCost:
        """Sum over the ops of a block."""
        total = _UNKNOWN
        for op in block.operations:
            total = total + self.cost(op.operation)
        return total

    def while_cost(self, op: ir.Operation) -> OpCost:
        """Condition and body times the trip count."""
        once = self.block_cost(op.regions[0].blocks[0]) + self.block_cost(op.regions[1].blocks[0])
        return once.times(trip_count(op) or self.unknown_trip_count)

    def branch_cost(self, op: ir.Operation) -> OpCost:
        """The most expensive branch of a ``case`` or ``if``."""
        branches = [self.block_cost(region.blocks[0]) for region in op.regions]
        return max(branches, key=lambda cost: (cost.flops, cost.bytes))

    def inline_cost(self, op: ir.Operation) -> OpCost:
        """A region that runs once: a composite or a named computation."""
        return self.block_cost(op.regions[0].blocks[0])


_CONTROL_FLOW: dict[str, Callable[[CostModel, ir.Operation], OpCost]] = {
    "stablehlo.while": CostModel.while_cost,
    "stablehlo.case": CostModel.branch_cost,
    "stablehlo.if": CostModel.branch_cost,
    "sdy.named_computation": CostModel.inline_cost,
}


def element_bytes(element: ir.Type) -> int:
    """Bytes of one element; sub-byte types take one byte, as XLA stores them on CPU."""
    if isinstance(element, ir.ComplexType):
        return 2 * element_bytes(element.element_type)
    return max(1, int(getattr(element, "width", 8)) // 8)


def tensor_size(type_: ir.Type) -> TensorSize:
    """Size of a type, without a cache."""
    if not isinstance(type_, ir.RankedTensorType) or not type_.has_static_shape:
        return TensorSize(0, 0, "none", ())
    shape = tuple(type_.shape)
    elements = math.prod(shape)
    return TensorSize(elements, elements * element_bytes(type_.element_type), str(type_.element_type), shape)


def trip_count(op: ir.Operation) -> int | None:
    """How often a counted ``while`` (as ``fori_loop`` and ``scan`` lower) runs, or None when the IR does not say.

    The pattern: the condition is ``compare LT, %counter, limit``, the counter starts at a constant and the body adds a
    constant to it.
    """
    condition, body = op.regions[0].blocks[0], op.regions[1].blocks[0]
    last = condition.operations[len(condition.operations) - 1].operation
    owner = last.operands[0].owner
    if isinstance(owner, ir.Block) or owner.operation.name != "stablehlo.compare":
        return None
    test = owner.operation
    if stablehlo.ComparisonDirectionAttr(test.attributes["comparison_direction"]).value != "LT":
        return None
    counter = next((n for n, argument in enumerate(condition.arguments) if argument == test.operands[0]), None)
    limit = _scalar(test.operands[1], op, condition)
    if counter is None or limit is None:
        return None
    start = _scalar(op.operands[counter], op, None)
    step_op = body.operations[len(body.operations) - 1].operation.operands[counter].owner
    if isinstance(step_op, ir.Block) or step_op.operation.name != "stablehlo.add":
        return None
    if step_op.operation.operands[0] != body.arguments[counter]:
        return None
    step = _scalar(step_op.operands[1], op, body)
    if start is None or not step or step < 0:
        return None
    return max(0, -((start - limit) // step))


def _scalar(value: ir.Value, loop: ir.Operation, block: ir.Block | None) -> int | None:
    """The integer that a value is known to hold; arguments of ``loop``'s blocks are looked up in its operands."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        if block is None or owner != block:
            return None
        number = ir.BlockArgument(value).arg_number
        returned = loop.regions[1].blocks[0].operations
        end = returned[len(returned) - 1].operation
        unchanged = end.operands[number] == loop.regions[1].blocks[0].arguments[number]
        return _scalar(loop.operands[number], loop, None) if unchanged else None
    if owner.operation.name != "stablehlo.constant":
        return None
    attribute = owner.operation.attributes["value"]
    if not isinstance(attribute, ir.DenseIntElementsAttr):
        return None
    return int(attribute[0])


# Each takes (op, operand sizes, first result's size, bytes of all operands and results) and gives
# (flops, bytes, element type).
_Special = Callable[[ir.Operation, list[TensorSize], TensorSize, float], tuple[float, float, str]]


def _dot_general(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """``[8,16] x [16,4]``: 2 * 8*4 * 16 = 1,024 flops."""
    dims = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    contracted = math.prod(operands[0].shape[dim] for dim in dims.lhs_contracting_dimensions)
    return 2.0 * result.elements * contracted, traffic, operands[0].dtype


def repacks(op: ir.Operation) -> bool:
    """Whether an op is a matrix product that sums over the rows of its left operand, as one for a weight's gradient.

    On CPUs both of its operands are brought into another order first, which takes time by their bytes, whatever the
    product takes. ``[512,128] x [512,256]`` over dims 0 and 0: yes; over ``[128,512] x [512,256]``: no. Batches of
    products are mostly small and left out.
    """
    if op.name != "stablehlo.dot_general":
        return False
    dims = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    if list(dims.lhs_batching_dimensions):
        return False
    contracted = sorted(dims.lhs_contracting_dimensions)
    rank = ir.RankedTensorType(op.operands[0].type).rank
    return 0 < len(contracted) < rank and contracted != list(range(rank - len(contracted), rank))


def _dot(op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float) -> tuple[float, float, str]:
    contracted = operands[0].shape[-1] if operands[0].shape else 1
    return 2.0 * result.elements * contracted, traffic, operands[0].dtype


def _convolution(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """Each output element: two flops per kernel element of one output feature (padding counted as work)."""
    dims = stablehlo.ConvDimensionNumbers(op.attributes["dimension_numbers"])
    features = operands[1].shape[dims.kernel_output_feature_dimension]
    dilation = 1
    if "lhs_dilation" in op.attributes:  # zeros between the inputs are not multiplied
        dilation = math.prod(ir.DenseI64ArrayAttr(op.attributes["lhs_dilation"]))
    return 2.0 * result.elements * operands[1].elements / max(1, features * dilation), traffic, operands[0].dtype


def _reduce(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """One application of the body per input element."""
    inputs = operands[: len(operands) // 2]
    return float(sum(size.elements for size in inputs)), traffic, inputs[0].dtype if inputs else result.dtype


def _reduce_window(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """One application per element of each window; a cumulative sum is counted as the linear scan that XLA makes."""
    window = tuple(ir.DenseI64ArrayAttr(op.attributes["window_dimensions"]))
    long = any(size == dim and size > 1 for size, dim in zip(window, operands[0].shape, strict=True))
    same_shape = result.shape == operands[0].shape
    if long and same_shape:
        return 2.0 * result.elements, traffic, result.dtype
    return float(result.elements * math.prod(window)), traffic, result.dtype


def _gather(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """Reads what it returns, not the whole operand."""
    indices = sum(size.bytes for size in operands[1:])
    return 0.0, float(2 * result.bytes + indices), result.dtype


def _scatter(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """One application per update element; the operand is copied."""
    updates = operands[len(op.results) + 1 :]
    return float(sum(size.elements for size in updates)), traffic, result.dtype


def _dynamic_update_slice(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """In place: the update is read and written."""
    return 0.0, 2.0 * operands[1].bytes, result.dtype


def _select_and_scatter(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """Every window looks for its element, and adds one update."""
    attributes = op.attributes
    given = "window_dimensions" in attributes
    window = math.prod(ir.DenseI64ArrayAttr(attributes["window_dimensions"])) if given else 1
    return float(operands[1].elements * (window + 1)), traffic, result.dtype


def _sort(op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float) -> tuple[float, float, str]:
    """n log2 n comparisons along the sorted dim."""
    length = operands[0].shape[ir.IntegerAttr(op.attributes["dimension"]).value] if operands[0].shape else 1
    return float(operands[0].elements * math.ceil(math.log2(max(2, length)))), traffic, result.dtype


def _fft(op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float) -> tuple[float, float, str]:
    """5 n log2 n, the usual count for a complex transform."""
    length = max(2, math.prod(ir.DenseI64ArrayAttr(op.attributes["fft_length"])))
    return 5.0 * max(operands[0].elements, result.elements) * math.log2(length), traffic, result.dtype


def _triangular(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """Cholesky n^3/3; triangular solve n^2 per right-hand side: both ``result elements * n`` up to a constant."""
    rows = operands[0].shape[-1] if operands[0].shape else 1
    share = 1 / 3 if op.name == "stablehlo.cholesky" else 1.0
    return share * result.elements * rows, traffic, result.dtype


def _custom_call(
    op: ir.Operation, operands: list[TensorSize], result: TensorSize, traffic: float
) -> tuple[float, float, str]:
    """Markers are free; what a kernel does is not in the IR, so its traffic stands for it."""
    target = ir.StringAttr(op.attributes["call_target_name"]).value
    if target.startswith("bactrian.") or target in ("Sharding", "annotate_device_placement"):
        return 0.0, 0.0, result.dtype
    return float(result.elements), traffic, result.dtype


_SPECIAL: dict[str, _Special] = {
    "stablehlo.cholesky": _triangular,
    "stablehlo.convolution": _convolution,
    "stablehlo.custom_call": _custom_call,
    "stablehlo.dot": _dot,
    "stablehlo.dot_general": _dot_general,
    "stablehlo.dynamic_slice": _gather,
    "stablehlo.dynamic_update_slice": _dynamic_update_slice,
    "stablehlo.fft": _fft,
    "stablehlo.gather": _gather,
    "stablehlo.reduce": _reduce,
    "stablehlo.reduce_window": _reduce_window,
    "stablehlo.scatter": _scatter,
    "stablehlo.select_and_scatter": _select_and_scatter,
    "stablehlo.slice": _gather,
    "stablehlo.sort": _sort,
    "stablehlo.triangular_solve": _triangular,
}
