"""What differs between two plans."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from bactrian.passes.plan.schema import LayerPlan, Plan, StagePlan
from bactrian.passes.plan.step_timing import StageTiming

if TYPE_CHECKING:
    from rich.text import Text


_Record = Plan | StagePlan | LayerPlan | StageTiming


def render_diff(a: Plan, b: Plan) -> Text:
    """What changes from plan ``a`` to plan ``b``, one line each, or that nothing does."""
    from rich.text import Text

    lines = diff(a, b)
    return Text("\n".join(lines) if lines else "the plans are equal")


def diff(a: Plan, b: Plan) -> list[str]:
    """What differs from plan ``a`` to plan ``b``, one line each, decisions first; empty for equal plans.

    Predictions come with their relative change: ``stage 1: activation_bytes 100 → 150 (+50.0 %)``.
    """
    lines = _differences(a, b, "", skip={"stages", "layers", "options", "remarks", "transfers"})
    before, after = dict(a.options), dict(b.options)
    for name in sorted(before.keys() | after.keys()):
        lines += _difference(f"option {name}", before.get(name), after.get(name))
    for stage in range(max(a.num_stages, b.num_stages)):
        if stage >= b.num_stages:
            lines.append(f"stage {stage}: only in the first plan")
        elif stage >= a.num_stages:
            lines.append(f"stage {stage}: only in the second plan")
        else:
            lines += _stage_differences(a.stages[stage], b.stages[stage], f"stage {stage}: ")
    if a.num_layers == b.num_layers and a.layers and b.layers:
        for old, new in zip(a.layers, b.layers, strict=True):
            lines += _differences(old, new, f"layer {old.layer}: ", skip=set())
    elif bool(a.layers) != bool(b.layers):
        lines.append(f"layer names: only in the {'first' if a.layers else 'second'} plan")
    for name, one, other in (("first", a, b), ("second", b, a)):
        only = (remark for remark in one.remarks if remark not in other.remarks)
        lines += [f"{remark.severity} only in the {name} plan: {remark.message}" for remark in only]
    return lines


def _stage_differences(a: StagePlan, b: StagePlan, prefix: str) -> list[str]:
    lines = _differences(a, b, prefix, skip={"timing"})
    if a.timing is None or b.timing is None:
        return lines + _difference(f"{prefix}timing", a.timing, b.timing)
    return lines + _differences(a.timing, b.timing, prefix, skip=set())


def _differences(a: _Record, b: _Record, prefix: str, skip: set[str]) -> list[str]:
    lines: list[str] = []
    for item in fields(a):
        if item.name not in skip:
            lines += _difference(prefix + item.name, getattr(a, item.name), getattr(b, item.name))
    return lines


def _difference(name: str, a: Any, b: Any) -> list[str]:
    if a == b and type(a) is type(b):
        return []
    change = ""
    if type(a) in (int, float) and type(b) in (int, float) and a:
        change = f" ({100 * (b - a) / abs(a):+.1f} %)"
    return [f"{name} {_show(a)} → {_show(b)}{change}"]


def _show(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, tuple):
        return "[" + ", ".join("=".join(map(str, i)) if isinstance(i, tuple) else str(i) for i in value) + "]"
    return f"{value:,}" if type(value) is int else str(value) or '""'
