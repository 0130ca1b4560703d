"""Why a value of a saved plan has its layout: from the folder to the figures."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import argument_roles, result_updates
from bactrian.passes.ir.regions import main_function
from bactrian.passes.plan.schema import UNSOLVED_FILE, Plan, axes_words
from bactrian.passes.plan.stage_sharding import ShardingPlan
from bactrian.passes.sharding.explain import Explanation, StageExplainer
from bactrian.passes.sharding.solve_snapshot import Unsolved, read_unsolved
from bactrian.passes.sharding.stage_programs import StageProgram, read_stages, stage_meshes
from bactrian.passes.sharding.value_names import NamedValue, find_value, named_values

_EQUAL = 1e-9


def explain_value(directory: str | Path, text: str, stage: int | None = None, time_limit: float = 60.0) -> Explanation:
    """Which layouts a value could have, what each would cost, and what bound the choice.

    Args:
        directory: written by ``bactrian plan --save``.
        text: the pytree path of an argument or the name stack of an op, or a part that only one has.
        stage: whose value it is, where several stages hold it.
        time_limit: seconds for all of it.

    Raises:
        ConfigError: the folder has no plan on a mesh, or lacks what is needed; no value, or several, are called so.
    """
    begin = time.monotonic()
    folder = Path(directory)
    folder = folder if folder.is_dir() else folder.parent
    plan = Plan.load(directory)
    if any(each.sharding is None for each in plan.stages):
        raise ConfigError(
            f"the plan in {folder} has no layouts to explain",
            why="its stages have one device each, so every value is whole",
            fix="plan it on a mesh, as in `bactrian plan script.py:step --mesh data=2,model=4 --save DIR`",
        )
    if stage is not None and stage >= plan.num_stages:
        raise ConfigError(f"there is no stage {stage}", why=f"stages go from 0 to {plan.num_stages - 1}")
    path = folder / UNSOLVED_FILE
    try:
        saved = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        mesh = axes_words(plan.stages[0].mesh)
        raise ConfigError(
            f"cannot explain a value: {folder} has no {UNSOLVED_FILE}",
            why="the choice is made again from the program as it was before, with one layout held fast at a time",
            fix=f"save the plan once more: `bactrian plan script.py:step --mesh {mesh} --save {folder}`",
        ) from None
    with make_context():
        unsolved = read_unsolved(saved, str(path))
        if unsolved.fingerprint != plan.fingerprint:
            raise ConfigError(
                f"{UNSOLVED_FILE} and plan.json in {folder} belong to different programs", fix="save the plan once more"
            )
        return _explain(unsolved, plan, folder, text, stage, begin + time_limit)


def _explain(
    unsolved: Unsolved, plan: Plan, folder: Path, text: str, stage: int | None, deadline: float
) -> Explanation:
    main = main_function(unsolved.module)
    meshes = stage_meshes(unsolved.module)
    programs = read_stages(unsolved.module, meshes, unsolved.cluster, lambda op, remark: None)
    roles, updates = argument_roles(main), result_updates(main)
    values = named_values(programs)

    @cache
    def explainer(number: int) -> StageExplainer:
        sharding = plan.stages[number].sharding
        assert sharding is not None and sharding.limit_bytes is not None
        first = _first_read(programs, number)
        left = max(0.1, deadline - time.monotonic())
        limit = sharding.limit_bytes
        made = StageExplainer(
            programs[number], values, unsolved.strategy, roles, updates, limit, unsolved.given, first, left
        )
        _check_equal(made, values, sharding, folder)
        return made

    value = find_value(values, text, stage, lambda v: explainer(v.stage).layout(v.number))
    found = explainer(value.stage).explain(value, deadline)
    sharding = plan.stages[value.stage].sharding
    written = dict(sharding.layouts).get(value.name) if sharding is not None and not value.op else None
    if written is None or written == found.layout:
        return found
    note = f"the stage gets it as {written}: a move that follows a transfer is done by the transfer"
    return replace(found, notes=(*found.notes, note))


def _first_read(programs: list[StageProgram], stage: int) -> frozenset[int]:
    """The arguments that a stage is the first to read."""
    own, before = programs[stage].reading, programs[:stage]
    claimed = {number for program in before for number in program.reading.work.inputs}
    return frozenset(n for n in own.work.inputs if n < own.flow.num_arguments and n not in claimed)


def _check_equal(made: StageExplainer, values: list[NamedValue], sharding: ShardingPlan, folder: Path) -> None:
    """Refuse to explain another choice than the plan's.

    Raises:
        ConfigError: the plan was changed, or could not be found again.
    """
    layouts = dict(sharding.layouts)
    moved = [
        value.name
        for value in values
        if value.stage == made.program.stage
        and not value.op
        and value.number in made.first
        and layouts.get(value.name, made.layout(value.number)) != made.layout(value.number)
    ]
    seconds = float(made.solution.cost)
    if not moved and abs(seconds - sharding.seconds) <= _EQUAL * sharding.seconds:
        return
    what = f"{moved[0]} has another layout" if moved else f"a step takes {seconds:.6g} s, not {sharding.seconds:.6g} s"
    if sharding.is_optimal:
        why = f"solved again, {what}: the plan was changed, or made by another version"
        fix = "save the plan once more, with `bactrian plan --save`"
    else:
        why = f"solved again, {what}: the plan was not proved optimal, so the time limit decides what is found"
        fix = "give --time-limit more seconds"
    raise ConfigError(f"cannot find the choice of the plan in {folder} again", why=why, fix=fix)
