"""What a sharded module sends, counted from the collectives that Shardy makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy
from jaxlib.mlir.passmanager import PassManager

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import PLACEMENT
from bactrian.passes.ir.op_costs import tensor_size
from bactrian.passes.ir.regions import body, main_function
from bactrian.passes.ir.tensor_sizes import value_shape
from bactrian.passes.sharding.loop_dataflow import WHILE, assumed_trip_count
from bactrian.passes.spmd.halo import HALO, Halo, halo_sends
from bactrian.passes.spmd.halo_rules import halos_of, non_overlapping_dims, windowed_dims
from bactrian.passes.spmd.op_rules import RULE

_EXPLICIT = (
    "builtin.module(func.func(sdy-insert-explicit-reshards{enable-full-version=true},sdy-reshard-to-collectives),"
    "canonicalize)"
)
_KINDS = frozenset({"all_gather", "all_to_all", "all_reduce", "reduce_scatter", "collective_permute", "all_slice"})


@dataclass(frozen=True)
class Collective:
    """One collective of a module.

    Attributes:
        kind: Shardy's name of it; ``halo`` for halo exchanges, which Shardy leaves to XLA.
        group: devices that take part together.
        nbytes: what each of them sends, in all turns of the loops that it is in; 0 for a slice.
        where: location of the op.
        element_bytes: of one element of the tensor.
        twin: equal for two collectives that bring equal values to equal shardings.
    """

    kind: str
    group: int
    nbytes: float
    where: str
    element_bytes: int
    twin: int


def count_collectives(module: ir.Module) -> list[Collective]:
    """The collectives of ``@main`` and of its loops, in order, of a copy of the module that Shardy has made them
    explicit in.

    Raises:
        PassError: Shardy can't.
    """
    text = str(module.operation.get_asm(enable_debug_info=True))
    with make_context():
        copy = ir.Module.parse(text)
        for op, _ in _with_iterations(body(main_function(copy)), 1):
            _tie_windows(op)
        try:
            PassManager.parse(_EXPLICIT).run(copy.operation)
        except ir.MLIRError as error:
            raise PassError("Shardy can't make the collectives explicit", why=str(error)) from None
        sizes = _axis_sizes(copy)
        numbers = _value_numbers(main_function(copy))
        found, twins = list[Collective](), dict[tuple[object, ...], int]()
        for op, iterations in _with_iterations(body(main_function(copy)), 1):
            kind = op.name.removeprefix("sdy.")
            if kind in _KINDS:
                found.append(_collective(op, kind, sizes, numbers[op.results[0]], iterations))
            found += _halos(op, sizes, numbers, twins, iterations)
        return found


def _tie_windows(op: ir.Operation) -> None:
    """Let Shardy cut what an op with windows reads as it cuts what it makes, where XLA can: its own rule gathers it."""
    tied = {halo.dim for halo in halos_of(op)} | non_overlapping_dims(op)
    if not tied or op.name == "stablehlo.convolution":  # of which it has one factor for both
        return
    shapes = [value_shape(value) for value in (*op.operands, op.results[0])]
    rank, count = len(shapes[0]), len(op.operands)
    dims = [[sdy.DimMappingAttr.get([dim]) for dim in range(rank)] if shape else [] for shape in shapes]
    mappings = [sdy.TensorMappingAttr.get(each) for each in dims]
    sizes = [min(shape[dim] for shape in shapes if shape) for dim in range(rank)]
    whole = sorted(windowed_dims(op) - tied)
    op.attributes[RULE] = sdy.OpShardingRuleAttr.get(
        sizes, mappings[:count], mappings[count:], need_replication_factors=whole
    )


def _with_iterations(block: ir.Block, iterations: int) -> Iterator[tuple[ir.Operation, int]]:
    """The ops of a block and of the loops in it, and how often each runs."""
    for view in block.operations:
        op = view.operation
        yield op, iterations
        if op.name == WHILE:
            for region in op.regions:
                yield from _with_iterations(region.blocks[0], iterations * assumed_trip_count(op))


def _value_numbers(main: ir.Operation) -> dict[ir.Value, int]:
    """A number for every value of a function and of its loops, the same for values that are computed alike."""
    numbers: dict[ir.Value, int] = {argument: number for number, argument in enumerate(body(main).arguments)}
    known = dict[tuple[object, ...], int]()
    for op, _ in _with_iterations(body(main), 1):
        unlike = len(numbers) if len(op.regions) else None  # regions may read anything: no two are taken for equal
        attributes = str(
            {name: str(op.attributes[name]) for name in sorted(op.attributes.keys()) if name not in PLACEMENT}
        )
        key = op.name, attributes, tuple(numbers[value] for value in op.operands), unlike
        for position, result in enumerate(op.results):
            numbers[result] = known.setdefault((*key, position, str(result.type)), len(numbers))
        if op.name == WHILE:
            for region in op.regions:
                for argument in region.blocks[0].arguments:
                    numbers[argument] = len(numbers)
    return numbers


def _axis_sizes(module: ir.Module) -> dict[str, int]:
    sizes = dict[str, int]()
    for view in module.body.operations:
        if view.operation.name == "sdy.mesh":
            for axis in sdy.MeshAttr(view.operation.attributes["mesh"]).axes:
                sizes[sdy.MeshAxisAttr(axis).name] = sdy.MeshAxisAttr(axis).size
    return sizes


def _collective(op: ir.Operation, kind: str, sizes: dict[str, int], number: int, iterations: int) -> Collective:
    after = _parts(op.attributes["out_sharding"], sizes)
    size = tensor_size(op.results[0].type)
    whole = size.bytes
    before = _parts(_sharding_of(op.operands[0]), sizes)
    held, left = whole / before, whole / after
    if kind == "all_gather":
        group = before // after
        nbytes = (group - 1) * held
    elif kind == "reduce_scatter":
        group = after // before
        nbytes = (group - 1) * left
    elif kind == "all_reduce":
        axes = str(op.attributes["reduction_axes"])
        group = math.prod(size for name, size in sizes.items() if f'"{name}"' in axes)
        nbytes = 2 * (group - 1) / group * held
    elif kind == "all_to_all":
        axes = str(op.attributes["params"])
        group = math.prod(size for name, size in sizes.items() if f'"{name}"' in axes)
        nbytes = (group - 1) / group * held
    elif kind == "collective_permute":
        group, nbytes = math.prod(sizes.values()), held
    else:
        group, nbytes = after // before, 0.0
    return Collective(kind, group, iterations * nbytes, str(op.location), size.bytes // max(1, size.elements), number)


def _halos(
    op: ir.Operation,
    sizes: dict[str, int],
    numbers: dict[ir.Value, int],
    twins: dict[tuple[object, ...], int],
    iterations: int,
) -> Iterator[Collective]:
    """The halo exchanges of an op, for which Shardy makes no collectives."""
    halos = halos_of(op)
    if not halos:
        return
    parts = [_parts_of_dims(value, sizes) for value in op.operands]
    made = _parts_of_dims(op.results[0], sizes)

    def is_cut(halo: Halo) -> bool:
        partner = made if halo.partner is None else parts[halo.partner]
        return parts[halo.operand][halo.dim] == partner[halo.partner_dim] > 1

    sent = halo_sends([halo for halo in halos if is_cut(halo)], lambda operand, dim: parts[operand][dim])
    for number, (halo, rows, nbytes) in enumerate(sent):
        value = op.operands[halo.operand]
        key = numbers[value], str(_sharding_of(value)), halo.dim, number, rows, nbytes
        twin = twins.setdefault(key, len(numbers) + len(twins))
        group = math.prod(sizes.values())
        yield Collective(HALO, group, iterations * nbytes, str(op.location), halo.element_bytes, twin)


def _parts_of_dims(value: ir.Value, sizes: dict[str, int]) -> list[int]:
    """Into how many shards each dim is split."""
    rank, sharding = len(value_shape(value)), _sharding_of(value)
    if sharding is None:
        return [1] * rank
    return [
        math.prod(sizes[sdy.AxisRefAttr(axis).name] for axis in sdy.DimensionShardingAttr(dim).axes)
        for dim in sdy.TensorShardingAttr(sharding).dimension_shardings
    ]


def _parts(sharding: ir.Attribute | None, sizes: dict[str, int]) -> int:
    if sharding is None:
        return 1
    dims = sdy.TensorShardingAttr(sharding).dimension_shardings
    references = [sdy.AxisRefAttr(axis) for dim in dims for axis in sdy.DimensionShardingAttr(dim).axes]
    for reference in references:
        if reference.sub_axis_info is not None:
            raise PassError(f"sharding {sharding} has a part of an axis")
    return math.prod(sizes[reference.name] for reference in references)


def _sharding_of(value: ir.Value) -> ir.Attribute | None:
    """The sharding of an argument, of a result, or that a collective gives."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        argument = ir.BlockArgument(value)
        attributes = owner.owner.operation.attributes
        if owner.owner.operation.name == WHILE:
            return _of_result(attributes, argument.arg_number)
        entry = ir.DictAttr(ir.ArrayAttr(attributes["arg_attrs"])[argument.arg_number])
        if "sdy.sharding" in entry:
            return entry["sdy.sharding"]
        return None
    op = owner.operation
    for name in ("out_sharding", "sharding"):
        if name in op.attributes:
            return op.attributes[name]
    return _of_result(op.attributes, ir.OpResult(value).result_number)


def _of_result(attributes: ir.OpAttributeMap, number: int) -> ir.Attribute | None:
    if "sdy.sharding" not in attributes:
        return None
    return list(sdy.TensorShardingPerValueAttr(attributes["sdy.sharding"]).shardings)[number]
