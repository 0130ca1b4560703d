"""Why a value of a plan has its sharding: from the plan or its folder to the figures."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

from jaxlib.mlir import ir

from bactrian.driver.planning.memory_refinement import clone_unsolved
from bactrian.driver.planning.staged_plan import StagedPlan
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import SOLVE, argument_roles, result_updates
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.spec import axes_text
from bactrian.passes.plan.schema import UNSOLVED_FILE, Plan
from bactrian.passes.plan.stage_sharding import ShardingPlan
from bactrian.passes.sharding.explain import Explanation, StageExplainer
from bactrian.passes.sharding.loop_dataflow import capture_unchanged
from bactrian.passes.sharding.solve_snapshot import Unsolved, read_unsolved, unsolved_of
from bactrian.passes.sharding.stage_programs import read_stages, stage_meshes
from bactrian.passes.sharding.value_names import NamedValue, find_value, named_values
from bactrian.passes.sharding.work_from_ir import first_arguments

_EQUAL = 1e-9


def explain_saved(directory: str | Path, text: str, stage: int | None = None, time_limit: float = 60.0) -> Explanation:
    """`explain` for a plan that was saved.

    Args:
        directory: written by ``bactrian plan --save``.
        text, stage, time_limit: as in `explain`.

    Raises:
        ConfigError: as in `explain`; or the folder lacks what is needed.
    """
    begin = time.monotonic()
    folder = Path(directory)
    folder = folder if folder.is_dir() else folder.parent
    plan = Plan.load(directory)
    _check_question(plan, stage, f"the plan in {folder}")
    path = folder / UNSOLVED_FILE
    try:
        saved = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        meshes = {stage.mesh for stage in plan.stages}
        mesh = f"--mesh {axes_text(meshes.pop())} " if len(meshes) == 1 else ""
        raise ConfigError(
            f"cannot explain a value: {folder} has no {UNSOLVED_FILE}",
            why="it is the program before shardings were chosen, from which each choice is made again",
            fix=f"save the plan once more: `bactrian plan script.py:step {mesh}--save {folder}`",
        ) from None
    with make_context():
        unsolved = read_unsolved(saved, str(path))
        if unsolved.fingerprint != plan.fingerprint:
            raise ConfigError(
                f"{UNSOLVED_FILE} and plan.json in {folder} belong to different programs", fix="save the plan once more"
            )
        return _explain(unsolved, plan, f"the plan in {folder}", text, stage, begin + time_limit)


def explain(staged: StagedPlan, text: str, stage: int | None = None, time_limit: float = 60.0) -> Explanation:
    """Which shardings a value could have, what each would cost, and what bound the choice.

    Args:
        staged: planned on a mesh.
        text: the pytree path of an argument or the name stack of an op, or a part that only one has.
        stage: whose value it is, where several stages hold it.
        time_limit: seconds for all of it.

    Raises:
        ConfigError: stages have one device each; no value, or several, are called so.
    """
    deadline = time.monotonic() + time_limit
    _check_question(staged.plan, stage, "the plan")
    snapshot = staged.unsolved
    assert snapshot is not None  # there is a mesh
    with snapshot.context:
        entries = ir.DictAttr(snapshot.attributes[SOLVE])
        unsolved = unsolved_of(clone_unsolved(snapshot), entries, "the plan's cluster")
        return _explain(unsolved, staged.plan, "the plan", text, stage, deadline)


def _check_question(plan: Plan, stage: int | None, source: str) -> None:
    if any(each.sharding is None for each in plan.stages):
        raise ConfigError(
            f"{source} has no shardings to explain",
            why="its stages have one device each, so every value is replicated",
            fix="plan it on a mesh, as in `bactrian plan script.py:step --mesh data=2,model=4 --save DIR`",
        )
    if stage is not None and stage >= plan.num_stages:
        raise ConfigError(f"there is no stage {stage}", why=f"stages go from 0 to {plan.num_stages - 1}")


def _explain(unsolved: Unsolved, plan: Plan, source: str, text: str, stage: int | None, deadline: float) -> Explanation:
    main = main_function(unsolved.module)
    meshes = stage_meshes(unsolved.module)
    limits = [None if stage.sharding is None else stage.sharding.limit_bytes for stage in plan.stages]
    if len(meshes) != plan.num_stages or None in limits:
        raise ConfigError(
            f"{source} does not say what its shardings were chosen for",
            why=f"it has {plan.num_stages} stages with memory limits {limits}, the program has {len(meshes)} on meshes",
            fix="save the plan once more, with `bactrian plan --save`",
        )
    capture_unchanged(main)
    programs = read_stages(unsolved.module, meshes, unsolved.cluster, lambda op, remark: None)
    roles, updates = argument_roles(main), result_updates(main)
    values = named_values(programs)
    firsts = first_arguments(program.reading for program in programs)

    @cache
    def explainer(number: int) -> StageExplainer:
        sharding = plan.stages[number].sharding
        assert sharding is not None and sharding.limit_bytes is not None
        left = max(0.1, deadline - time.monotonic())
        limit = sharding.limit_bytes
        made = StageExplainer(
            programs[number], values, unsolved.strategy, roles, updates, limit, unsolved.given, firsts[number], left
        )
        _check_equal(made, values, sharding, source)
        return made

    value = find_value(values, text, stage, lambda v: explainer(v.stage).sharding(v.number))
    found = explainer(value.stage).explain(value, deadline)
    sharding = plan.stages[value.stage].sharding
    written = dict(sharding.shardings).get(value.name) if sharding is not None and not value.op else None
    if written is None or written == found.sharding:
        return found
    note = f"the stage gets it as {written}: a move that follows a transfer is done by the transfer"
    return replace(found, notes=(*found.notes, note))


def _check_equal(made: StageExplainer, values: list[NamedValue], sharding: ShardingPlan, source: str) -> None:
    """Refuse to explain another choice than the plan's.

    Raises:
        ConfigError: the plan was changed, or could not be found again.
    """
    shardings = dict(sharding.shardings)
    moved = [
        value.name
        for value in values
        if value.stage == made.program.stage
        and not value.op
        and value.number in made.first
        and shardings.get(value.name, made.sharding(value.number)) != made.sharding(value.number)
    ]
    seconds = float(made.solution.cost)
    if not moved and abs(seconds - sharding.seconds) <= _EQUAL * sharding.seconds:
        return
    what = (
        f"{moved[0]} has another sharding" if moved else f"a step takes {seconds:.6g} s, not {sharding.seconds:.6g} s"
    )
    if sharding.is_optimal:
        why = f"solved again, {what}: the plan was changed, or made by another version"
        fix = "save the plan once more, with `bactrian plan --save`"
    else:
        why = f"solved again, {what}: the plan was not proved optimal, so the time limit decides what is found"
        fix = "give --time-limit more seconds"
    raise ConfigError(f"re-solving did not reproduce {source}", why=why, fix=fix)
