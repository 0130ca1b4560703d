"""Values that exist once per microbatch and are read below the gradient boundary without passing it."""

from __future__ import annotations

from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.location import name_stack
from bactrian.passes.ir.attributes import MICROBATCH_INDEX
from bactrian.passes.ir.gradient_boundary_op import boundary_words, make_boundary
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import custom_call_target, replace_reads


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


def pass_leaks_through(main: ir.Operation, flow: MainDataflow, roles: list[str]) -> MainDataflow:
    """Make each batch value that is read below the boundary an operand of it: one microbatch's is that of the step.

    What depends on the batch and not on the boundary goes above it.

    Args:
        main: ``@main`` for one microbatch, with a boundary.
        flow: its data flow.
        roles: of each argument.

    Returns:
        The data flow afterwards.
    """
    live = flow.ancestors(list(flow.operands[-1]))
    own = {number for number, role in enumerate(roles) if role == "batch"}
    below, readers, leaks = set[int](), list[int](), list[int]()
    for index, op in enumerate(flow.ops):
        reads = flow.operands[index]
        is_return = index == len(flow.ops) - 1
        if index == flow.boundary or (live[index] and not below.isdisjoint(reads)) or is_return:
            below.update(flow.results[index])
            found = own.intersection(reads) if index != flow.boundary else ()
            if found:
                readers.append(index)
                leaks.extend(value for value in dict.fromkeys(reads) if value in found)
        elif custom_call_target(op) == MICROBATCH_INDEX or not own.isdisjoint(reads):
            own.update(flow.results[index])
    return _through(main, flow, list(dict.fromkeys(leaks)), readers) if leaks else flow


def _through(main: ir.Operation, flow: MainDataflow, values: list[int], readers: list[int]) -> MainDataflow:
    """A boundary that passes these values too, to some ops that read them."""
    boundary = flow.ops[flow.boundary]
    needed = flow.ancestors(values)
    for index in range(flow.boundary + 1, len(flow.ops)):
        if needed[index]:
            flow.ops[index].move_before(boundary)
    more = [flow.values[value] for value in values]
    old = list(boundary.results)
    with ir.InsertionPoint(boundary), boundary.location:
        new = make_boundary(
            [*boundary.operands, *more],
            [value.type for value in (*old, *more)],
            [*boundary_words(boundary, "kinds"), *["aux"] * len(more)],
            [*boundary_words(boundary, "reductions"), *["last"] * len(more)],
        )
    passed = list(new.results)
    for value, result in zip(old, passed, strict=False):
        value.replace_all_uses_with(result)
    for reader in readers:
        for value, result in zip(more, passed[len(old) :], strict=True):
            replace_reads(flow.ops[reader], value, result)
    boundary.erase()
    return MainDataflow.of(main)


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
