"""The part of a plan's table that is about shardings on a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bactrian.passes.frame.units import human_bytes, human_seconds
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan

if TYPE_CHECKING:
    from rich.table import Table

_QUIET = "grey50"
_BEST = "#3a7d7c"


def sharding_grid(plan: ShardingPlan, stage: int | None) -> Table:
    """What is predicted of the chosen shardings: time, communication by kind, memory by class.

    Args:
        plan: of one stage.
        stage: its number, where there are several.
    """
    from rich.table import Table

    gap = 1 - plan.bound_seconds / plan.seconds if plan.seconds else 0.0
    proof = "proved optimal in the cost model" if plan.is_optimal else f"at most {100 * gap:.2f} % above the optimum"
    if plan.strategy != "auto":
        proof = f"{plan.strategy}; the rest {proof}"
    if plan.given:
        proof += f", with {plan.given} of {len(plan.shardings)} arguments' shardings given"
    sent = " · ".join(f"{kind.replace('_', '-')} {human_bytes(nbytes)}" for kind, nbytes in plan.sent_bytes)
    held = " · ".join(f"{name} {human_bytes(nbytes)}" for name, nbytes in plan.memory_bytes)
    total = sum(nbytes for _, nbytes in plan.memory_bytes)
    limit = "" if plan.limit_bytes is None else f" of {human_bytes(plan.limit_bytes)}"
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row("shardings" if stage is None else f"stage {stage}", proof)
    grid.add_row(
        "sends", f"{sent}, in {human_seconds(plan.communication_seconds)}: a device, a step" if sent else "nothing"
    )
    grid.add_row("holds", f"{human_bytes(total)}{limit} per device: {held}")
    if plan.peak_bytes is not None:
        within = f", {human_bytes(plan.temporary_bytes)} of it copies and temporaries" if plan.temporary_bytes else ""
        grid.add_row("peak", f"{human_bytes(plan.peak_bytes)} per device, predicted of XLA for CPUs{within}")
    return grid


def compared_table(plan: ShardingPlan) -> Table:
    """The chosen shardings beside the baselines, the fastest first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    total = sum(nbytes for _, nbytes in plan.memory_bytes)
    name = "chosen" if plan.strategy == "auto" else f"chosen ({plan.strategy})"
    chosen = ShardingFigures(name, plan.seconds, plan.communication_seconds, total)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.header_style = "bold"
    table.add_column("strategy", no_wrap=True)
    for header in ("step", "of it communication", "memory", "to chosen"):
        table.add_column(header, justify="right", no_wrap=True)
    fitting = sorted((row for row in plan.compared if row.seconds is not None), key=lambda row: row.seconds or 0.0)
    for row in (chosen, *fitting, *(row for row in plan.compared if row.seconds is None)):
        style = _BEST if row is chosen else "default"
        if row.seconds is None:
            table.add_row(row.name, Text("none found that fits", style=_QUIET), "", "", "", style=style)
            continue
        ratio = f"{row.seconds / plan.seconds:.2f} ×" if plan.seconds else ""
        table.add_row(
            row.name,
            human_seconds(row.seconds),
            human_seconds(row.communication_seconds),
            human_bytes(row.memory_bytes),
            "" if row is chosen else ratio,
            style=style,
        )
    return table
