"""``infer-phases``: which ops run forward, backward, and once per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxlib.mlir import ir

from bactrian.passes.frame.base import Pass, PassContext, Statistic
from bactrian.passes.ir.attributes import (
    BACKWARD,
    FORWARD,
    MICROBATCH_INDEX,
    NUM_MICROBATCHES,
    UPDATE,
    argument_roles,
    integer_attribute,
    set_phase,
)
from bactrian.passes.ir.boundary_leaks import pass_leaks_through, report_leaks
from bactrian.passes.ir.gradient_boundary_op import boundary_words, find_boundary, make_boundary
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import body, custom_call_target, main_function, replace_reads, top_level

_FORWARD_KINDS = ("loss", "aux", "output")


@dataclass(frozen=True)
class InferPhases(Pass):
    """Mark every op as forward, backward or update.

    The forward phase is what the loss, the aux values and a forward pipeline's outputs depend on. The backward phase is
    everything else above the gradient boundary. The update phase is what the results need apart from the boundary's
    operands; ops that both sides need (a learning rate, a cast parameter) exist twice afterwards, so that the update
    reads nothing of a microbatch but what went through the boundary. With one microbatch, what the update reads of the
    batch is made to go through it. Ops that nothing needs are dropped, and so are operands of
    the boundary whose result nothing needs (the gradient of a frozen parameter).

    Requires: one straight-line ``@main`` with one gradient boundary (``verify-program``).
    Ensures: ``bactrian.phase`` on every op but the boundary and the return; forward and backward ops stand before the
    boundary, update ops after it.

    Input:

    ```mlir
    func.func public @main(%w: tensor<4xf32> {bactrian.role = "state"}, %x: tensor<4xf32> {bactrian.role = "batch"})
        -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32>) {
      %y = stablehlo.multiply %w, %x : tensor<4xf32>
      %g = stablehlo.negate %x : tensor<4xf32>
      %b:2 = stablehlo.custom_call @bactrian.gradient_boundary(%y, %g) {mhlo.backend_config =
        {kinds = "aux,gradient", reductions = "last,mean"}}
        : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
      %n = stablehlo.subtract %w, %b#1 : tensor<4xf32>
      return %n, %b#0 : tensor<4xf32>, tensor<4xf32>
    }
    ```

    Output:

    ```mlir
    func.func public @main(%arg0: tensor<4xf32> {bactrian.role = "state"}, %arg1: tensor<4xf32> {bactrian.role = "batch"}) -> (tensor<4xf32> {bactrian.updates = 0 : i64}, tensor<4xf32>) {
      %0 = stablehlo.multiply %arg0, %arg1 {bactrian.phase = "forward"} : tensor<4xf32>
      %1 = stablehlo.negate %arg1 {bactrian.phase = "backward"} : tensor<4xf32>
      %2:2 = stablehlo.custom_call @bactrian.gradient_boundary(%0, %1) {mhlo.backend_config = {kinds = "aux,gradient", reductions = "last,mean"}} : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>)
      %3 = stablehlo.subtract %arg0, %2#1 {bactrian.phase = "update"} : tensor<4xf32>
      return %3, %2#0 : tensor<4xf32>, tensor<4xf32>
    }
    ```

    The aux value's op is forward, the gradient's is backward, and the new state's is update.
    """

    name: ClassVar[str] = "infer-phases"
    summary: ClassVar[str] = "mark every op as forward, backward or update"
    requires: ClassVar[tuple[str, ...]] = ("formed", "flat", "typed", "marked", "with-boundary")
    ensures: ClassVar[tuple[str, ...]] = ("verified", "phased")
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("forward", "ops of the forward phase"),
        Statistic("backward", "ops of the backward phase"),
        Statistic("update", "ops of the update phase"),
        Statistic("cloned", "batch-independent ops that both sides of the boundary need"),
        Statistic("dropped", "ops that no result needs"),
    )

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        """Write ``bactrian.phase`` and order the ops around the boundary."""
        main = main_function(module)
        boundary = find_boundary(main)
        _hoist_microbatch_index(main)
        flow = MainDataflow.of(main)
        if integer_attribute(module.operation, NUM_MICROBATCHES) == 1:
            flow = pass_leaks_through(main, flow, argument_roles(main))
            boundary = flow.ops[flow.boundary]
        forward = _forward_ops(flow, boundary)  # before the loss goes: nothing may need it but the gradients
        flow = _drop_unused_results(main, flow, ctx)
        # Again after `verify-program`: a microbatch's number that was inside of a loop is an op of @main only now.
        if report_leaks(flow, argument_roles(main), ctx):
            return
        feeds_boundary = flow.ancestors(list(flow.operands[flow.boundary]))
        feeds_results = _feeds_results(flow)
        _order_update(flow, feeds_boundary, feeds_results, ctx)
        for index, op in enumerate(flow.ops[:-1]):
            if index != flow.boundary and feeds_boundary[index]:
                phase = FORWARD if op in forward else BACKWARD
                set_phase(op, phase)
                ctx.count(phase)
        for index in range(len(flow.ops) - 2, -1, -1):
            if index != flow.boundary and not feeds_boundary[index] and not feeds_results[index]:
                flow.ops[index].erase()
                ctx.count("dropped")


def _hoist_microbatch_index(main: ir.Operation) -> None:
    """Take the microbatch's number out of loops and branches, so that it is a value like any other."""
    nested: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if custom_call_target(op) == MICROBATCH_INDEX and op.block != body(main):
            nested.append(op)
        return ir.WalkResult.ADVANCE

    main.walk(visit)
    for op in nested:
        op.move_before(top_level(op, body(main)))


def _forward_ops(flow: MainDataflow, boundary: ir.Operation) -> set[ir.Operation]:
    """What the loss, the aux values and the outputs depend on."""
    reads = zip(flow.operands[flow.boundary], boundary_words(boundary, "kinds"), strict=True)
    needed = flow.ancestors([value for value, kind in reads if kind in _FORWARD_KINDS])
    return {op for op, is_needed in zip(flow.ops, needed, strict=True) if is_needed}


def _drop_unused_results(main: ir.Operation, flow: MainDataflow, ctx: PassContext) -> MainDataflow:
    """Drop dead ops of the update, then the boundary's operands whose results nothing reads.

    Returns:
        The data flow afterwards.
    """
    boundary = flow.ops[flow.boundary]
    feeds_results = _feeds_results(flow)
    changed = not all(feeds_results[flow.boundary + 1 :])
    for index in range(len(flow.ops) - 2, flow.boundary, -1):
        if not feeds_results[index]:
            flow.ops[index].erase()
            ctx.count("dropped")
    used = [n for n, result in enumerate(boundary.results) if next(iter(result.uses), None) is not None]
    if len(used) == len(boundary.results):
        return MainDataflow.of(main) if changed else flow
    kinds, reductions = boundary_words(boundary, "kinds"), boundary_words(boundary, "reductions")
    old = list(boundary.results)
    with ir.InsertionPoint(boundary), boundary.location:
        new = make_boundary(
            [boundary.operands[n] for n in used],
            [old[n].type for n in used],
            [kinds[n] for n in used],
            [reductions[n] for n in used],
        )
    for n, result in zip(used, new.results, strict=True):
        old[n].replace_all_uses_with(result)
    boundary.erase()
    return MainDataflow.of(main)


def _feeds_results(flow: MainDataflow) -> list[bool]:
    """Ops that the results need, not looking through the boundary; the return is one of them."""
    seen = [False] * len(flow.ops)
    stack = [flow.producer[value] for value in flow.operands[-1]]
    while stack:
        op = stack.pop()
        if op < 0 or op == flow.boundary or seen[op]:
            continue
        seen[op] = True
        stack.extend(flow.producer[value] for value in flow.operands[op])
    seen[-1] = True
    return seen


def _order_update(flow: MainDataflow, feeds_boundary: list[bool], feeds_results: list[bool], ctx: PassContext) -> None:
    """Move update ops behind the boundary and mark them; what both sides need is cloned there."""
    boundary, last = flow.boundary, len(flow.ops) - 1
    anchor = flow.ops[boundary + 1]
    clones: dict[int, ir.Value] = {}
    for index, op in enumerate(flow.ops):
        if index == boundary or not feeds_results[index]:
            continue
        target = op
        if feeds_boundary[index]:
            target = op.clone(ip=ir.InsertionPoint(anchor)).operation
            for old, new in zip(flow.results[index], target.results, strict=True):
                clones[old] = new
            ctx.count("cloned")
        elif index < boundary:
            op.move_before(anchor)
        for value in set(flow.operands[index]):
            if value in clones:
                replace_reads(target, flow.values[value], clones[value])
        if index != last:
            set_phase(target, UPDATE)
            ctx.count(UPDATE)
