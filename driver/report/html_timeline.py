"""The timeline of a report: bars in percent of the longest step, an axis with round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bactrian.driver.report.step_timeline import COMPUTING, StepTimeline, TimelineBar, TimelineRow
from bactrian.passes.frame.units import human_seconds
from bactrian.passes.plan.schema import Plan

_KIND_NAMES = {
    "prepare": "preparation",
    "initialize": "initialization",
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward and backward",
    "update": "update",
    "send": "send",
    "receive": "receive",
}
_MOST_LABELS = 600  # numbers in bars, over the whole page: more would not fit
_MOST_TICKS = 8
_ROW_PIXELS = 30


def timeline_section(plan: Plan, predicted: StepTimeline | None, measured: StepTimeline | None) -> dict[str, Any]:
    """What the template needs of timelines; ``timelines`` is empty where there are none."""
    titled = [("Predicted", predicted), ("Measured", measured)]
    shown = [(title, timeline) for title, timeline in titled if timeline is not None and timeline.seconds > 0]
    if not shown:
        return {"timelines": []}
    extent = max(timeline.seconds for _, timeline in shown)
    num_rows = sum(len(timeline.rows) for _, timeline in shown)
    num_bars = sum(len(row.bars) for _, timeline in shown for row in timeline.rows)
    is_labelled = num_bars <= _MOST_LABELS
    kinds = {bar.kind for _, timeline in shown for row in timeline.rows for bar in row.bars}
    return {
        "timelines": [
            {
                "title": title,
                "note": f"{human_seconds(timeline.seconds)}, {100 * timeline.bubble_share:.1f} % of it idle",
                "rows": [_row(row, timeline, extent, is_labelled) for row in timeline.rows],
            }
            for title, timeline in shown
        ],
        "extent": f"{extent:.9g}",
        "name_length": max(len(row.name) for _, timeline in shown for row in timeline.rows),
        "row_height": max(10, min(_ROW_PIXELS, 640 // num_rows)),
        "kinds": [(kind, name) for kind, name in _KIND_NAMES.items() if kind in kinds],
        "ticks": list(_ticks(extent)),
        "timeline_lead": "One row for each stage; numbers are microbatches.",
        "timeline_note": "A bar says more when the pointer is on it. Zoom with the buttons, with the keys + and -, or with Ctrl and the wheel.",
    }


def _row(row: TimelineRow, timeline: StepTimeline, extent: float, is_labelled: bool) -> dict[str, Any]:
    bars = [_bar(bar, extent) for bar in row.bars]
    busy = row.computing_seconds
    share = 100 * busy / timeline.seconds
    return {
        "name": row.name,
        "label": f"{row.name} computes for {human_seconds(busy)} of {human_seconds(timeline.seconds)}, {share:.1f} %",
        "bars": bars,
        "labels": [bar for bar in bars if is_labelled and bar["kind"] in COMPUTING and bar["microbatch"] is not None],
    }


def _bar(bar: TimelineBar, extent: float) -> dict[str, Any]:
    begin, width = 100 * bar.begin / extent, 100 * (bar.end - bar.begin) / extent
    return {
        "kind": bar.kind,
        "microbatch": bar.microbatch,
        "x": f"{begin:.6g}",
        "width": f"{width:.6g}",
        "middle": f"{begin + width / 2:.6g}",
    }


def _ticks(extent: float) -> Iterator[dict[str, Any]]:
    """Ticks at round numbers of seconds; minor ones in between are for who zooms in."""
    step = _round_up(extent / _MOST_TICKS)
    for number in range(math.floor(5 * extent / step * (1 + 1e-9)) + 1):
        seconds = number * step / 5
        major = number % 5 == 0
        at = 100 * seconds / extent
        anchor = "start" if number == 0 else "end" if at > 97 else ""
        yield {"x": f"{at:.6g}", "text": _tick_text(seconds, extent), "major": major, "anchor": anchor}


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 … and so on, at any power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _tick_text(seconds: float, extent: float) -> str:
    scale, unit = (1.0, "s") if extent >= 1 else (1e-3, "ms") if extent >= 1e-3 else (1e-6, "µs")
    return f"{seconds / scale:.4g} {unit}"
