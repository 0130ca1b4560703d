"""``@main`` as numbers, as ``group-layers`` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    NUM_MICROBATCHES,
    STAGE_BOUNDARY,
    argument_roles,
    integer_attribute,
    required_phase,
    result_updates,
)
from bactrian.passes.ir.cloning import StageRule
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.op_costs import CostModel
from bactrian.passes.ir.op_traits import MATRIX_PRODUCTS
from bactrian.passes.ir.regions import custom_call_target, main_function
from bactrian.passes.stages.pinned_arguments import PinnedArguments

_NO_PHASE = ""  # boundary and return


@dataclass(frozen=True)
class LayeredProgram:
    """Who reads what, how large it is and what it depends on. A stage boundary's result is the same value as its operand.

    Attributes:
        free: ops that depend on neither the batch nor a large argument.
        shallow: ops that depend on no large argument and on no matrix product: masks, positions, rotary tables.
        cheap: ops that every stage computes for itself where it reads them, as ``clone-cheap-ops`` will have it.
        microbatches: of a step.
    """

    flow: MainDataflow
    phases: list[str]
    marker: list[bool]
    same: list[int]
    reads: list[tuple[int, ...]]
    readers: list[list[int]]
    bytes: list[int]
    batch: list[bool]
    free: list[bool]
    shallow: list[bool]
    cheap: list[bool]
    roles: list[str]
    next_of: dict[int, list[int]]
    boundary: int | None
    pinned: PinnedArguments | None
    large: list[bool]
    microbatches: int

    @classmethod
    def of(cls, module: ir.Module, flow: MainDataflow, small_bytes: int) -> LayeredProgram:
        """Read ``@main``.

        Raises:
            PassError: if an op has no phase.
        """
        main = main_function(module)
        model = CostModel()
        roles = argument_roles(main)
        sizes = [model.size(value.type).bytes for value in flow.values]
        targets = [custom_call_target(op) for op in flow.ops]
        marker = [target == STAGE_BOUNDARY for target in targets]
        same = list(range(len(flow.values)))
        reads: list[tuple[int, ...]] = []
        for index, operands in enumerate(flow.operands):
            reads.append(tuple(dict.fromkeys(same[value] for value in operands)))
            if marker[index]:
                for result, operand in zip(flow.results[index], operands, strict=True):
                    same[result] = same[operand]
        readers: list[list[int]] = [[] for _ in flow.values]
        for index, values in enumerate(reads):
            for value in values:
                readers[value].append(index)
        boundary = next((index for index, target in enumerate(targets) if target == GRADIENT_BOUNDARY), None)
        phases = [_phase(flow, index, boundary) for index in range(len(flow.ops))]
        batch, free, shallow = _dependence(flow, reads, roles, sizes, phases, marker, small_bytes)
        rule = StageRule(flow, roles, small_bytes)
        cheap = [rule(index, None) for index in range(len(flow.ops))]
        next_of: dict[int, list[int]] = {}
        for value, argument in zip(flow.operands[-1], result_updates(main), strict=True):
            if argument is not None:
                next_of.setdefault(same[value], []).append(argument)
        pinned = PinnedArguments.read(module, flow)
        large = [size > small_bytes for size in sizes[: flow.num_arguments]]
        return cls(
            flow=flow,
            phases=phases,
            marker=marker,
            same=same,
            reads=reads,
            readers=readers,
            bytes=sizes,
            batch=batch,
            free=free,
            shallow=shallow,
            cheap=cheap,
            roles=roles,
            next_of=next_of,
            boundary=boundary,
            pinned=pinned,
            large=large,
            microbatches=integer_attribute(module.operation, NUM_MICROBATCHES) or 1,
        )


def _phase(flow: MainDataflow, index: int, boundary: int | None) -> str:
    if index == boundary or index == len(flow.ops) - 1:
        return _NO_PHASE
    return required_phase(flow.ops[index])


def _dependence(
    flow: MainDataflow,
    reads: Sequence[tuple[int, ...]],
    roles: Sequence[str],
    sizes: Sequence[int],
    phases: Sequence[str],
    marker: Sequence[bool],
    small_bytes: int,
) -> tuple[list[bool], list[bool], list[bool]]:
    """For each op: whether it depends on the batch; whether on neither batch nor a large argument; whether on no large
    argument and no product."""
    from_batch = [role == "batch" for role in roles] + [False] * (len(sizes) - len(roles))
    deep = [role != "batch" and size > small_bytes for role, size in zip(roles, sizes, strict=False)]
    deep += [False] * (len(sizes) - len(roles))
    batch: list[bool] = []
    free: list[bool] = []
    shallow: list[bool] = []
    for index, op in enumerate(flow.ops):
        has_phase = phases[index] != _NO_PHASE
        batch.append(any(from_batch[value] for value in reads[index]))
        tied = any(deep[value] for value in reads[index]) or op.name in MATRIX_PRODUCTS or marker[index]
        shallow.append(not tied and has_phase)
        free.append(shallow[index] and not batch[index])
        for result in flow.results[index]:
            from_batch[result] = batch[index]
            deep[result] = tied or not has_phase
    return batch, free, shallow
