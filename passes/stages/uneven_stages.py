"""What to tell of stages that take far from equally long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from jaxlib.mlir import ir

from bactrian.passes.frame.base import PassContext
from bactrian.passes.frame.location import name_stack
from bactrian.passes.ir.attributes import FORWARD, UPDATE
from bactrian.passes.ir.main_dataflow import MainDataflow
from bactrian.passes.ir.regions import has_product
from bactrian.passes.sharding.loop_dataflow import WHILE

FAR = 1.25
"""How many times an even share the slowest stage may take without a word: a fifth of the others' time is lost then."""
_IDLE = 0.1  # of an even share: a stage that takes less has next to nothing to do
_MOSTLY = 0.4  # of a stage's time
_LOOPS = (
    "write the loop over layers in Python, each with parameters of its own, as in a list of them, not one array for all; "
    "or use fewer stages"
)


def warn_of_uneven_stages(
    flow: MainDataflow,
    seconds: Sequence[float],
    stages: Sequence[int | None],
    devices: Sequence[int],
    is_pinned: bool,
    ctx: PassContext,
) -> None:
    """Tell if the slowest stage is far from an even share, or if one is idle, with the op that is most to blame.

    Args:
        flow: of ``@main``.
        seconds: that each op takes of a step.
        stages: of each op.
        devices: of each stage; its time is taken to be shared by them.
        is_pinned: whether another step has placed arguments.
        ctx: told of it.
    """
    taken = [defaultdict[str, float](float) for _ in devices]
    for index, (stage, phase) in enumerate(zip(stages, flow.phases, strict=True)):
        if stage is not None and phase is not None:
            taken[stage][phase] += seconds[index] / devices[stage]
    totals = [sum(each.values()) for each in taken]
    share = sum(total * count for total, count in zip(totals, devices, strict=True)) / sum(devices)
    if not share:
        return
    slowest = max(range(len(devices)), key=totals.__getitem__)
    idle = [stage for stage, total in enumerate(totals) if total < _IDLE * share]
    if totals[slowest] <= FAR * share and not idle:
        return
    message = f"stage {slowest} takes {totals[slowest] / share:.2f} times an even share of the predicted time"
    if idle:
        message += f"; next to nothing is left for stage{'s' * (len(idle) > 1)} {', '.join(map(str, idle))}"
    own = [index for index, stage in enumerate(stages) if stage == slowest]
    forward = [index for index in own if flow.phases[index] == FORWARD]
    heaviest = max(forward or own, key=seconds.__getitem__)
    part = seconds[heaviest] / devices[slowest] / (taken[slowest][FORWARD] or totals[slowest])
    heavy, updates_most = flow.ops[heaviest], taken[slowest][UPDATE] > _MOSTLY * totals[slowest]
    takes = f"one {heavy.name} takes {100 * part:.0f} % of its forward phase, and an op is not cut"
    read_elsewhere = _read_elsewhere(flow, stages, slowest)
    if is_pinned:
        why, fix = "another step has placed its state on stages", "pass bactrian.gather(...) of it to place it anew"
    elif part > 0.5 and heavy.name == WHILE:
        why, fix = takes, _LOOPS
    elif read_elsewhere and (updates_most or not has_product(heavy)):
        why, fix = read_elsewhere, "give each layer parameters of its own, as in a list of them, not one array for all"
    elif updates_most:
        why = f"the update of its state takes more than {100 * _MOSTLY:.0f} % of it"
        fix = "give each layer parameters of its own, or use more microbatches or fewer stages"
    elif part > 0.5:
        why, fix = takes, "use fewer stages, or a mesh for each"
    else:
        why, fix = "stages are made of whole layers", "use fewer stages, or more layers with plan(num_layers=...)"
    ctx.warning(heavy, message, why=why, fix=fix)


def warn_of_uneven_meshes(main: ir.Operation, seconds: Sequence[float], ctx: PassContext) -> None:
    """Tell if the slowest stage is far from an even share with the shardings that were chosen.

    Args:
        main: ``@main``.
        seconds: of each stage in a step.
        ctx: told of it.
    """
    share = sum(seconds) / len(seconds)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    if seconds[slowest] > FAR * share:
        ctx.warning(
            main,
            f"with its shardings, stage {slowest} takes {seconds[slowest] / share:.2f} times an even share of the "
            "predicted time",
            why="layers were put into stages by their times on one device",
            fix="give the first layer of each stage in a plan, or use fewer stages on larger meshes",
        )


def _read_elsewhere(flow: MainDataflow, stages: Sequence[int | None], slowest: int) -> str:
    """The largest argument that a stage updates and others read, too; nothing where there is none."""
    users, found = flow.users(), dict[int, list[int]]()
    for argument in range(flow.num_arguments):
        updated = any(stages[user] == slowest and flow.phases[user] == UPDATE for user in users[argument])
        read = sorted({stage for user in users[argument] if (stage := stages[user]) is not None})
        if updated and len(read) > 1:
            found[argument] = read
    if not found:
        return ""
    largest = max(found, key=flow.sizes.__getitem__)
    name = name_stack(flow.values[largest].location) or f"argument {largest}"
    return f"it updates {name}, which stages {', '.join(map(str, found[largest]))} read"
