"""Ops whose results are left unreduced: each partial sum is a row of a larger tensor, sharded over the unreduced axes.

A sum over a sharded dim goes over each shard by itself: the dim is split in two, and the first one, of as many rows as
there are shards, stays. So partial sums are plain StableHLO, which any partitioner leaves where they are, and they are
added up by an op like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from bactrian.passes.ir.builders import splat
from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.regions import set_operand
from bactrian.passes.machine.mesh import Mesh
from bactrian.passes.machine.spec import Spec
from bactrian.passes.sharding.strategies import Strategy

Annotation = Callable[[Spec], ir.Attribute]
_SHARDING = "sdy.sharding"
_RANKED = (
    "operand_layouts",
    "result_layouts",
)  # orders of dims in memory, which mean nothing to a call that is not made


def stacked(spec: Spec) -> Spec:
    """The spec of the larger tensor that holds the partial sums: in front a dim for each unreduced axis, sharded over
    it.

    >>> stacked(Spec((("model",), ()), unreduced=("data",)))
    Spec(dims=(('data',), ('model',), ()), unreduced=())
    """
    return Spec((*((axis,) for axis in spec.unreduced), *spec.dims))


class PartialSums:
    """Rewrites ops, in their places.

    Args:
        mesh: the devices.
        annotation: of a spec its ``#sdy.sharding``.
        place: of an op the attributes of those that are written beside it.
    """

    def __init__(
        self, mesh: Mesh, annotation: Annotation, place: Callable[[ir.Operation], dict[str, ir.Attribute]]
    ) -> None:
        self._mesh, self._annotation, self._place = mesh, annotation, place

    def rewrite(self, op: ir.Operation, strategy: Strategy) -> None:
        """Let an op give partial sums. Its operands are there as the strategy wants them."""
        axes = strategy.results[0].unreduced
        front = [self._mesh.sizes[axis] for axis in axes]
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

    def follow(self, result: ir.Value, spec: Spec) -> None:
        """Give what an op forwards the type of its partial sums."""
        if spec.unreduced:
            result.set_type(_with_front(result.type, [self._mesh.sizes[axis] for axis in spec.unreduced]))
            attributes = _maker(result).attributes
            for name in _RANKED:
                if name in attributes:
                    del attributes[name]

    def constant(self, value: ir.Value, spec: Spec) -> ir.Value:
        """A constant with one number in all elements as an unreduced value."""
        type_, number = ir.RankedTensorType(value.type), splat_of(value)
        assert number is not None  # `deferred_sums` looked
        maker = _maker(value)
        wide = _with_front(type_, [self._mesh.sizes[axis] for axis in spec.unreduced])
        elements = ir.DenseElementsAttr.get_splat(wide, number)
        with ir.InsertionPoint.after(maker), maker.location:
            made = ir.Operation.create(
                "stablehlo.constant", results=[wide], attributes={"value": elements, **self._place(maker)}
            ).results[0]
        _annotate(made, self._annotation(stacked(spec)))
        return made

    def add_up(self, value: ir.Value, spec: Spec, reader: ir.Operation) -> ir.Value:
        """The sum of an unreduced value's partial sums, before ``reader``, with its dims sharded as they are.

        Several dims become one first: of a sum over each XLA makes one all-reduce after the other.
        """
        type_, count = ir.RankedTensorType(value.type), len(spec.unreduced)
        if count > 1:
            shape = [math.prod(type_.shape[:count]), *type_.shape[count:]]
            joined = Spec((spec.unreduced, *spec.dims))
            with reader.location:
                value = self._made("stablehlo.reshape", value, type_, shape, joined, reader, {})
        total = ir.RankedTensorType.get(type_.shape[count:], type_.element_type)
        scalar = ir.RankedTensorType.get([], type_.element_type)
        place = self._place(reader)
        with reader.location:
            zero = splat(scalar, 0, place)
            _annotate(zero, self._annotation(Spec()))
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
        _annotate(op.results[0], self._annotation(Spec(spec.dims)))
        return op.results[0]

    def _product(self, op: ir.Operation, strategy: Strategy, axes: tuple[str, ...]) -> None:
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

    def _scatter(self, op: ir.Operation, strategy: Strategy, axes: tuple[str, ...]) -> None:
        count = len(axes)
        zeros = replace(strategy.operands[0], unreduced=axes)
        set_operand(op, 0, self.constant(_before_reshards(op.operands[0]), zeros))
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

    def _split(self, op: ir.Operation, position: int, strategy: Strategy, axes: tuple[str, ...]) -> None:
        """Split the dims of an operand that are sharded over ``axes``, and bring the shards to the front."""
        value, spec = op.operands[position], strategy.operands[position]
        type_ = ir.RankedTensorType(value.type)
        shape, dims, at = list[int](), list[tuple[str, ...]](), dict[str, int]()
        rest = list[int]()
        for size, present in zip(type_.shape, spec.dims, strict=True):
            mine = [axis for axis in present if axis in axes]
            for axis in mine:
                at[axis] = len(shape)
                shape.append(self._mesh.sizes[axis])
                dims.append((axis,))
            rest.append(len(shape))
            shape.append(size // self._mesh.group_size(mine))
            dims.append(tuple(axis for axis in present if axis not in axes))
        order = [at[axis] for axis in axes] + rest
        with ir.InsertionPoint(op), op.location:
            value = self._made("stablehlo.reshape", value, type_, shape, Spec(tuple(dims)), op, {})
            if order != sorted(order):
                permutation = {"permutation": ir.DenseI64ArrayAttr.get(order)}
                shape, dims = [shape[dim] for dim in order], [dims[dim] for dim in order]
                value = self._made("stablehlo.transpose", value, type_, shape, Spec(tuple(dims)), op, permutation)
        set_operand(op, position, value)

    def _made(
        self,
        name: str,
        value: ir.Value,
        type_: ir.RankedTensorType,
        shape: Sequence[int],
        spec: Spec,
        beside: ir.Operation,
        attributes: Mapping[str, ir.Attribute],
    ) -> ir.Value:
        wide = ir.RankedTensorType.get(shape, type_.element_type)
        made = ir.Operation.create(
            name, results=[wide], operands=[value], attributes={**attributes, **self._place(beside)}
        ).results[0]
        _annotate(made, self._annotation(spec))
        return made


def _before_reshards(value: ir.Value) -> ir.Value:
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
