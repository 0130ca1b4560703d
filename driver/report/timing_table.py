"""The time of making a step, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bactrian.passes.frame.phase_times import PhaseTime, Timing
from bactrian.passes.frame.units import human_seconds

if TYPE_CHECKING:
    from rich.table import Table


def render_timing(timing: Timing) -> Table:
    """A row per phase in their order, parts below it; shares are of all phases."""
    from rich import box
    from rich.table import Table

    total = timing.seconds
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0), pad_edge=False)
    table.header_style = table.footer_style = "bold"
    table.add_column("phase", "all", no_wrap=True)
    table.add_column("runs", "", justify="right")
    table.add_column("time", human_seconds(total), justify="right")
    table.add_column("share", "", justify="right")
    for depth, phase in _rows(timing.phases):
        share = f"{100 * phase.seconds / total:.1f} %" if total else ""
        table.add_row("  " * depth + phase.name, str(phase.runs), human_seconds(phase.seconds), share)
    return table


def timing_json(phases: Sequence[PhaseTime]) -> list[dict[str, Any]]:
    """The phases as plain data; ``parts`` only where there are some."""
    return [
        {"phase": phase.name, "seconds": phase.seconds, "runs": phase.runs}
        | ({"parts": timing_json(phase.parts)} if phase.parts else {})
        for phase in phases
    ]


def _rows(phases: Sequence[PhaseTime], depth: int = 0) -> Iterator[tuple[int, PhaseTime]]:
    for phase in phases:
        yield depth, phase
        yield from _rows(phase.parts, depth + 1)
