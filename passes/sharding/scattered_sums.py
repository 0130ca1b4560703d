"""Sums of partial results of which each device keeps a shard: where a stage function asks for a reduce-scatter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.meshes import spec_of, spec_or_replicated, value_shardings
from bactrian.passes.ir.regions import body, nested_operations
from bactrian.passes.ir.tensor_sizes import type_bytes
from bactrian.passes.machine.spec import Spec

_SMALL_BYTES = 1 << 18  # on a device: for larger ones the latency of a collective is less than the copies into a bundle
_BUNDLE_BYTES = 1 << 22

_DIMS = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class ScatteredSum:
    """A product or sum over cut dims, and the only reader of its result, which cuts the result over the same axes.

    Attributes:
        op: gives partial results.
        move: the ``sdy.reshard`` that cuts them.
        scatters: for each dim that is cut further, the dim and its new axes, the major one first.
    """

    op: ir.Operation
    move: ir.Operation
    scatters: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def axes(self) -> frozenset[str]:
        """All axes that it is summed over."""
        return frozenset(axis for _, axes in self.scatters for axis in axes)


def scattered_sums(main: ir.Operation) -> Iterator[ScatteredSum]:
    """Those of a stage function and of its loops whose op a device can do alone on its shards, in order."""
    moves = list[tuple[ir.Operation, ir.Operation]]()
    for move in nested_operations(main):
        value = move.operands[0] if move.name == "sdy.reshard" else None
        if value is None or isinstance(value.owner, ir.Block) or len(list(value.uses)) > 1:
            continue
        if value.owner.operation.name in _PARTIAL:
            moves.append((value.owner.operation, move))
    for op, move in moves:
        values = [*op.operands, op.results[0], move.results[0]]
        shardings = value_shardings(main, values)
        *operands, made, target = (spec_or_replicated(s, v.type) for s, v in zip(shardings, values, strict=True))
        partial = _PARTIAL[op.name](op, operands)
        if partial is None or partial.dims != made.dims or not partial.unreduced:
            continue
        scatters = _added(made, target)
        if scatters is not None and sorted(axis for _, axes in scatters for axis in axes) == sorted(partial.unreduced):
            yield ScatteredSum(op, move, scatters)


def bundles(main: ir.Operation, sums: Sequence[ScatteredSum], sizes: Mapping[str, int]) -> list[list[ScatteredSum]]:
    """Sums that are scattered together: small ones over the same axes, none of which needs another one's result.

    Each collective costs its latency, and compilers combine all-reduces, but on CPUs no reduce-scatters.

    Args:
        main: the function.
        sums: those of `scattered_sums`.
        sizes: of the mesh's axes.
    """
    found, held, needs = list[list[ScatteredSum]](), list[int](), list[int]()
    open_ = dict[tuple[frozenset[str], str], list[int]]()
    before = dict[ir.Operation, int]()  # bits of the bundles that an op depends on
    of_op = {each.op: each for each in sums}

    def closed(bits: int) -> int:
        known, todo = 0, bits
        while todo:
            number = (todo & -todo).bit_length() - 1
            known |= 1 << number
            todo = (todo | needs[number]) & ~known
        return known

    for view in body(main).operations:
        op = view.operation
        inside = nested_operations(op) if len(op.regions) else ()
        owners = [value.owner for each in (op, *inside) for value in each.operands]
        bits = 0
        for owner in owners:
            bits |= 0 if isinstance(owner, ir.Block) else before.get(owner.operation, 0)
        one = of_op.pop(op, None)
        if one is not None:
            nbytes = _held(one, sizes)
            key = one.axes, str(ir.RankedTensorType(op.results[0].type).element_type)
            reach = closed(bits)
            fitting = (
                number
                for number in open_.get(key, ())
                if not reach >> number & 1 and held[number] + nbytes <= _BUNDLE_BYTES
            )
            number = next(fitting, -1) if nbytes <= _SMALL_BYTES else -1
            if number < 0:
                number = len(found)
                found.append([])
                held.append(0)
                needs.append(0)
                if nbytes <= _SMALL_BYTES:
                    open_.setdefault(key, []).append(number)
            found[number].append(one)
            held[number] += nbytes
            needs[number] |= bits
            bits = 1 << number
        before[op] = bits
    return found + [[one] for one in of_op.values()]  # those in loops


def _held(found: ScatteredSum, sizes: Mapping[str, int]) -> int:
    """Bytes of the partial result on a device."""
    target = spec_of(found.move.attributes["sharding"])
    cuts = math.prod(sizes[axis] for axis in target.axes if axis not in found.axes)
    return type_bytes(found.op.results[0].type) // cuts


def _added(before: Spec, after: Spec) -> tuple[tuple[int, tuple[str, ...]], ...] | None:
    """The axes that a spec has behind those of another one; None where it differs otherwise."""
    if any(new[: len(old)] != old for old, new in zip(before.dims, after.dims, strict=True)):
        return None
    pairs = enumerate(zip(before.dims, after.dims, strict=True))
    return tuple((dim, new[len(old) :]) for dim, (old, new) in pairs if new != old)


def _of_product(op: ir.Operation, specs: Sequence[Spec]) -> Spec | None:
    numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
    left, right = (spec.dims for spec in specs)
    batch = list(zip(numbers.lhs_batching_dimensions, numbers.rhs_batching_dimensions, strict=True))
    summed = list(zip(numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions, strict=True))
    if any(left[one] != right[other] for one, other in batch + summed):
        return None
    used = [{pair[side] for pair in batch + summed} for side in (0, 1)]
    made = [left[one] for one, _ in batch]
    for spec, gone in zip(specs, used, strict=True):
        made += [axes for dim, axes in enumerate(spec.dims) if dim not in gone]
    return Spec(tuple(made), tuple(axis for one, _ in summed for axis in left[one]))


def _of_sum(op: ir.Operation, specs: Sequence[Spec]) -> Spec | None:
    """Of a reduction that adds up, from 0."""
    if len(op.results) != 1 or not _is_zero(op.operands[1]) or not _adds(op):
        return None
    dims = list(ir.DenseI64ArrayAttr(op.attributes["dimensions"]))
    read = specs[0].dims
    made = tuple(axes for dim, axes in enumerate(read) if dim not in dims)
    return Spec(made, tuple(axis for dim in dims for axis in read[dim]))


def _of_convolution(op: ir.Operation, specs: Sequence[Spec]) -> Spec | None:
    """Of one group, with whole images."""
    if any(ir.IntegerAttr(op.attributes[f"{name}_group_count"]).value != 1 for name in ("feature", "batch")):
        return None
    names = [
        [dim.strip() for dim in each.split(",")] for each in _DIMS.findall(str(op.attributes["dimension_numbers"]))
    ]
    left, right = (dict(zip(n, spec.dims, strict=True)) for n, spec in zip(names[:2], specs, strict=True))
    if left["f"] != right["i"] or any(axes for each in (left, right) for dim, axes in each.items() if dim.isdigit()):
        return None
    cuts = {"b": left["b"], "f": right["o"]}
    return Spec(tuple(cuts.get(dim, ()) for dim in names[2]), left["f"])


def _of_scatter(op: ir.Operation, specs: Sequence[Spec]) -> Spec | None:
    """Of one that adds whole windows to zeros."""
    numbers = stablehlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])
    if len(op.operands) != 3 or numbers.input_batching_dims or not _is_zero(op.operands[0]) or not _adds(op):
        return None
    target, indices, updates = (spec.dims for spec in specs)
    inserted, windows = set(numbers.inserted_window_dims), set(numbers.update_window_dims)
    target_windows = [dim for dim in range(len(target)) if dim not in inserted]
    shapes = [ir.RankedTensorType(op.operands[number].type).shape for number in (0, 2)]
    of_target = [(shapes[0][dim], target[dim]) for dim in target_windows]
    of_updates = [(shapes[1][dim], axes) for dim, axes in enumerate(updates) if dim in windows]
    indexed = [axes for dim, axes in enumerate(indices) if dim != numbers.index_vector_dim]
    added = [axes for dim, axes in enumerate(updates) if dim not in windows]
    one_at_a_time = numbers.index_vector_dim == len(indices) or not indices[numbers.index_vector_dim]
    whole = not any(target[dim] for dim in {*inserted, *numbers.scattered_dims_to_operand_dims})
    if of_target != of_updates or indexed != added or not one_at_a_time or not whole:
        return None
    return Spec(target, tuple(axis for axes in added for axis in axes))


def _adds(op: ir.Operation) -> bool:
    block = op.regions[0].blocks[0]
    inside = [view.operation for view in block.operations]
    return [each.name for each in inside] == ["stablehlo.add", "stablehlo.return"] and set(inside[0].operands) == set(
        block.arguments
    )


def _is_zero(value: ir.Value) -> bool:
    number = splat_of(value)
    if isinstance(number, ir.FloatAttr | ir.IntegerAttr):
        return number.value == 0
    return False


_PARTIAL = {
    "stablehlo.dot_general": _of_product,
    "stablehlo.reduce": _of_sum,
    "stablehlo.convolution": _of_convolution,
    "stablehlo.scatter": _of_scatter,
}
