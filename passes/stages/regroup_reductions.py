"""Regrouping scalar reductions of the update: one partial result per stage, combined by every reader.

A global norm or an all-finite check folds one small value per parameter into one. Written as a chain it would visit the
stages one after another; regrouped, each stage folds its own values, and the partial results are exchanged once.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    UPDATE,
    phase_and_stage,
    phase_of,
    set_stage,
    stage_of,
)
from bactrian.passes.ir.cloning import PARTIAL
from bactrian.passes.ir.constants import splat_of
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_traits import ASSOCIATIVE, NEVER_CLONED
from bactrian.passes.ir.regions import custom_call_target, erase_dead, nested_operands
from bactrian.passes.ir.tensor_sizes import value_bytes


@dataclass(frozen=True)
class _Fold:
    """An associative fold: its op, and the small values that it folds, in order; scalars or vectors of one element."""

    kind: str
    leaves: list[ir.Value]


def regroup_scalar_reductions(main: ir.Operation, small_bytes: int) -> int:
    """Rewrite every fold over small values of several stages; returns how many were rewritten."""
    flow = MainDataflow.of(main)
    _pull_to_sources(flow, small_bytes)
    rewritten = 0
    for index, op in enumerate(flow.ops):
        if flow.phases[index] != UPDATE:
            continue
        name = op.name
        if name == "stablehlo.reduce":
            fold = _concatenated_fold(op, small_bytes)
        elif name in ASSOCIATIVE and flow.sizes[flow.results[index][0]] <= small_bytes:
            fold = _tree_fold(op)
        else:
            continue
        if fold is None:
            continue
        groups = _by_stage(fold.leaves, small_bytes)
        if len(groups) > 1:
            _rewrite(op, fold, groups)
            rewritten += 1
    return rewritten


def _value_stage(value: ir.Value) -> int | None:
    """The stage that computes a value; None where any stage can have it (arguments)."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return None
    op = owner.operation
    if custom_call_target(op) == GRADIENT_BOUNDARY:
        return _value_stage(op.operands[ir.OpResult(value).result_number])
    return stage_of(op)


def _pull_to_sources(flow: MainDataflow, small_bytes: int) -> None:
    """Move small update ops whose inputs all come from one stage to that stage."""
    stages = list(flow.stages)
    through = {}
    if flow.boundary >= 0:
        through = dict(zip(flow.results[flow.boundary], flow.operands[flow.boundary], strict=True))
    for index, op in enumerate(flow.ops):
        if flow.phases[index] != UPDATE:
            continue
        if any(flow.sizes[value] > small_bytes for value in (*flow.operands[index], *flow.results[index])):
            continue
        producers = (flow.producer[through.get(value, value)] for value in flow.operands[index])
        sources = {stages[p] for p in producers if p >= 0 and flow.ops[p].name != "stablehlo.constant"} - {None}
        if len(sources) == 1:
            source = sources.pop()
            if source is not None and source != stages[index]:
                stages[index] = source
                set_stage(op, source)


def _is_shared(value: ir.Value, small_bytes: int, known: dict[ir.Value, bool]) -> bool:
    """Whether every stage can compute a small value itself: from arguments, constants and partial results."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return value_bytes(value) <= small_bytes
    op = owner.operation
    if value not in known:
        reads = [*op.operands, *(read for _, _, read in nested_operands(op))]
        known[value] = PARTIAL in op.attributes or (
            phase_of(op) == UPDATE
            and op.name not in NEVER_CLONED
            and value_bytes(value) <= small_bytes
            and all(_is_shared(read, small_bytes, known) for read in reads)
        )
    return known[value]


def _single_use(value: ir.Value) -> bool:
    uses = iter(value.uses)
    return next(uses, None) is not None and next(uses, None) is None


def _tree_fold(root: ir.Operation) -> _Fold | None:
    """The maximal tree of one associative op under ``root``, if ``root`` is its top."""
    kind = root.name
    uses = list(root.results[0].uses)
    if len(uses) == 1 and uses[0].owner.operation.name == kind and phase_of(uses[0].owner.operation) == UPDATE:
        return None
    leaves: list[ir.Value] = []
    stack = list(reversed(list(root.operands)))
    while stack:
        value = stack.pop()
        owner = value.owner
        inner = None if isinstance(owner, ir.Block) else owner.operation
        if inner is not None and inner.name == kind and phase_of(inner) == UPDATE and _single_use(value):
            stack.extend(reversed(list(inner.operands)))
        else:
            leaves.append(value)
    return _Fold(kind, leaves)


def _concatenated_fold(op: ir.Operation, small_bytes: int) -> _Fold | None:
    """``reduce(concatenate(a, b, ...))`` down to one element, as ``jnp.all(jnp.array([...]))`` lowers to."""
    if op.name != "stablehlo.reduce" or len(op.operands) != 2 or ir.RankedTensorType(op.results[0].type).shape:
        return None
    inner = [nested.operation for nested in op.regions[0].blocks[0].operations]
    source = op.operands[0].owner
    if len(inner) != 2 or inner[0].name not in ASSOCIATIVE or isinstance(source, ir.Block):
        return None
    concatenate = source.operation
    if concatenate.name != "stablehlo.concatenate" or not _single_use(op.operands[0]):
        return None
    if value_bytes(op.operands[0]) > small_bytes * 64 or set(inner[0].operands) != set(
        op.regions[0].blocks[0].arguments
    ):
        return None
    if any(ir.RankedTensorType(value.type).shape != [1] for value in concatenate.operands):
        return None
    init = [] if _is_identity(inner[0].name, op.operands[1]) else [op.operands[1]]
    return _Fold(inner[0].name, [*concatenate.operands, *init])


def _is_identity(kind: str, init: ir.Value) -> bool:
    """Whether folding ``init`` in changes nothing. In doubt it is one more value to fold."""
    number = getattr(splat_of(init), "value", None)
    is_bool = str(ir.RankedTensorType(init.type).element_type) == "i1"
    expected: dict[str, tuple[object, ...]] = {
        "stablehlo.add": (0, 0.0),
        "stablehlo.or": (0, False),
        "stablehlo.xor": (0, False),
        "stablehlo.and": (True if is_bool else -1,),
        "stablehlo.multiply": (1, 1.0),
        "stablehlo.maximum": (float("-inf"),),
        "stablehlo.minimum": (float("inf"),),
    }
    return number in expected[kind]


def _by_stage(leaves: list[ir.Value], small_bytes: int) -> dict[int, list[ir.Value]]:
    """Leaves by the stage that has them, in stage order; what any stage has joins the first. Empty for one stage."""
    stages = [_value_stage(leaf) for leaf in leaves]
    if len({stage for stage in stages if stage is not None}) < 2:
        return {}
    anywhere: list[ir.Value] = []
    known: dict[ir.Value, bool] = {}
    groups: dict[int, list[ir.Value]] = {}
    for leaf, stage in zip(leaves, stages, strict=True):
        if stage is None or (not _is_partial(leaf) and _is_shared(leaf, small_bytes, known)):
            anywhere.append(leaf)
        else:
            groups.setdefault(stage, []).append(leaf)
    ordered = {stage: groups[stage] for stage in sorted(groups)}
    if ordered and anywhere:
        next(iter(ordered.values())).extend(anywhere)
    return ordered


def _is_partial(value: ir.Value) -> bool:
    owner = value.owner
    return not isinstance(owner, ir.Block) and PARTIAL in owner.operation.attributes


def _rewrite(root: ir.Operation, fold: _Fold, groups: dict[int, list[ir.Value]]) -> None:
    """Replace ``root`` by one partial fold per stage and their combination."""
    with ir.InsertionPoint(root), root.location:
        partials: list[ir.Value] = []
        for stage, leaves in groups.items():
            scalars = [_scalar(leaf, stage) for leaf in leaves] if root.name == "stablehlo.reduce" else leaves
            partials.append(_mark(_chain(fold.kind, scalars, stage)))
        total = _chain(fold.kind, partials, next(iter(groups)))
    root.results[0].replace_all_uses_with(total)
    erase_dead([root], UPDATE)


def _mark(partial: ir.Value) -> ir.Value:
    """Say on the op that ends a stage's part of a fold that its value is what the stages exchange."""
    owner = partial.owner
    if not isinstance(owner, ir.Block) and phase_of(owner.operation) == UPDATE:
        owner.operation.attributes[PARTIAL] = ir.UnitAttr.get()
    return partial


def _scalar(value: ir.Value, stage: int) -> ir.Value:
    """A one-element vector as a scalar; a scalar as it is."""
    if not ir.RankedTensorType(value.type).shape:
        return value
    element = ir.RankedTensorType(value.type).element_type
    op = ir.Operation.create(
        "stablehlo.reshape",
        results=[ir.RankedTensorType.get([], element)],
        operands=[value],
        attributes=phase_and_stage(UPDATE, stage),
    )
    return op.results[0]


def _chain(kind: str, values: list[ir.Value], stage: int) -> ir.Value:
    """Left fold of values on one stage."""
    total = values[0]
    for value in values[1:]:
        total = ir.Operation.create(
            kind, results=[total.type], operands=[total, value], attributes=phase_and_stage(UPDATE, stage)
        ).results[0]
    return total
