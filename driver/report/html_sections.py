"""The sections of a report but for the timeline: what the template writes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bactrian.driver.planning.held_memory import HeldMemory
from bactrian.driver.report.cut_reasons import plan_reasons
from bactrian.driver.report.plan_table import has_peak, kept_text, layer_range, mesh_text, place_text, sent_text
from bactrian.driver.report.step_timeline import TRANSFERRING, StepTimeline, TimelineRow
from bactrian.passes.frame.units import human_bytes, human_count, human_seconds
from bactrian.passes.machine.spec import Spec
from bactrian.passes.plan.schema import LayerPlan, Plan, StagePlan
from bactrian.passes.plan.stage_sharding import ShardingPlan

_NUM_AXIS_COLOURS = 4
_CURVE_WIDTH = 400
_SHARE_KINDS = (
    ("forward_backward", "forward and backward"),
    ("update", "once per step"),
    ("receive", "waiting for transfers"),
    ("idle", "idle"),
)


def tiles(plan: Plan, predicted: StepTimeline | None, measured: StepTimeline | None) -> list[dict[str, str]]:
    """The figures at the head."""
    found = [("Step", human_seconds(plan.predicted_step_seconds), "predicted")]
    if measured is not None:
        found.append(
            ("Measured step", human_seconds(measured.seconds), _against(measured.seconds, plan.predicted_step_seconds))
        )
    if predicted is not None and plan.num_stages > 1:
        found.append(("Idle", f"{100 * predicted.bubble_share:.1f} %", "of the stages' time"))
    slowest = max(plan.stages, key=lambda stage: stage.predicted_seconds or 0.0)
    if slowest.predicted_seconds is not None and plan.num_stages > 1:
        found.append(("Slowest stage", str(slowest.stage), f"busy {human_seconds(slowest.predicted_seconds)}"))
    limits = [stage.sharding.limit_bytes for stage in plan.stages if stage.sharding is not None]
    limit = min((limit for limit in limits if limit is not None), default=None)
    found.append(
        (
            "Memory per device",
            human_bytes(plan.peak_memory_bytes),
            f"at most, of {human_bytes(limit)}" if limit else "at most",
        )
    )
    found.append(("Devices", f"{plan.num_devices:,}", plan.platform))
    return [{"name": name, "value": value, "note": note} for name, value, note in found]


def _against(measured: float, predicted: float | None) -> str:
    if not predicted:
        return "the last of the trace"
    return f"{100 * (measured / predicted - 1):+.1f} % to predicted"


def stages_section(plan: Plan) -> dict[str, Any]:
    """Layers in stages, and the figures of each stage."""
    busy = [stage.predicted_seconds for stage in plan.stages]
    memory = [None if stage.device_memory_bytes is None else float(stage.device_memory_bytes) for stage in plan.stages]
    mean = sum(layer.seconds or 0.0 for layer in plan.layers) / plan.num_layers
    stages = [
        {
            "number": stage.stage,
            "range": layer_range(stage),
            "mesh": mesh_text(stage),
            "place": place_text(stage),
            "layers": [_layer(plan, number, mean) for number in range(stage.first_layer, stage.last_layer + 1)],
            "busy": _meter(busy, stage.stage, human_seconds(stage.predicted_seconds)),
            "memory": _meter(memory, stage.stage, human_bytes(stage.device_memory_bytes)),
            "parameters": human_count(stage.num_parameters),
            "kept": kept_text(stage),
            "sent_on": sent_text(stage.sent_bytes_forward),
            "sent_back": sent_text(stage.sent_bytes_backward),
        }
        for stage in plan.stages
    ]
    note = "Kept and sent are of one microbatch and of the whole stage."
    if sum(stage.update_sent_bytes or 0 for stage in plan.stages):
        note += f" The update sends {human_bytes(sum(stage.update_sent_bytes or 0 for stage in plan.stages))} between stages, once per step."
    if measured := [stage.measured for stage in plan.stages if stage.measured is not None]:
        model = ", ".join(human_seconds(each.model_seconds) for each in measured)
        note += f" {len(measured)} of {len(stages)} stages were measured; the cost model has them busy for {model}."
    return {
        "stages": stages,
        "strip_label": "; ".join(f"stage {s.stage}: layers {layer_range(s)} on {mesh_text(s)}" for s in plan.stages),
        "stages_lead": _stages_lead(plan),
        "stages_note": note,
        "reasons": plan_reasons(plan),
        "has_layers": bool(plan.layers or plan.remat),
        "has_remat": any(word != "none" for word in plan.remat),
    }


def _stages_lead(plan: Plan) -> str:
    layers = "one layer" if plan.num_layers == 1 else f"{plan.num_layers:,} layers"
    if plan.num_stages == 1:
        return f"One stage runs {layers}."
    shares = [share for share in plan.time_shares() if share is not None]
    text = f"{layers.capitalize()} in {plan.num_stages:,} stages."
    if shares:
        slowest = max(range(len(shares)), key=lambda stage: shares[stage])
        above = 100 * (shares[slowest] * len(shares) - 1)
        if above >= 0.05:
            text += f" Stage {slowest} has most work, {above:.1f} % above the mean: the others wait for it."
    return text


def _layer(plan: Plan, number: int, mean: float) -> dict[str, Any]:
    """One layer; its width is its seconds beside the mean, or that of all where no seconds are known."""
    layer = plan.layers[number] if plan.layers else LayerPlan(number)
    return {
        "number": number,
        "names": ", ".join(layer.modules),
        "source": layer.first_op,
        "weight": max(0.05, (layer.seconds or 0.0) / mean) if mean else 1.0,
        "seconds": human_seconds(layer.seconds),
        "remat": plan.remat[number] if plan.remat else "none",
    }


def _meter(values: Sequence[float | None], index: int, text: str) -> dict[str, Any]:
    """A value beside the largest of its kind."""
    value, most = values[index], max((value or 0.0 for value in values), default=0.0)
    if value is None or most == 0:
        return {"width": None, "text": text, "most": False}
    return {
        "width": f"{100 * value / most:.4g}",
        "text": text,
        "most": value == most and min(value or 0.0 for value in values) < most,
    }


def time_section(plan: Plan, measured: StepTimeline | None) -> dict[str, Any]:
    """How the time of each stage is spent: of a predicted step, and of a measured one."""
    rows = [row for stage in plan.stages if (row := _predicted_share(plan, stage)) is not None]
    if measured is not None:
        rows += [_measured_share(row, measured.seconds, is_first=i == 0) for i, row in enumerate(measured.rows)]
    lead = "What each stage does in a step: forward and backward of all microbatches, what is done once, and waiting."
    if any(stage.sharding is not None for stage in plan.stages):
        lead += " Collectives are the part of the computing in which the devices of a stage exchange values."
    return {
        "shares": rows,
        "share_kinds": _SHARE_KINDS,
        "shares_lead": lead,
        "has_collectives": any(stage.sharding is not None for stage in plan.stages),
    }


def _predicted_share(plan: Plan, stage: StagePlan) -> dict[str, Any] | None:
    timing = stage.timing
    if timing is None or timing.bubble_seconds is None or timing.exposed_seconds is None:
        return None
    computing = plan.num_microbatches * (timing.forward_seconds + timing.backward_seconds)
    spent = (computing, timing.once_seconds, timing.exposed_seconds, timing.bubble_seconds)
    row = _share(f"stage {stage.stage}", spent)
    if stage.sharding is not None:
        row["collectives"] = human_seconds(stage.sharding.communication_seconds)
    return row


def _measured_share(row: TimelineRow, seconds: float, is_first: bool) -> dict[str, Any]:
    once, waiting = row.seconds_of(("prepare", "initialize", "update")), row.seconds_of(TRANSFERRING)
    idle = max(0.0, seconds - row.computing_seconds - waiting)
    share = _share(f"{row.name}, measured", (row.computing_seconds - once, once, waiting, idle))
    return share | {"first": is_first}


def _share(name: str, spent: Sequence[float]) -> dict[str, Any]:
    """A row of the table; ``spent`` are the seconds of each of `_SHARE_KINDS`."""
    total, begin = sum(spent), 0.0
    parts: list[dict[str, str]] = []
    for (kind, title), seconds in zip(_SHARE_KINDS, spent, strict=True):
        percent = 100 * seconds / total if total else 0.0
        text = {"title": title, "text": human_seconds(seconds), "share": f"{percent:.1f} %"}
        parts.append({"kind": kind, "x": f"{begin:.6g}", "width": f"{percent:.6g}", **text})
        begin += percent
    label = ", ".join(f"{part['share']} {part['title']}" for part in parts)
    return {"name": name, "label": f"{name}: {label}", "parts": parts, "first": False, "collectives": ""}


def memory_section(plan: Plan, held: Sequence[HeldMemory], seconds: float) -> dict[str, Any]:
    """What a device of each stage holds at its fullest moment, and over a step where that is known.

    Args:
        plan: what it is of.
        held: of each stage over a step, or nothing.
        seconds: of the step.
    """
    most = max((stage.device_memory_bytes or 0 for stage in plan.stages), default=0)
    most = max(most, *(each.most for each in held), 1)
    memories = [
        _memory(stage) | {"curve": _curve(held[stage.stage], stage, seconds, most) if held and seconds else None}
        for stage in plan.stages
        if stage.device_memory_bytes
    ]
    lead = "What a device of each stage holds at its fullest moment, by class."
    if held and seconds:
        lead += (
            " Above it, over one step: what lasts, and what comes and goes. All stages have one scale; a line is the "
            "predicted peak, which counts copies and temporaries of functions too."
        )
    return {"memories": memories, "memory_lead": lead}


def _memory(stage: StagePlan) -> dict[str, Any]:
    if stage.sharding is not None:
        parts = list(stage.sharding.memory_bytes)
    else:
        kept = (stage.activation_bytes or 0) * (stage.microbatches_in_flight or 0)
        prepared = ("prepared for all microbatches", stage.prepared_bytes or 0)
        parts = [("state", stage.state_bytes or 0), prepared, ("kept for backward", kept)]
    most = max((nbytes for _, nbytes in parts), default=0)
    limit = None if stage.sharding is None else stage.sharding.limit_bytes
    peak = human_bytes(stage.device_memory_bytes) + (f" of {human_bytes(limit)}" if limit else "")
    return {
        "stage": stage.stage,
        "peak": peak,
        "parts": [
            {"name": name, "text": human_bytes(nbytes), "width": f"{100 * nbytes / most:.4g}"}
            for name, nbytes in parts
            if nbytes
        ],
    }


def _curve(held: HeldMemory, stage: StagePlan, seconds: float, most: int) -> dict[str, Any]:
    """A curve in a box of `_CURVE_WIDTH` times 100, whose top is ``most`` bytes: of each column the fullest moment."""
    columns = [0] * _CURVE_WIDTH
    for (begin, nbytes), (end, _) in zip(held.points, (*held.points[1:], (seconds, 0)), strict=True):
        first = min(int(begin / seconds * _CURVE_WIDTH), _CURVE_WIDTH - 1)
        last = min(math.ceil(end / seconds * _CURVE_WIDTH), _CURVE_WIDTH) if end > begin else first + 1
        for column in range(first, last):
            columns[column] = max(columns[column], nbytes)
    path, before = ["M0 100"], None
    for column, nbytes in enumerate(columns):
        if nbytes != before:
            path.append(f"H{column}V{100 * (1 - nbytes / most):.4g}")
            before = nbytes
    peak = stage.device_memory_bytes if has_peak(stage) else None
    return {
        "path": f"{''.join(path)}H{_CURVE_WIDTH}V100Z",
        "width": _CURVE_WIDTH,
        "lasting": f"{100 * held.lasting / most:.4g}",
        "lasting_top": f"{100 * (1 - held.lasting / most):.4g}",
        "peak": None if peak is None else f"{100 * (1 - peak / most):.4g}",
        "label": f"stage {stage.stage}: {human_bytes(held.lasting)} last, at most {human_bytes(held.most)} are held",
    }


def sharding_section(plan: Plan) -> dict[str, Any]:
    """The sharding of every argument, stage by stage; nothing where stages have one device each."""
    chosen = [(stage, stage.sharding) for stage in plan.stages if stage.sharding is not None]
    groups = [_sharding_group(stage, sharding) for stage, sharding in chosen if sharding.shardings]
    lead = "Which axes of the mesh shard each dim of state and batch; a dot is a dim that every device holds whole."
    return {"shardings": groups, "shardings_lead": lead}


def _sharding_group(stage: StagePlan, sharding: ShardingPlan) -> dict[str, Any]:
    colours = {name: position % _NUM_AXIS_COLOURS for position, (name, _) in enumerate(stage.mesh)}
    specs = [(path, Spec.parse(text)) for path, text in sharding.shardings]
    sharded = sum(not spec.is_replicated for _, spec in specs)
    rows = [
        {
            "path": path,
            "dims": [
                {"axes": axes, "text": " + ".join(axes) or "·", "colour": colours.get(axes[0], 0) if axes else 0}
                for axes in spec.dims
            ],
        }
        for path, spec in specs
    ]
    return {"stage": stage.stage, "rows": rows, "note": f"{sharded} of {len(specs)} are sharded, on {mesh_text(stage)}"}


def baselines_section(plan: Plan) -> dict[str, Any]:
    """What the stages would take with the shardings of the baselines, where that is known."""
    compared = [stage.sharding for stage in plan.stages if stage.sharding is not None and stage.sharding.compared]
    if len(compared) != plan.num_stages:
        return {"baselines": None}
    names = [figures.name for figures in compared[0].compared]
    found: dict[str, list[float | None]] = {"this plan": [sharding.seconds for sharding in compared]}
    for name in names:
        found[name] = [_seconds_of(sharding, name) for sharding in compared]
    slowest = {
        name: max((s or 0.0 for s in row), default=0.0) if None not in row else None for name, row in found.items()
    }
    order = sorted(found, key=lambda name: (slowest[name] is None, slowest[name] or 0.0, name != "this plan"))
    own, values = slowest["this plan"], [slowest[name] for name in order]
    rows = [
        {
            "name": name,
            "chosen": name == "this plan",
            "cells": ["does not fit" if seconds is None else human_seconds(seconds) for seconds in found[name]],
            "slowest": _meter(values, position, human_seconds(slowest[name])),
            "ratio": ""
            if name == "this plan" or not own or slowest[name] is None
            else f"{(slowest[name] or 0) / own:.2f} ×",
        }
        for position, name in enumerate(order)
    ]
    lead = "Seconds that each stage is busy in a step, with other shardings on the same meshes. The slowest stage sets the pace."
    return {"baselines": {"stages": [s.stage for s in plan.stages], "rows": rows}, "baselines_lead": lead}


def _seconds_of(sharding: ShardingPlan, name: str) -> float | None:
    return next((figures.seconds for figures in sharding.compared if figures.name == name), None)
