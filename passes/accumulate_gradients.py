"""``accumulate-gradients``: what happens once per microbatch, and what can wait for the end of the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic, option
from bactrian.passes.ir.attributes import (
    ACCUMULATE,
    BACKWARD,
    FORWARD,
    INITIALIZE,
    MICROBATCH_INDEX,
    UPDATE,
    AttributeDict,
    argument_roles,
    layer_of,
    phase_and_stage,
    phase_of,
    placement,
    read_num_microbatches,
    required_stage,
    set_stage,
    stage_of,
    with_phase,
)
from bactrian.passes.ir.builders import binary, scalar_i32, splat
from bactrian.passes.ir.cloning import StageRule, clone_into_readers, copy_stage, stage_key, stage_keys
from bactrian.passes.ir.gradient_boundary_op import (
    ACCUMULATED,
    boundary_words,
    find_boundary,
    make_boundary,
    set_boundary_words,
)
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import LAYOUT_CHANGES
from bactrian.passes.ir.regions import body, erase_dead, main_function, top_level
from bactrian.passes.stages.regroup_reductions import regroup_scalar_reductions


@dataclass(frozen=True)
class AccumulateGradients(Pass):
    """Make the accumulation over microbatches explicit, and move work that can wait below the boundary.

    A gradient that is a sum of parts from several stages (a tied embedding) is accumulated in parts, which are added
    once per step instead of once per microbatch. With more than one microbatch each ``mean`` or ``sum`` gets an
    accumulator: zeros in the phase ``initialize``, an add after the gradient, and for ``mean`` one division in the
    update; ``concat`` fills a buffer at the microbatch's index; ``last`` needs nothing. Operand 0 of an accumulator is
    the initial value; from the second microbatch on it is the op's own previous result, so no folding pass may run
    between here and ``split-stages``.

    Scalar reductions of the update over values of several stages (a global norm, an all-finite check) become one
    partial result per stage and a combination that every reader computes for itself.

    Requires: stages assigned (``assign-stages``), ``bactrian.num_microbatches`` on the module.
    Ensures: every operand of the boundary has its result's type and the reduction ``accumulated``; loop-carried ops
    have ``bactrian.accumulate``.

    Input:

    ```mlir
    module attributes {bactrian.num_microbatches = 2 : i64} {
      func.func public @main(%x: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %g = stablehlo.negate %x {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %b = stablehlo.custom_call @bactrian.gradient_boundary(%g) {mhlo.backend_config =
          {kinds = "gradient", reductions = "sum"}} : (tensor<4xf32>) -> tensor<4xf32>
        return %b : tensor<4xf32>
      }
    }
    ```

    Output:

    ```mlir
    module attributes {bactrian.num_microbatches = 2 : i64} {
      func.func public @main(%arg0: tensor<4xf32> {bactrian.role = "batch"}) -> tensor<4xf32> {
        %0 = stablehlo.negate %arg0 {bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %cst = stablehlo.constant {bactrian.phase = "initialize", bactrian.stage = 0 : i64} dense<0.000000e+00> : tensor<4xf32>
        %1 = stablehlo.add %cst, %0 {bactrian.accumulate, bactrian.phase = "backward", bactrian.stage = 0 : i64} : tensor<4xf32>
        %2 = stablehlo.custom_call @bactrian.gradient_boundary(%1) {mhlo.backend_config = {kinds = "gradient", reductions = "accumulated"}} : (tensor<4xf32>) -> tensor<4xf32>
        return %2 : tensor<4xf32>
      }
    }
    ```

    The gradient is added to what the microbatch before left.
    """

    name: ClassVar[str] = "accumulate-gradients"
    summary: ClassVar[str] = "accumulate over microbatches; move sums that can wait below the boundary"
    requires: ClassVar[tuple[str, ...]] = (
        "formed",
        "flat",
        "typed",
        "marked",
        "phased",
        "with-stages",
        "with-num-microbatches",
        "with-boundary",
    )
    ensures: ClassVar[tuple[str, ...]] = (
        "flat",
        "adopted",
        "verified",
        "phased",
        "assigned",
        "localized",
        "accumulated",
    )
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("accumulators", "buffers that live through the whole step"),
        Statistic("split-sums", "gradients accumulated in parts on several stages"),
        Statistic("regrouped", "scalar reductions folded per stage first"),
    )

    small_bytes: int = option(
        256, help="values of at most this many bytes may be recomputed on each stage that reads them"
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Rewrite the boundary, then the update's scalar reductions."""
        main = main_function(module)
        count = read_num_microbatches(module)
        ctx.count("split-sums", _split_sums(main))
        boundary = find_boundary(main)
        if count > 1:
            ctx.count("accumulators", _accumulate(main, boundary, count))
        else:
            kinds = boundary_words(boundary, "kinds")
            set_boundary_words(boundary, kinds, [ACCUMULATED] * len(kinds))
        ctx.count("regrouped", regroup_scalar_reductions(main, self.small_bytes))
        flow = MainDataflow.of(main)
        rule = StageRule(flow, argument_roles(main), self.small_bytes)
        clone_into_readers(flow, stage_keys(flow), stage_key, copy_stage, rule)


@dataclass(frozen=True)
class _Summand:
    """A part of a sum, the op that computes it (none where it is an argument), and the shape ops between that and the sum."""

    value: ir.Value
    source: ir.Operation | None
    shape_ops: list[ir.Operation]


@dataclass(frozen=True)
class _Operand:
    """One operand of the boundary. If it is a sum over several stages, the summands by stage and the shape ops behind
    the sum (the last one first), which are done once per step, and ``where`` that is; else no summands."""

    value: ir.Value
    kind: str
    reduction: str
    where: AttributeDict = field(default_factory=dict[str, ir.Attribute])
    summands: dict[int, list[_Summand]] = field(default_factory=dict[int, list[_Summand]])
    shape_ops: list[ir.Operation] = field(default_factory=list[ir.Operation])


def _split_sums(main: ir.Operation) -> int:
    """Accumulate sums over several stages in parts; returns how many there were."""
    boundary = find_boundary(main)
    kinds, reductions = boundary_words(boundary, "kinds"), boundary_words(boundary, "reductions")
    operands = [
        _find_summands(value, kind, reduction)
        for value, kind, reduction in zip(boundary.operands, kinds, reductions, strict=True)
    ]
    num_split = sum(1 for operand in operands if operand.summands)
    if not num_split:
        return 0
    old = list(boundary.results)
    with ir.InsertionPoint(boundary), boundary.location:
        parts = [_sum_per_stage(operand) if operand.summands else [operand.value] for operand in operands]
        new = make_boundary(
            [part for each in parts for part in each],
            [
                part.type if operand.summands else result.type
                for operand, each, result in zip(operands, parts, old, strict=True)
                for part in each
            ],
            [operand.kind for operand, each in zip(operands, parts, strict=True) for _ in each],
            [operand.reduction for operand, each in zip(operands, parts, strict=True) for _ in each],
        )
    results = iter(new.results)
    with ir.InsertionPoint(boundary):
        for operand, each, result in zip(operands, parts, old, strict=True):
            accumulated: list[ir.Value] = [next(results) for _ in each]
            result.replace_all_uses_with(_join(operand, accumulated, boundary.location))
    dead = [v.owner.operation for v in boundary.operands if not isinstance(v.owner, ir.Block)]
    boundary.erase()
    erase_dead(dead)
    return num_split


def _find_summands(value: ir.Value, kind: str, reduction: str) -> _Operand:
    """Look for a sum of gradients of several stages behind an operand of the boundary."""
    whole = _Operand(value, kind, reduction)
    if reduction not in ("mean", "sum"):
        return whole
    top, shape_ops = _skip_shape_ops(value)
    add = _private_producer(top)
    if add is None or add.name != "stablehlo.add":
        return whole
    summands: dict[int, list[_Summand]] = {}
    stack = [(operand, add) for operand in reversed(list(add.operands))]
    while stack:
        summand, reader = stack.pop()
        op = _private_producer(summand)
        if op is not None and op.name == "stablehlo.add":
            stack.extend((operand, op) for operand in reversed(list(op.operands)))
            continue
        source, between = _skip_shape_ops(summand)
        producer = None if isinstance(source.owner, ir.Block) else source.owner.operation
        # Any stage can have an argument: the one that reads it.
        stage = required_stage(producer or (between[0] if between else reader))
        summands.setdefault(stage, []).append(_Summand(summand, producer, between))
    if len(summands) < 2:
        return whole
    return _Operand(value, kind, reduction, placement(shape_ops[0] if shape_ops else add), summands, shape_ops)


def _skip_shape_ops(value: ir.Value) -> tuple[ir.Value, list[ir.Operation]]:
    """What shape ops make a value from, and these ops, the last one first."""
    shape_ops: list[ir.Operation] = []
    while (op := _private_producer(value)) is not None and op.name in LAYOUT_CHANGES:
        shape_ops.append(op)
        value = op.operands[0]
    return value, shape_ops


def _sum_per_stage(operand: _Operand) -> list[ir.Value]:
    """Add up the summands of each stage, on the lowest of their layers; their shape ops move to the stage."""
    parts: list[ir.Value] = []
    for stage, summands in sorted(operand.summands.items()):
        for summand in summands:
            for op in summand.shape_ops:
                set_stage(op, stage)
                if summand.source is not None:
                    copy_stage(op, summand.source)
        sources = [summand.source for summand in summands if summand.source is not None]
        lowest = min(sources, key=lambda source: layer_of(source) or 0, default=None)
        where = phase_and_stage(BACKWARD, stage) if lowest is None else with_phase(placement(lowest), BACKWARD)
        total = summands[0].value
        for summand in summands[1:]:
            total = binary("stablehlo.add", total, summand.value, where)
        parts.append(total)
    return parts


def _private_producer(value: ir.Value) -> ir.Operation | None:
    """The backward op that computes a value which nothing else reads."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return None
    op = owner.operation
    uses = iter(value.uses)
    single = next(uses, None) is not None and next(uses, None) is None
    return op if single and phase_of(op) == BACKWARD else None


def _join(operand: _Operand, parts: list[ir.Value], location: ir.Location) -> ir.Value:
    """Add the accumulated parts, and redo the shape ops that stood behind the sum."""
    total, where = parts[0], with_phase(operand.where, UPDATE)
    with location:
        for part in parts[1:]:
            total = binary("stablehlo.add", total, part, where)
    for op in reversed(operand.shape_ops):
        clone = op.clone().operation
        clone.operands[0] = total
        for name, attribute in where.items():
            clone.attributes[name] = attribute
        total = clone.results[0]
    return total


def _accumulate(main: ir.Operation, boundary: ir.Operation, count: int) -> int:
    """Give every ``mean``, ``sum`` and ``concat`` of the boundary its accumulator."""
    kinds, reductions = boundary_words(boundary, "kinds"), boundary_words(boundary, "reductions")
    after = _next_op(main, boundary)
    made = 0
    for number, reduction in enumerate(reductions):
        if reduction in ("last", ACCUMULATED):
            continue
        value, result = boundary.operands[number], boundary.results[number]
        where = _placement_of(value, main)
        with ir.InsertionPoint(boundary), boundary.location:
            zeros = splat(result.type, 0, with_phase(where, INITIALIZE))
            accumulate = _concat if reduction == "concat" else _sum
            boundary.operands[number] = accumulate(zeros, value, where)
        if reduction == "mean":
            with ir.InsertionPoint(after), boundary.location:
                _divide(result, count, _reader_placement(result, main, where))
        made += 1
    set_boundary_words(boundary, kinds, [ACCUMULATED] * len(kinds))
    return made


def _next_op(main: ir.Operation, op: ir.Operation) -> ir.Operation:
    operations = [view.operation for view in body(main).operations]
    return operations[operations.index(op) + 1]


def _placement_of(value: ir.Value, main: ir.Operation) -> AttributeDict:
    """Where a boundary operand is accumulated: with its producer, or with the first reader of an argument."""
    owner = value.owner
    if not isinstance(owner, ir.Block):
        return placement(owner.operation)
    for use in value.uses:
        reader = top_level(use.owner.operation, body(main))
        if stage_of(reader) is not None and phase_of(reader) not in (None, UPDATE):
            return placement(reader)
    return phase_and_stage(FORWARD, 0)  # only the boundary reads it: any stage will do


def _reader_placement(result: ir.Value, main: ir.Operation, fallback: AttributeDict) -> AttributeDict:
    """That of the update ops that read a boundary result, if they are of one stage."""
    tops = (top_level(use.owner.operation, body(main)) for use in result.uses)
    readers = [reader for reader in tops if stage_of(reader) is not None]
    if len({stage_of(reader) for reader in readers}) != 1:
        return with_phase(fallback, UPDATE)
    return with_phase(placement(min(readers, key=lambda reader: layer_of(reader) or 0)), UPDATE)


def _sum(zeros: ir.Value, value: ir.Value, where: AttributeDict) -> ir.Value:
    return binary("stablehlo.add", zeros, value, {**where, ACCUMULATE: ir.UnitAttr.get()})


def _concat(zeros: ir.Value, value: ir.Value, where: AttributeDict) -> ir.Value:
    """Write a microbatch's rows at their place in the full batch's buffer."""
    scalar = scalar_i32()
    tensor = ir.RankedTensorType(value.type)
    rows = tensor.shape[0]
    index = ir.Operation.create(
        "stablehlo.custom_call",
        results=[scalar],
        attributes={"call_target_name": ir.StringAttr.get(MICROBATCH_INDEX), **where},
    ).results[0]
    start = binary("stablehlo.multiply", index, splat(scalar, rows, where), where)
    zero = splat(scalar, 0, where)
    starts = [start, *[zero] * (len(tensor.shape) - 1)]
    op = ir.Operation.create(
        "stablehlo.dynamic_update_slice",
        results=[zeros.type],
        operands=[zeros, value, *starts],
        attributes={**where, ACCUMULATE: ir.UnitAttr.get()},
    )
    return op.results[0]


def _divide(result: ir.Value, count: int, where: AttributeDict) -> None:
    """Divide an accumulated sum by the number of microbatches, for all its readers."""
    right = splat(result.type, count, where)
    op = ir.Operation.create("stablehlo.divide", results=[result.type], operands=[result, right], attributes=where)
    result.replace_all_uses_except(op.results[0], op)
