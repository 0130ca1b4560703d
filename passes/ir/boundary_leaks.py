"""Values that exist once per microbatch and are read below the gradient boundary without passing it."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.location import name_stack
from bactrian.passes.ir.attributes import MICROBATCH_INDEX
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import custom_call_target


def report_leaks(flow: MainDataflow, roles: list[str], ctx: PassContext) -> bool:
    """Report everything below the boundary that reads a batch value but through the boundary.

    Such values flow from the batch arguments and the microbatch's number through every op but the boundary. An op that
    the result needs and the boundary doesn't is below it: where it reads such a value, that is a leak.

    Args:
        flow: ``@main``, with a boundary.
        roles: of each argument; "" where it has none.
        ctx: where errors are reported.

    Returns:
        Whether there are leaks.
    """
    above = flow.ancestors(list(flow.operands[flow.boundary]))
    live = flow.ancestors(list(flow.operands[-1]))
    leaks = False
    sources: dict[int, frozenset[str]] = {
        number: frozenset({f"batch argument {argument_name(flow.values[number])}"})
        for number, role in enumerate(roles)
        if role == "batch"
    }
    for index, op in enumerate(flow.ops):
        if custom_call_target(op) == MICROBATCH_INDEX:
            sources[flow.results[index][0]] = frozenset({f"{MICROBATCH_INDEX}()"})
            continue
        if index == flow.boundary or not (above[index] or live[index]):
            continue
        found = {sources[value] for value in flow.operands[index] if value in sources}
        names = frozenset[str]().union(*found) if len(found) > 1 else next(iter(found), None)
        if not names:
            continue
        if above[index]:
            sources.update(dict.fromkeys(flow.results[index], names))
        else:
            _report(op, f"{op.name} below the gradient boundary", names, ctx)
            leaks = True
    for number, value in enumerate(flow.operands[-1]):
        if value in sources:
            producer = flow.producer[value]
            owner = flow.ops[producer] if producer >= 0 else flow.values[value]
            _report(owner, f"result {number} of the step", sources[value], ctx)
            leaks = True
    return leaks


def argument_name(argument: ir.Value) -> str:
    """The user's name of an argument, its pytree path; else its number."""
    return name_stack(argument.location) or f"%arg{ir.BlockArgument(argument).arg_number}"


def _report(where: ir.Operation | ir.Value, what: str, names: frozenset[str], ctx: PassContext) -> None:
    ctx.error(
        where,
        f"{what} depends on {', '.join(sorted(names))} without passing the boundary",
        why="above the boundary a value exists once per microbatch, below it once per step",
        fix="return the value from the differentiated function as aux (has_aux=True) and use that",
    )
