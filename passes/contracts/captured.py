"""The contract of captured modules: roles, next values, and one marked boundary."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.contracts.module_view import ModuleView
from bactrian.passes.frame.diagnostics import error_at
from bactrian.passes.frame.errors import PassError
from bactrian.passes.ir.attributes import (
    GRADIENT_BOUNDARY,
    MICROBATCH_INDEX,
    NUM_MICROBATCHES,
    NUM_STAGES,
    ROLE,
    ROLES,
    SCHEDULE,
    STAGE_BOUNDARY,
    argument_attributes,
    argument_pinned_stages,
    integer_attribute,
    result_updates,
    string_attribute,
)
from bactrian.passes.ir.gradient_boundary_op import KINDS, REDUCTIONS, boundary_words
from bactrian.passes.ir.regions import body, custom_call_target, terminator
from bactrian.passes.schedules.by_name import SCHEDULES


def verify(view: ModuleView) -> None:
    """``docs/ir.md``, section 0."""
    root = view.root
    count = integer_attribute(root, NUM_MICROBATCHES)
    if count is None or count < 1:
        raise error_at(PassError, root, f"bactrian.num_microbatches is {count}, must be 1 or more")
    if string_attribute(root, SCHEDULE) not in SCHEDULES:
        raise error_at(PassError, root, f"bactrian.schedule is {string_attribute(root, SCHEDULE)!r}, which is unknown")
    _verify_signature(view)
    for op in view.ops:
        target = custom_call_target(op)
        if target == GRADIENT_BOUNDARY:
            _verify_boundary(op, count)
        elif target == MICROBATCH_INDEX and [str(value.type) for value in op.results] != ["tensor<i32>"]:
            raise error_at(PassError, op, "the microbatch's number is no tensor<i32>")
        elif target == STAGE_BOUNDARY and [v.type for v in op.operands] != [v.type for v in op.results]:
            raise error_at(
                PassError, op, "a stage boundary is no identity: its operands and results have different types"
            )


def _verify_signature(view: ModuleView) -> None:
    main = view.main
    arguments = list(body(main).arguments)
    roles = [ir.StringAttr(entry[ROLE]).value if ROLE in entry else None for entry in argument_attributes(main)]
    for value, role in zip(arguments, roles, strict=True):
        if role not in ROLES:
            raise error_at(PassError, value, f"bactrian.role is {role!r}, must be one of {', '.join(ROLES)}")
    updated = [argument for argument in result_updates(main) if argument is not None]
    for argument in updated:
        if not 0 <= argument < len(arguments) or roles[argument] != "state":
            raise error_at(PassError, terminator(main), f"a result updates argument {argument}, which is no state")
    for number, role in enumerate(roles):
        if role == "state" and updated.count(number) != 1:
            raise error_at(PassError, arguments[number], f"state has {updated.count(number)} next values, must have 1")
    for value, argument in zip(terminator(main).operands, result_updates(main), strict=True):
        if argument is not None and value.type != arguments[argument].type:
            raise error_at(
                PassError, arguments[argument], f"state is {arguments[argument].type}, its next value is {value.type}"
            )
    stages = integer_attribute(view.root, NUM_STAGES) or 0
    for argument, pinned in argument_pinned_stages(main).items():
        if pinned[0] < 0 or pinned[-1] >= stages:
            raise error_at(
                PassError,
                arguments[argument],
                f"bactrian.pinned_stages names stages {pinned}, bactrian.num_stages is {stages}",
            )


def _verify_boundary(boundary: ir.Operation, count: int) -> None:
    kinds, reductions = boundary_words(boundary, "kinds"), boundary_words(boundary, "reductions")
    if not len(kinds) == len(reductions) == len(boundary.operands) == len(boundary.results):
        raise error_at(
            PassError, boundary, "the boundary has not one kind, one reduction and one result for each operand"
        )
    for kind, reduction, value, result in zip(kinds, reductions, boundary.operands, boundary.results, strict=True):
        if kind not in KINDS or reduction not in REDUCTIONS:
            raise error_at(PassError, boundary, f"kind {kind!r} or reduction {reduction!r} of the boundary is unknown")
        wanted = list(ir.RankedTensorType(value.type).shape)
        if reduction == "concat":
            wanted[0] *= count
        if list(ir.RankedTensorType(result.type).shape) != wanted:
            raise error_at(
                PassError, boundary, f"{reduction} of {value.type} over {count} microbatches gives {result.type}"
            )
