"""Gathers and scatters.

Dims that windows cover, batching dims and dims of the indices are sharded as they are. A dim that is indexed row by row can
be sharded too: each device takes or changes the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.builders import binary, chosen, compared, empty_sum, identity_of, splat, spread
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.spmd.bit_sums import sum_of_bits
from bactrian.passes.spmd.forms.shard_reductions import IDEMPOTENT, combining_of, fold_of, over_devices
from bactrian.passes.spmd.forms.starts import row_of_shard, widened, within
from bactrian.passes.spmd.local_op import LocalOp
from bactrian.passes.spmd.sharding_rules import Dims, Rule


@dataclass(frozen=True)
class Indexing:
    """How windows of an operand are found.

    Attributes:
        windows: the size of a window along each dim of the operand.
        indexed: the dim that each component of an index is of.
        batching: dims of the operand that are also dims of the indices, and these.
        vector_dim: the dim of the indices along which components are.
    """

    windows: tuple[int, ...]
    indexed: tuple[int, ...]
    batching: tuple[tuple[int, int], ...]
    vector_dim: int

    def shardable(self, shape: Sequence[int]) -> set[int]:
        """Dims of the operand, of a shape, that can be sharded."""
        whole = {dim for dim, size in enumerate(shape) if self.windows[dim] == size}
        return whole | {dim for dim, _ in self.batching} | {dim for dim in self.indexed if self.windows[dim] == 1}


def gather_indexing(op: ir.Operation) -> Indexing:
    """Of a ``gather``."""
    numbers = stablehlo.GatherDimensionNumbers(op.attributes["dimension_numbers"])
    return Indexing(
        windows=tuple(ir.DenseI64ArrayAttr(op.attributes["slice_sizes"])),
        indexed=tuple(numbers.start_index_map),
        batching=tuple(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)),
        vector_dim=numbers.index_vector_dim,
    )


def scatter_indexing(op: ir.Operation) -> Indexing:
    """Of a ``scatter``."""
    numbers = stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])
    rank, update = len(value_shape(op.operands[0])), value_shape(op.operands[-1])
    sizes = iter([update[dim] for dim in numbers.update_window_dims])
    of_one = {*numbers.inserted_window_dims, *numbers.input_batching_dims}
    return Indexing(
        windows=tuple(1 if dim in of_one else next(sizes) for dim in range(rank)),
        indexed=tuple(numbers.scattered_dims_to_operand_dims),
        batching=tuple(zip(numbers.input_batching_dims, numbers.scatter_indices_batching_dims, strict=True)),
        vector_dim=numbers.index_vector_dim,
    )


def narrow_gather(op: ir.Operation, rule: Rule) -> Rule:
    """Windows that are neither whole nor of one row would lie in several shards."""
    shape = value_shape(op.operands[0])
    whole = set(range(len(shape))) - gather_indexing(op).shardable(shape)
    return replace(rule, replicated=rule.replicated | _factors(rule.operands[0], whole))


def gather(local: LocalOp) -> Sequence[ir.Value]:
    """A device that has not the row of an index adds nothing to the result.

    XLA makes a slice of a gather of one window, merges it with slices of the result, and does not clamp it then (seen in
    jaxlib 0.10.2): here it is clamped.
    """
    indexing, (operand, indices) = gather_indexing(local.op), local.operands
    shape, dims = value_shape(local.op.operands[0]), local.reads[0].dims
    sizes = list(indexing.windows)
    for dim, axes in enumerate(dims):
        if sizes[dim] == shape[dim]:
            sizes[dim] //= local.devices.group_size(axes)
    attributes: dict[str, ir.Attribute] = {"slice_sizes": ir.DenseI64ArrayAttr.get(sizes)}
    cut = _sharded_components(local, indexing)
    if not indexing.indexed or not (cut or _is_one_window(indices, indexing)):
        return local.clone(attributes=attributes)
    starts, flags = _columns(indices, indexing), list[ir.Value]()
    for component, dim in enumerate(indexing.indexed):
        # StableHLO moves windows that reach beyond the dim to its end.
        start = within(starts[component], 0, shape[dim] - indexing.windows[dim])
        if component in cut and indexing.windows[dim] < shape[dim]:
            rows = value_shape(operand)[dim]
            start = row_of_shard(local, start, dims[dim], rows)
            flags += [compared(start, "GE", splat(start.type, 0)), compared(start, "LT", splat(start.type, rows))]
        starts[component] = start
    (made,) = local.clone([operand, _together(starts, indexing.vector_dim)], attributes | _unsorted())
    if not flags:
        return [made]
    is_own = _per_window(local, flags, indexing, made)
    return [sum_of_bits(made, lambda bits: chosen(is_own, bits, splat(bits.type, 0)), local.add_up)]


def narrow_scatter(op: ir.Operation, rule: Rule) -> Rule:
    """Updates can be sharded where devices can fold what each has made of its own.

    Where nothing is indexed, all is whole: XLA makes only the last update of an operand of one element, as a shard may be
    (seen in jaxlib 0.10.2).
    """
    indexing, shape = scatter_indexing(op), value_shape(op.operands[0])
    if not indexing.indexed:
        return replace(rule, replicated=frozenset(range(len(rule.sizes))), reduction=frozenset())
    count = len(op.operands) // 2
    able = indexing.shardable(shape)
    cut = _factors(rule.operands[0], able)
    batching = {dim for _, dim in indexing.batching}
    indices = rule.operands[count]
    updates = _factors(indices, set(range(len(indices))) - batching - {indexing.vector_dim})
    foldable = updates if count == 1 and fold_of(op.regions[0]) is not None else frozenset[int]()
    kept = rule.replicated - cut - foldable
    return replace(
        rule,
        combining=combining_of(op),
        reduction=foldable,
        replicated=kept | _factors(rule.operands[0], set(range(len(shape))) - able) | (updates - foldable),
    )


def scatter(local: LocalOp) -> Sequence[ir.Value]:
    """A device drops the updates of rows that are others', since they lie beyond its shard; each makes the updates that it has,
    and what they make of the operand is folded."""
    indexing, count, attributes = scatter_indexing(local.op), len(local.operands) // 2, dict[str, ir.Attribute]()
    inputs, indices, updates = local.operands[:count], local.operands[count], local.operands[count + 1 :]
    cut = _sharded_components(local, indexing)
    if cut:
        shape, starts, dims = value_shape(local.op.operands[0]), _columns(indices, indexing), local.reads[0].dims
        for component in cut:
            dim = indexing.indexed[component]
            if indexing.windows[dim] == shape[dim]:
                continue
            # Far beyond the dim is as good as beside it, and the subtraction can't overflow.
            start = within(starts[component], -1, shape[dim])
            starts[component] = row_of_shard(local, start, dims[dim], value_shape(inputs[0])[dim])
        indices, attributes = _together(starts, indexing.vector_dim), _unsorted()
        if _is_one_window(indices, indexing):
            inputs = [_kept_apart(value) for value in inputs]
    if not local.reduced:
        return local.clone([*inputs, indices, *updates], attributes)
    fold = fold_of(local.op.regions[0])
    assert fold is not None
    (operand,) = inputs
    if fold not in IDEMPOTENT:
        nothing = empty_sum(operand.type) if fold == "stablehlo.add" else identity_of(fold, operand.type)
        index = local.devices.index(local.reduced)
        operand = chosen(compared(index, "EQ", splat(index.type, 0)), operand, nothing)
    (made,) = local.clone([operand, indices, *updates], attributes)
    return [over_devices(local, made, fold)]


def _factors(tensor: Dims, dims: Iterable[int]) -> frozenset[int]:
    return frozenset(factor for dim in dims if dim < len(tensor) for factor in tensor[dim])


def _sharded_components(local: LocalOp, indexing: Indexing) -> list[int]:
    """Components of an index that are rows of a sharded dim."""
    dims, group_size = local.reads[0].dims, local.devices.group_size
    return [component for component, dim in enumerate(indexing.indexed) if group_size(dims[dim]) > 1]


def _is_one_window(indices: ir.Value, indexing: Indexing) -> bool:
    return all(size == 1 for dim, size in enumerate(value_shape(indices)) if dim != indexing.vector_dim)


def _unsorted() -> dict[str, ir.Attribute]:
    """Clamped indices of several components may be in another order."""
    return {"indices_are_sorted": ir.BoolAttr.get(False)}


def _kept_apart(value: ir.Value) -> ir.Value:
    """A value that XLA does not see through.

    XLA makes a scatter of one window a slice, a choice and an update, and merges that slice with the one that a shard may
    be: beyond the end of the shard it would then read rows of other shards, where it must stay at the end (seen in jaxlib
    0.10.2).
    """
    return ir.Operation.create("stablehlo.optimization_barrier", results=[value.type], operands=[value]).results[0]


def _columns(indices: ir.Value, indexing: Indexing) -> list[ir.Value]:
    """Each component of the indices, the dim of components left in place."""
    indices = widened(indices)
    tensor = ir.RankedTensorType(indices.type)
    if indexing.vector_dim == tensor.rank:
        return [indices]
    found = list[ir.Value]()
    for component in range(len(indexing.indexed)):
        first, last = [0] * tensor.rank, list(tensor.shape)
        first[indexing.vector_dim], last[indexing.vector_dim] = component, component + 1
        shape = list(tensor.shape)
        shape[indexing.vector_dim] = 1
        made = ir.Operation.create(
            "stablehlo.slice",
            results=[ir.RankedTensorType.get(shape, tensor.element_type)],
            operands=[indices],
            attributes={
                "start_indices": ir.DenseI64ArrayAttr.get(first),
                "limit_indices": ir.DenseI64ArrayAttr.get(last),
                "strides": ir.DenseI64ArrayAttr.get([1] * tensor.rank),
            },
        )
        found.append(made.results[0])
    return found


def _together(columns: Sequence[ir.Value], dim: int) -> ir.Value:
    """The inverse of `_columns`."""
    if len(columns) == 1:
        return columns[0]
    tensor = ir.RankedTensorType(columns[0].type)
    shape = list(tensor.shape)
    shape[dim] = len(columns)
    return ir.Operation.create(
        "stablehlo.concatenate",
        results=[ir.RankedTensorType.get(shape, tensor.element_type)],
        operands=list(columns),
        attributes={"dimension": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), dim)},
    ).results[0]


def _per_window(local: LocalOp, flags: Sequence[ir.Value], indexing: Indexing, made: ir.Value) -> ir.Value:
    """Flags of indices that are all true, for each element that the gather makes."""
    inside = reduce(lambda one, other: binary("stablehlo.and", one, other), flags)
    tensor, numbers = ir.RankedTensorType(inside.type), stablehlo.GatherDimensionNumbers
    shape = [size for dim, size in enumerate(tensor.shape) if dim != indexing.vector_dim]
    row = ir.RankedTensorType.get(shape, tensor.element_type)
    if row != tensor:
        inside = ir.Operation.create("stablehlo.reshape", results=[row], operands=[inside]).results[0]
    result = ir.RankedTensorType(made.type)
    offset = set(numbers(local.op.attributes["dimension_numbers"]).offset_dims)
    dims = [dim for dim in range(result.rank) if dim not in offset]
    return spread(inside, ir.RankedTensorType.get(result.shape, tensor.element_type), dims)
