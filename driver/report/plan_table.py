"""The tables of a plan, and each stage in words. rich is imported when a table is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from bactrian.driver.report.cut_reasons import plan_reasons
from bactrian.driver.report.sharding_table import compared_table, sharding_grid
from bactrian.driver.report.terminal import RichView
from bactrian.passes.frame.units import UNKNOWN, human_bytes, human_count, human_seconds
from bactrian.passes.frame.views import view
from bactrian.passes.plan.pipeline_record import PipelineRecord
from bactrian.passes.plan.schema import Option, Plan, Remark, StagePlan, add_known
from bactrian.passes.plan.step_timing import StageTiming

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

_BAR_CELLS = 8
_ACCENT = "#b5651d"
_QUIET = "grey50"
_STAGE_COLORS = ("#b5651d", "#3a7d7c")  # neighbours differ


def layer_range(stage: StagePlan) -> str:
    """``0–3``, or ``2`` for a single layer."""
    return str(stage.first_layer) if stage.num_layers == 1 else f"{stage.first_layer}–{stage.last_layer}"


def mesh_text(stage: StagePlan) -> str:
    """``data=2 model=4``; axes of size 1 are left out, and a mesh of nothing else is ``1 device``."""
    return " ".join(f"{name}={size}" for name, size in stage.mesh if size > 1) or "1 device"


def place_text(stage: StagePlan) -> str:
    """``devices 4–7``: where on the cluster's line of hosts its mesh is; nothing where that was not decided."""
    if stage.first_device is None:
        return ""
    last = stage.first_device + stage.num_devices - 1
    return f"device {last}" if stage.num_devices == 1 else f"devices {stage.first_device}–{last}"


def module_names(plan: Plan, stage: StagePlan) -> list[str]:
    """The user's module names of a stage's layers, in order, each once."""
    layers = plan.layers[stage.first_layer : stage.last_layer + 1]
    return list(
        dict.fromkeys(name for layer in layers for name in layer.modules or ((layer.first_op,) * bool(layer.first_op)))
    )


def remat_text(words: Sequence[str]) -> str:
    """What layers compute again: ``remat all``, or ``remat all 0–2, none 3``."""
    runs = [(word, [layer for layer, _ in run]) for word, run in groupby(enumerate(words), key=lambda item: item[1])]
    if len(runs) == 1:
        return f"remat {runs[0][0]}"
    ranges = (f"{word} {run[0]}" + (f"–{run[-1]}" if len(run) > 1 else "") for word, run in runs)
    return f"remat {', '.join(ranges)}"


def plan_lines(plan: Plan) -> list[str]:
    """The heading: what was decided for the whole step, then what it is predicted to take."""
    decided = [_counted(plan.num_stages, "stage"), _counted(plan.num_microbatches, "microbatch", "es")]
    decided.append("forward only" if plan.forward_only else plan.schedule)
    if plan.remat:
        decided.append(remat_text(plan.remat))
    decided += [_counted(plan.num_layers, "layer"), _counted(plan.num_devices, f"{plan.platform} device")]
    if plan.num_devices > plan.num_stages and _equal_meshes(plan):
        decided.append(f"each on {mesh_text(plan.stages[0])}")
    predicted: list[str] = []
    if plan.predicted_step_seconds is not None:
        predicted.append(f"{human_seconds(plan.predicted_step_seconds)} per step")
    if plan.peak_memory_bytes is not None:
        measure = "predicted peak" if any(map(has_peak, plan.stages)) else "of state and residuals"
        predicted.append(f"{human_bytes(plan.peak_memory_bytes)} {measure} per device")
    lines = [" · ".join(decided)]
    if (record := plan.pipeline) is not None:
        fixed = f" · given: {', '.join(record.fixed)}" if record.fixed else ""
        tried = ", ".join(str(each.num_microbatches) for each in record.tried)
        lines.append(f"found among {tried} microbatches · within {record.gap:.1%} of the search's bound{fixed}")
        lines += _next_best(plan, record)
    if num_measured := sum(stage.measured is not None for stage in plan.stages):
        rounds = plan.pipeline.profile_rounds if plan.pipeline is not None else 0
        several = f" · {_counted(rounds, 'round')} of search" if rounds else ""
        lines.append(f"measured: {num_measured} of {_counted(plan.num_stages, 'stage')}{several}")
    return lines + (["predicted: " + " · ".join(predicted)] if predicted else [])


def _next_best(plan: Plan, record: PipelineRecord) -> list[str]:
    """What another number of stages would take; where one program beats every pipeline, that."""
    lines, other = list[str](), record.next_best
    could_be_cut = plan.num_layers > 1 and not {"boundaries", "mesh", "num_stages"}.intersection(record.fixed)
    if plan.num_stages == 1 and record.num_devices > 1 and could_be_cut:
        lines.append(f"one program on {plan.num_devices} of {record.num_devices} devices beats every pipeline")
    if other is not None:
        longer = other.step_seconds / record.simulated_seconds - 1
        lines.append(f"next best: {_counted(other.num_stages, 'stage')} with {other.schedule}, {longer:.1%} longer")
    return [" · ".join(lines)] if lines else []


def has_peak(stage: StagePlan) -> bool:
    """Whether a stage's peak memory is known: measured, or predicted of XLA."""
    return stage.measured is not None or (stage.sharding is not None and stage.sharding.peak_bytes is not None)


def _equal_meshes(plan: Plan) -> bool:
    return len({stage.mesh for stage in plan.stages}) == 1


def render_plan(plan: Plan) -> Group:
    """The plan as something that rich prints within 100 columns: a heading, the table of stages, and a footnote."""
    from rich.console import Group
    from rich.text import Text

    title = Text("plan", style=f"bold {_ACCENT}")
    if plan.fingerprint:
        title.append(f"  of program {plan.fingerprint[:12]}", style=_QUIET)
    decided, *predicted = plan_lines(plan)
    parts: list[RenderableType] = [
        title,
        Text(decided, style="bold"),
        *(Text(line) for line in predicted),
        _stage_table(plan),
    ]
    if not any(share is None for share in plan.time_shares()):
        measure = (
            "predicted time"
            if all(s.predicted_seconds is not None for s in plan.stages)
            else "flops (no time predicted)"
        )
        notes = f"flops, kept and sent per microbatch · share of {measure}"
    else:
        notes = "flops, kept and sent per microbatch"
    if plan.num_devices > plan.num_stages:
        notes += " · of the whole stage, unsharded"
    if any(stage.update_sent_bytes for stage in plan.stages):
        notes += f" · update sends {human_bytes(add_known(*(s.update_sent_bytes or 0 for s in plan.stages)))} a step"
    parts.append(Text(notes, style=_QUIET))
    for stage in plan.stages:
        if stage.sharding is not None:
            number = stage.stage if plan.num_stages > 1 else None
            parts += [Text(""), sharding_grid(stage.sharding, number)]
            if stage.sharding.compared:
                parts.append(compared_table(stage.sharding))
    parts += [line for remark in plan.remarks for line in _remark_lines(remark)]
    if plan.options:
        parts.append(
            Text("options: " + "  ".join(f"{name}={option_text(value)}" for name, value in plan.options), style=_QUIET)
        )
    return Group(*parts)


def _remark_lines(remark: Remark) -> list[RenderableType]:
    """An empty line, the remark, and where, why and what to do, indented also where lines are broken."""
    from rich.padding import Padding
    from rich.text import Text

    heading = Text(f"{remark.severity}: ", style=f"bold {_ACCENT}" if remark.severity == "warning" else "bold")
    parts: list[RenderableType] = [Text(""), heading.append(remark.message, style="default")]
    for name, part in (("where", remark.where), ("why", remark.why), ("fix", remark.fix)):
        if part:
            parts.append(Padding(Text(f"{name}: {part}", style=_QUIET if name == "where" else "default"), (0, 0, 0, 2)))
    return parts


def _stage_table(plan: Plan) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_footer=plan.num_stages > 1, padding=(0, 1, 0, 0), pad_edge=False)
    table.header_style = table.footer_style = "bold"
    stages = plan.stages
    shares = plan.time_shares()
    columns: list[tuple[str, Callable[[StagePlan], str], str]] = [
        ("stage", lambda s: str(s.stage), "all"),
        ("layers", layer_range, str(plan.num_layers)),
    ]
    cells_of_bar = _BAR_CELLS
    if not _equal_meshes(plan):
        columns.append(("mesh", mesh_text, ""))
        cells_of_bar = 0  # no room for both
    columns += [
        ("flops", lambda s: human_count(s.flops), human_count(add_known(*(s.flops for s in stages)))),
        (
            "params",
            lambda s: human_count(s.num_parameters),
            human_count(add_known(*(s.num_parameters for s in stages))),
        ),
        ("state", lambda s: human_bytes(s.state_bytes), human_bytes(add_known(*(s.state_bytes for s in stages)))),
        ("kept", kept_text, human_bytes(add_known(*(_all_kept(s) for s in stages)))),
        (
            "sent →",
            lambda s: sent_text(s.sent_bytes_forward),
            human_bytes(add_known(*(s.sent_bytes_forward for s in stages))),
        ),
        (
            "sent ←",
            lambda s: sent_text(s.sent_bytes_backward),
            human_bytes(add_known(*(s.sent_bytes_backward for s in stages))),
        ),
    ]
    for header, _, total in columns:
        table.add_column(
            header, total, justify="left" if header in ("layers", "mesh") else "right", no_wrap=header != "mesh"
        )
    table.add_column("share", "", no_wrap=True)
    for run in _runs(plan):
        first, last = run[0], run[-1]
        cells = [value(first) for _, value, _ in columns]
        if len(run) > 1:
            cells[0] = f"{first.stage}–{last.stage}"
            cells[1] = f"{first.first_layer}–{last.last_layer}"
        color = _STAGE_COLORS[first.stage % len(_STAGE_COLORS)]
        table.add_row(*cells, _bar(shares[first.stage], shares, cells_of_bar, color, each=len(run) > 1))
    return table


def _runs(plan: Plan) -> list[list[StagePlan]]:
    """Stages one by one; from 17 stages on, neighbours that show the same figures share a row."""
    if plan.num_stages <= 16:
        return [[stage] for stage in plan.stages]
    shown = [
        (
            s.num_layers,
            s.mesh,
            human_count(s.flops),
            human_count(s.num_parameters),
            human_bytes(s.state_bytes),
            kept_text(s),
        )
        + (sent_text(s.sent_bytes_forward), sent_text(s.sent_bytes_backward))
        for s in plan.stages
    ]
    return [list(run) for _, run in groupby(plan.stages, key=lambda stage: shown[stage.stage])]


def _bar(share: float | None, shares: Sequence[float | None], cells: int, color: str, each: bool) -> Text:
    """The share as a bar of so many cells (the longest fills it) and a number."""
    from rich.text import Text

    if share is None:
        return Text(UNKNOWN, style=_QUIET)
    halves = round(share / max(s or 0.0 for s in shares) * cells * 2)
    bar = "━" * (halves // 2) + "╸" * (halves % 2)
    text = Text(bar.ljust(cells + 1) if cells else "", style=color)
    return text.append(f"{100 * share:4.1f} %" + (" each" if each else ""), style="default")


def kept_text(stage: StagePlan) -> str:
    """What a microbatch leaves for the backward, times the microbatches in flight: ``31.1 MiB × 4``."""
    text = human_bytes(stage.activation_bytes)
    return f"{text} × {stage.microbatches_in_flight}" if stage.microbatches_in_flight is not None else text


def _all_kept(stage: StagePlan) -> int | None:
    if stage.activation_bytes is None or stage.microbatches_in_flight is None:
        return None
    return stage.activation_bytes * stage.microbatches_in_flight


def sent_text(value: int | None) -> str:
    """Bytes; nothing for none."""
    return "" if value == 0 else human_bytes(value)


def _time_text(plan: Plan, timing: StageTiming) -> str:
    """How a stage spends a step: ``forward 3.00 ms, backward 6.00 ms a microbatch, 1.00 ms once; 20.0 ms (25.0 %) idle``."""
    text = f"forward {human_seconds(timing.forward_seconds)}, backward {human_seconds(timing.backward_seconds)} a microbatch"
    if timing.once_seconds:
        text += f", {human_seconds(timing.once_seconds)} once"
    step = plan.predicted_step_seconds
    share = f" ({100 * (timing.bubble_seconds or 0.0) / step:.1f} %)" if step else ""
    text += f"; idle {human_seconds(timing.bubble_seconds)}{share}"
    if timing.communication_seconds:
        exposed, all_of_it = timing.exposed_seconds or 0.0, timing.communication_seconds
        text += f", transfers {human_seconds(all_of_it)}, {human_seconds(all_of_it - exposed)} of it hidden"
    return text


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def option_text(value: Option) -> str:
    """As on the command line: ``none``, ``true``, ``1``."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def render_explanation(plan: Plan) -> Group:
    """The plan, why it is cut so, then each stage in words: its layers, its load against the mean, how it spends a step,
    what its cut sends, what it holds."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [render_plan(plan)]
    if reasons := plan_reasons(plan):
        parts += [Text("\nwhy this plan", style=f"bold {_ACCENT}"), _reason_grid(reasons)]
    for stage in plan.stages:
        color = _STAGE_COLORS[stage.stage % len(_STAGE_COLORS)]
        heading = Text(f"\nstage {stage.stage}", style=f"bold {color}")
        heading.append(
            f"  {'layer' if stage.num_layers == 1 else 'layers'} {layer_range(stage)} on {mesh_text(stage)}"
            + (f", {place}" if (place := place_text(stage)) else ""),
            style="default",
        )
        parts.append(heading)
        parts += [Text(f"  {line}") for line in stage_reasons(plan, stage)]
    return Group(*parts)


def _reason_grid(reasons: Sequence[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in reasons:
        grid.add_row(Text(f"  {name}"), Text(text))
    return grid


def stage_reasons(plan: Plan, stage: StagePlan) -> list[str]:
    """Why the stage is what it is, in figures: its layers, its load against the mean, its cuts and its memory."""
    lines: list[str] = []
    if names := module_names(plan, stage):
        shown = names if len(names) <= 6 else [*names[:4], f"… {len(names) - 5} more …", names[-1]]
        lines.append("runs     " + ", ".join(shown))
    share = plan.time_shares()[stage.stage]
    if share is not None:
        off = 100 * (share * plan.num_stages - 1)
        where = (
            "the mean load" if abs(off) < 0.05 else f"{abs(off):.1f} % {'above' if off > 0 else 'below'} the mean load"
        )
        busy = (
            f", busy {human_seconds(stage.predicted_seconds)} per step" if stage.predicted_seconds is not None else ""
        )
        slowest = share == max(s or 0.0 for s in plan.time_shares()) and plan.num_stages > 1 and off >= 0.05
        lines.append(
            f"balance  {100 * share:.1f} % of the work, {where}{busy}" + (": the slowest stage" if slowest else "")
        )
    if stage.timing is not None and stage.timing.bubble_seconds is not None:
        lines.append(f"time     {_time_text(plan, stage.timing)}")
    if stage.measured is not None and stage.predicted_seconds is not None:
        model, peak = human_seconds(stage.measured.model_seconds), human_bytes(stage.measured.peak_bytes)
        lines.append(f"measured {human_seconds(stage.predicted_seconds)} per step, the model has {model}; peak {peak}")
    sent = [
        f"{human_bytes(value)} {towards}"
        for value, towards in (
            (stage.sent_bytes_forward, "forward"),
            (stage.sent_bytes_backward, "backward"),
        )
        if value
    ]
    if sent:
        per_step = add_known(stage.sent_bytes_forward or 0, stage.sent_bytes_backward or 0) or 0
        in_all = human_bytes(per_step * plan.num_microbatches)
        lines.append(f"cut      sends {' and '.join(sent)} per microbatch, {in_all} per step")
    if stage.update_sent_bytes:
        lines.append(f"update   sends {human_bytes(stage.update_sent_bytes)} per step")
    if stage.memory_bytes is not None:
        in_flight = _counted(stage.microbatches_in_flight or 0, "microbatch", "es")
        whole = " for the whole stage, unsharded" if stage.num_devices > 1 else " of state and residuals"
        held = f"state {human_bytes(stage.state_bytes)}"
        if stage.prepared_bytes:
            held += f", {human_bytes(stage.prepared_bytes)} made once per step"
        kept = f"{human_bytes(stage.activation_bytes)} kept for each of {in_flight}"
        lines.append(f"memory   {human_bytes(stage.memory_bytes)}{whole}: {held}, {kept} in flight")
    return lines or ["nothing was predicted for it"]


view.register(Plan, lambda plan: RichView(render_plan(plan)))
