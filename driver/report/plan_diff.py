"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bactrian.driver.report.plan_table import layer_range, mesh_text
from bactrian.passes.plan.schema import LayerPlan, Plan, StagePlan
from bactrian.passes.plan.stage_sharding import ShardingFigures, ShardingPlan
from bactrian.passes.plan.step_timing import StageTiming

if TYPE_CHECKING:
    from rich.text import Text


_Record = Plan | StagePlan | LayerPlan | StageTiming | ShardingPlan | ShardingFigures


def render_diff(a: Plan, b: Plan) -> Text:
    """What changes from plan ``a`` to plan ``b``, one line each, or that nothing does."""
    from rich.text import Text

    lines = diff(a, b)
    return Text("\n".join(lines) if lines else "the plans are equal")


def diff(a: Plan, b: Plan) -> list[str]:
    """What differs from plan ``a`` to plan ``b``, one line each, decisions first; empty for equal plans.

    Predictions come with their relative change: ``stage 1: activation_bytes 100 → 150 (+50.0 %)``. Stages are compared one
    by one where both plans have as many.
    """
    lines = _differences(a, b, "", skip={"stages", "layers", "options", "remarks", "transfers"})
    lines += _cut_differences(a, b)
    before, after = dict(a.options), dict(b.options)
    for name in sorted(before.keys() | after.keys()):
        lines += _difference(f"option {name}", before.get(name), after.get(name))
    if a.num_stages == b.num_stages:
        for one, other in zip(a.stages, b.stages, strict=True):
            lines += _stage_differences(one, other, f"stage {one.stage}: ")
    lines += _layer_differences(a, b)
    for name, one, other in (("first", a, b), ("second", b, a)):
        only = (remark for remark in one.remarks if remark not in other.remarks)
        lines += [f"{remark.severity} only in the {name} plan: {remark.message}" for remark in only]
    return lines


def _cut_differences(a: Plan, b: Plan) -> list[str]:
    """Which layers, meshes and devices the stages have; where a stage begins, by the names that its first layer has."""
    cuts, meshes = ([_each(plan, show) for plan in (a, b)] for show in (layer_range, mesh_text))
    lines = [f"layers of stages {cuts[0]} → {cuts[1]}"] if cuts[0] != cuts[1] else []
    if a.num_stages != b.num_stages:
        if meshes[0] != meshes[1]:
            lines.append(f"meshes of stages {meshes[0]} → {meshes[1]}")
        return lines + _difference("devices", a.num_devices, b.num_devices)
    begins = [(s.stage, _first_layer(a, s), _first_layer(b, t)) for s, t in zip(a.stages, b.stages, strict=True)]
    return lines + [f"stage {stage} begins at {old} → {new}" for stage, old, new in begins if old != new]


def _each(plan: Plan, show: Callable[[StagePlan], str]) -> str:
    """Something of all stages in their order; once, with their number, where it is the same of several in a row."""
    runs = [(text, len(list(run))) for text, run in groupby(map(show, plan.stages))]
    return " · ".join(f"{count} × {text}" if count > 1 else text for text, count in runs)


def _first_layer(plan: Plan, stage: StagePlan) -> str:
    names = plan.layers[stage.first_layer].modules if plan.layers else ()
    return f"layer {stage.first_layer}" + (f" ({names[0]})" if names else "")


def _layer_differences(a: Plan, b: Plan) -> list[str]:
    if a.num_layers == b.num_layers and a.layers and b.layers:
        pairs = zip(a.layers, b.layers, strict=True)
        return [line for old, new in pairs for line in _differences(old, new, f"layer {old.layer}: ", skip=set())]
    if bool(a.layers) != bool(b.layers):
        return [f"layer names: only in the {'first' if a.layers else 'second'} plan"]
    return []


def _stage_differences(a: StagePlan, b: StagePlan, prefix: str) -> list[str]:
    lines = _differences(a, b, prefix, skip={"timing", "sharding", "first_layer", "last_layer"})
    for name, old, new in (("timing", a.timing, b.timing), ("sharding", a.sharding, b.sharding)):
        if old is None or new is None:
            lines += [f"{prefix}{name} only in the {'first' if new is None else 'second'} plan"] * (old is not new)
        else:
            lines += _differences(old, new, prefix, skip={"shardings", "compared"})
    if a.sharding is not None and b.sharding is not None:
        lines += _sharding_differences(a.sharding, b.sharding, prefix)
    return lines


def _sharding_differences(a: ShardingPlan, b: ShardingPlan, prefix: str) -> list[str]:
    """Of arguments and of baselines, by their names."""
    specs, figures = [dict(each.shardings) for each in (a, b)], [{f.name: f for f in each.compared} for each in (a, b)]
    lines: list[str] = []
    for path in dict.fromkeys((*specs[0], *specs[1])):
        lines += _difference(f"{prefix}sharding of {path}", specs[0].get(path), specs[1].get(path))
    for name in dict.fromkeys((*figures[0], *figures[1])):
        old, new = (each.get(name) for each in figures)
        if old is None or new is None:
            lines.append(f"{prefix}baseline {name} only in the {'first' if new is None else 'second'} plan")
        else:
            lines += _differences(old, new, f"{prefix}baseline {name}: ", skip=set())
    return lines or [f"{prefix}shardings in another order"] * ((a.shardings, a.compared) != (b.shardings, b.compared))


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
    texts = [f"{value:.6g}" if type(value) is float else _show(value) for value in (a, b)]
    if texts[0] == texts[1]:  # but for the last digits
        texts = [_show(a), _show(b)]
    return [f"{name} {texts[0]} → {texts[1]}{change}"]


def _show(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, tuple):
        return "[" + ", ".join("=".join(map(str, i)) if isinstance(i, tuple) else str(i) for i in value) + "]"
    return f"{value:,}" if type(value) is int else str(value) or '""'
