"""Which user-specified shardings keep a program from fitting into its devices: an irreducible infeasible set."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial

from jaxlib.mlir import ir

from bactrian.driver.planning.memory_refinement import ModuleFactory, clone_unsolved
from bactrian.passes.frame.errors import ConfigError, InfeasiblePlanError
from bactrian.passes.frame.location import name_stack, user_place
from bactrian.passes.ir.attributes import STAGE_SHARDINGS, argument_attributes
from bactrian.passes.ir.meshes import SHARDING
from bactrian.passes.ir.regions import body, main_function, nested_operations
from bactrian.passes.sharding.user_shardings import CONSTRAINT, is_given
from bactrian.passes.sharding.value_names import place_text

_SECONDS = 60.0
_CHANGE = "change such a sharding, or "


def with_conflict(
    error: InfeasiblePlanError, unsolved: ir.Operation, fits: Callable[[ModuleFactory], bool], seconds: float = _SECONDS
) -> InfeasiblePlanError:
    """The error, and a smallest set of specified shardings that excludes every plan: without any one of them there is a
    plan.

    Shardings are left out one by one, as in a deletion filter (Chinneck and Dravnieks 1991): one without which there
    still is no plan is not to blame, and stays out. Other such sets may exist.

    Args:
        error: without any of that.
        unsolved: the module before shardings are chosen. Its context is entered.
        fits: whether there is a plan for the module that this makes.
        seconds: after which no further try is begun; the set may then be larger than it has to be, and the error says
            so.
    """
    given = list(_found(clone_unsolved(unsolved)))
    if not given:
        return error
    deadline = time.monotonic() + seconds
    try:
        if not fits(partial(_with, unsolved, ())):
            count = "the specified sharding" if len(given) == 1 else f"any of the {len(given)} specified shardings"
            return _more(error, f"without {count} it does not fit either", "")
        needed = given
        for name in given:
            if time.monotonic() > deadline:
                names = ", ".join(needed)
                return _more(error, f"without these specified shardings, or some of them, it fits: {names}", _CHANGE)
            others = [each for each in needed if each != name]
            if others and not fits(partial(_with, unsolved, others)):
                needed = others
    except ConfigError:  # nothing was found in time: neither is known
        return error
    if len(needed) == 1:
        return _more(error, f"{needed[0]} alone excludes every plan; without specified shardings it fits", _CHANGE)
    return _more(
        error, f"{' and '.join(needed)} exclude every plan together, and none of them without the others", _CHANGE
    )


def _more(error: InfeasiblePlanError, why: str, fix: str) -> InfeasiblePlanError:
    return InfeasiblePlanError(
        error.message,
        where=error.where,
        why=f"{error.why}; {why}",
        fix=fix + error.fix,
        stage=error.stage,
        needed_bytes=error.needed_bytes,
    )


def _found(module: ir.Module) -> dict[str, list[int | ir.Operation]]:
    """What specifies shardings, for people: arguments by path, and constraints by line, which may be of several ops."""
    main = main_function(module)
    found = dict[str, list[int | ir.Operation]]()
    for number, entry in enumerate(argument_attributes(main)):
        if is_given(entry):
            path = name_stack(body(main).arguments[number].location) or f"argument {number}"
            found.setdefault(f"the sharding of {path}", []).append(number)
    for op in nested_operations(main):
        if op.name == CONSTRAINT:
            place = user_place(op.location)
            at = f"at {place_text(place)}" if place else f"of {op.results[0].type}"
            found.setdefault(f"the constraint {at}", []).append(op)
    return found


def _with(unsolved: ir.Operation, kept: Collection[str]) -> ir.Module:
    """A module of its own in which only these give shardings."""
    module = clone_unsolved(unsolved)
    main = main_function(module)
    entries = argument_attributes(main)
    for name, givers in _found(module).items():
        for giver in () if name in kept else givers:
            if isinstance(giver, int):
                for attribute in (SHARDING, STAGE_SHARDINGS):
                    entries[giver].pop(attribute, None)
            else:
                giver.results[0].replace_all_uses_with(giver.operands[0])
                giver.erase()
    if entries:
        main.attributes["arg_attrs"] = ir.ArrayAttr.get([ir.DictAttr.get(entry) for entry in entries])
    return module
