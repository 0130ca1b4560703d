"""Ops whose devices keep parts of a sum: each part is a row of a larger tensor, cut over the axes along which they differ.

A sum over a dim that is cut goes over the pieces of the dim apart from each other: the dim is split in two, and the first
one, of as many rows as there are pieces, stays. So the parts are plain StableHLO, which any partitioner leaves where they
are, and they are added up by an op like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.passes.ir.builders import splat
from bactrian.passes.ir.regions import set_operand
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.sharding.deferred_reductions import splat_of
from bactrian.passes.sharding.reshard_paths import Layout, parts_of_sum
from bactrian.passes.sharding.strategies import Strategy

Annotation = Callable[[Layout], ir.Attribute]
_SHARDING = "sdy.sharding"
_RANKED = (
    "operand_layouts",
    "result_layouts",
)  # orders of dims in memory, which mean nothing to a call that is not made


class PartsOfSums:
    """Rewrites ops, in their places.

    Args:
        mesh: the devices.
        annotation: of a layout its ``#sdy.sharding``.
        place: of an op the attributes of those that are written beside it.
    """

    def __init__(
        self, mesh: Mesh, annotation: Annotation, place: Callable[[ir.Operation], dict[str, ir.Attribute]]
    ) -> None:
        self._mesh, self._annotation, self._place = mesh, annotation, place

    def rewrite(self, op: ir.Operation, strategy: Strategy) -> None:
        """Let an op give the parts of its sum. Its operands are there as the strategy wants them."""
        rank = len(ir.RankedTensorType(op.results[0].type).shape)
        axes = parts_of_sum(strategy.results[0], rank)
        front = [self._mesh.axes[axis].size for axis in axes]
        count = len(axes)
        match op.name:
            case "stablehlo.dot_general":
                self._product(op, strategy, axes)
            case "stablehlo.reduce":
                self._split(op, 0, strategy, axes)
                dims = ir.DenseI64ArrayAttr(op.attributes["dimensions"])
                op.attributes["dimensions"] = ir.DenseI64ArrayAttr.get([dim + count for dim in dims])
            case "stablehlo.scatter":
                self._scatter(op, strategy, axes)
            case "stablehlo.transpose":
                order = ir.DenseI64ArrayAttr(op.attributes["permutation"])
                moved = [*range(count), *(dim + count for dim in order)]
                op.attributes["permutation"] = ir.DenseI64ArrayAttr.get(moved)
            case _:
                pass  # position by position, or a reshape, which has no attributes
        op.results[0].set_type(_with_front(op.results[0].type, front))

    def follow(self, result: ir.Value, layout: Layout) -> None:
        """Give what an op hands on the type of its parts."""
        rank = len(ir.RankedTensorType(result.type).shape)
        axes = parts_of_sum(layout, rank)
        if axes:
            result.set_type(_with_front(result.type, [self._mesh.axes[axis].size for axis in axes]))
            attributes = _maker(result).attributes
            for name in _RANKED:
                if name in attributes:
                    del attributes[name]

    def constant(self, value: ir.Value, layout: Layout) -> ir.Value:
        """A constant with one number in all elements as a value that has parts."""
        type_, number = ir.RankedTensorType(value.type), splat_of(value)
        assert number is not None  # `deferred_sums` looked
        axes = parts_of_sum(layout, len(type_.shape))
        maker = _maker(value)
        wide = _with_front(type_, [self._mesh.axes[axis].size for axis in axes])
        elements = ir.DenseElementsAttr.get_splat(wide, number)
        with ir.InsertionPoint.after(maker), maker.location:
            made = ir.Operation.create(
                "stablehlo.constant", results=[wide], attributes={"value": elements, **self._place(maker)}
            ).results[0]
        _annotate(made, self._annotation(layout))
        return made

    def add_up(self, value: ir.Value, layout: Layout, count: int, reader: ir.Operation) -> ir.Value:
        """The sum over the first ``count`` dims, before ``reader``, in the layout that the parts have.

        Several dims become one first: of a sum over each XLA makes one all-reduce after the other.
        """
        type_ = ir.RankedTensorType(value.type)
        if count > 1:
            shape = [math.prod(type_.shape[:count]), *type_.shape[count:]]
            joined = (sum(layout[:count], ()), *layout[count:])
            with reader.location:
                value = self._made("stablehlo.reshape", value, type_, shape, joined, reader, {})
        total = ir.RankedTensorType.get(type_.shape[count:], type_.element_type)
        scalar = ir.RankedTensorType.get([], type_.element_type)
        place = self._place(reader)
        with reader.location:
            zero = splat(scalar, 0, place)
            _annotate(zero, self._annotation(()))
            op = ir.Operation.create(
                "stablehlo.reduce",
                results=[total],
                operands=[value, zero],
                attributes={"dimensions": ir.DenseI64ArrayAttr.get([0]), **place},
                regions=1,
            )
            block = op.regions[0].blocks.append(scalar, scalar)
            with ir.InsertionPoint(block):
                stablehlo.ReturnOp([stablehlo.AddOp(*block.arguments).result])
        _annotate(op.results[0], self._annotation(layout[count:]))
        return op.results[0]

    def _product(self, op: ir.Operation, strategy: Strategy, axes: Sequence[int]) -> None:
        count = len(axes)
        numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])

        def moved(dims: Sequence[int]) -> list[int]:
            return [dim + count for dim in dims]

        for position in (0, 1):
            self._split(op, position, strategy, axes)
        first = list(range(count))
        op.attributes["dot_dimension_numbers"] = stablehlo.DotDimensionNumbers.get(
            lhs_batching_dimensions=first + moved(numbers.lhs_batching_dimensions),
            rhs_batching_dimensions=first + moved(numbers.rhs_batching_dimensions),
            lhs_contracting_dimensions=moved(numbers.lhs_contracting_dimensions),
            rhs_contracting_dimensions=moved(numbers.rhs_contracting_dimensions),
        )

    def _scatter(self, op: ir.Operation, strategy: Strategy, axes: Sequence[int]) -> None:
        count = len(axes)
        fronts: Layout = tuple((axis,) for axis in axes)
        set_operand(op, 0, self.constant(_before_moves(op.operands[0]), (*fronts, *strategy.operands[0])))
        for position in (1, 2):
            self._split(op, position, strategy, axes)
        numbers = stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])

        def moved(dims: Sequence[int]) -> list[int]:
            return [dim + count for dim in dims]

        first = list(range(count))
        op.attributes["scatter_dimension_numbers"] = stablehlo.ScatterDimensionNumbers.get(
            update_window_dims=moved(numbers.update_window_dims),
            inserted_window_dims=moved(numbers.inserted_window_dims),
            input_batching_dims=first + moved(numbers.input_batching_dims),
            scatter_indices_batching_dims=first + moved(numbers.scatter_indices_batching_dims),
            scattered_dims_to_operand_dims=moved(numbers.scattered_dims_to_operand_dims),
            index_vector_dim=numbers.index_vector_dim + count,
        )

    def _split(self, op: ir.Operation, position: int, strategy: Strategy, axes: Sequence[int]) -> None:
        """Split the dims of an operand that are cut over ``axes``, and bring the pieces to the front."""
        value, layout = op.operands[position], strategy.operands[position]
        type_ = ir.RankedTensorType(value.type)
        shape, cuts, at = list[int](), list[tuple[int, ...]](), dict[int, int]()
        rest = list[int]()
        for size, cut in zip(type_.shape, layout, strict=True):
            mine = [axis for axis in cut if axis in axes]
            for axis in mine:
                at[axis] = len(shape)
                shape.append(self._mesh.axes[axis].size)
                cuts.append((axis,))
            rest.append(len(shape))
            shape.append(size // self._mesh.parts(mine))
            cuts.append(tuple(axis for axis in cut if axis not in axes))
        order = [at[axis] for axis in axes] + rest
        with ir.InsertionPoint(op), op.location:
            value = self._made("stablehlo.reshape", value, type_, shape, cuts, op, {})
            if order != sorted(order):
                permutation = {"permutation": ir.DenseI64ArrayAttr.get(order)}
                shape, cuts = [shape[dim] for dim in order], [cuts[dim] for dim in order]
                value = self._made("stablehlo.transpose", value, type_, shape, cuts, op, permutation)
        set_operand(op, position, value)

    def _made(
        self,
        name: str,
        value: ir.Value,
        type_: ir.RankedTensorType,
        shape: Sequence[int],
        layout: Sequence[tuple[int, ...]],
        beside: ir.Operation,
        attributes: Mapping[str, ir.Attribute],
    ) -> ir.Value:
        wide = ir.RankedTensorType.get(shape, type_.element_type)
        made = ir.Operation.create(
            name, results=[wide], operands=[value], attributes={**attributes, **self._place(beside)}
        ).results[0]
        _annotate(made, self._annotation(tuple(layout)))
        return made


def _before_moves(value: ir.Value) -> ir.Value:
    while (op := _maker(value)).name == "sdy.reshard":
        value = op.operands[0]
    return value


def _maker(value: ir.Value) -> ir.Operation:
    return ir.OpResult(value).owner.operation


def _with_front(type_: ir.Type, front: Sequence[int]) -> ir.Type:
    tensor = ir.RankedTensorType(type_)
    return ir.RankedTensorType.get([*front, *tensor.shape], tensor.element_type)


def _annotate(value: ir.Value, sharding: ir.Attribute) -> None:
    _maker(value).attributes[_SHARDING] = sdy.TensorShardingPerValueAttr.get([sharding])
