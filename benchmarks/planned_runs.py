"""Plans of the programs, made here, saved, and measured in processes of their own."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from pipeline import CORES, Row, worker
from programs import PROGRAMS

from bactrian.passes.plan.schema import Plan


def make_plan(model: str, cluster: Path, folder: Path, **decisions: Any) -> Plan:
    """Plan a program for a cluster, and save the plan; what is not decided is found."""
    step, state, batch = PROGRAMS[model]()
    planned = step.with_options(cluster=str(cluster), **decisions).trace(state, batch).plan()
    planned.save(folder)
    return planned.plan


def measure(model: str, cluster: Path, folder: Path, steps: int) -> Row:
    """Steps of a saved plan: a rank with a core for each stage, or one stage on several devices of one process."""
    plan = Plan.load(folder)
    options = ["--model", model, "--plan", str(folder), "--cluster", str(cluster), "--steps", str(steps)]
    if plan.num_devices == 1:
        options += ["--core", str(CORES[0])]
    wide = plan.num_devices // plan.num_stages
    got = worker("pipeline", *options, ranks=None if plan.num_devices == 1 else plan.num_stages, devices=wide)
    return got | {"measured_seconds": median(got["seconds"])}


def name_of(plan: Plan) -> str:
    """What a plan decides, in words.

    >>> name_of(plan)
    '2 stages from layers 0, 3, 8 microbatches, 1f1b'
    """
    firsts = ", ".join(str(stage.first_layer) for stage in plan.stages)
    cut = f"{plan.num_stages} stages from layers {firsts}" if plan.num_stages > 1 else "1 stage"
    wide = f" on {plan.num_devices} devices" if plan.num_devices > plan.num_stages else ""
    return f"{cut}{wide}, {plan.num_microbatches} microbatches, {plan.schedule}"
