"""The table that says why a value has its sharding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bactrian.passes.frame.units import human_bytes, human_seconds
from bactrian.passes.sharding.explain import Alternative, Explanation
from bactrian.passes.sharding.unshardable_dims import UnshardableDim

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_ACCENT = "#b5651d"
_QUIET = "grey50"
_CHOSEN = "#3a7d7c"
_EQUAL = 1e-9


def render_value(found: Explanation) -> Group:
    """What rich prints of a value: its sharding, what bound it, the alternatives by cost, dims that can't be sharded."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text(found.name, style=f"bold {_ACCENT}")
    title.append(f"  {found.type}", style="default")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row("value", " · ".join(_what(found)))
    grid.add_row("sharding", _sharding_line(found))
    grid.add_row("why", Text(reason_text(found)))
    if found.unlimited is not None:
        grid.add_row("memory", Text(memory_text(found)))
    for number, note in enumerate(found.notes):
        grid.add_row("" if number else "also", Text(note))
    parts: list[Text | Table] = [title, grid]
    if found.alternatives:
        parts += [Text(""), _sharding_table(found), Text(""), *(Text(line, style=_QUIET) for line in footnotes(found))]
    if found.impossible:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for number, each in enumerate(found.impossible):
            grid.add_row("" if number else "impossible", Text(unshardable_text(each)))
        parts += [Text(""), grid]
    return Group(*parts)


def _what(found: Explanation) -> list[str]:
    where = "first read" if found.origin == "argument" else ""
    words = [found.origin] if found.stage is None else [found.origin, f"stage {found.stage}"]
    if found.place:
        words.append(f"{where} at {found.place}".strip())
    return [*words, human_bytes(found.nbytes)]


def _sharding_line(found: Explanation) -> Text:
    from rich.text import Text

    mesh = " ".join(f"{name}={size}" for name, size in found.mesh)
    line = Text(found.sharding or "a scalar", style=_CHOSEN)
    shard = f"[{','.join(map(str, found.local_shape))}], {human_bytes(found.local_bytes)}"
    line.append(f" over {mesh}" + ("" if found.reason == "free" else f": a device holds {shard}"), style="default")
    return line


def reason_text(found: Explanation) -> str:
    """What bound the choice, in a sentence."""
    if found.reason == "free":
        return "any sharding costs nothing: each device makes the shard that its readers need"
    if found.reason == "only":
        return "there is no other sharding"
    best = next((row for row in found.alternatives if row.seconds is not None and not row.is_chosen), None)
    if found.reason == "given":
        text = f"it was given by {found.given_by}"
        if best is not None and best.seconds is not None and best.seconds < found.seconds * (1 - _EQUAL):
            text += f"; {best.sharding} would take {_percent(1 - best.seconds / found.seconds)} less"
        return text
    if found.reason == "unproved":
        return "it was the best that was found in time; a better one was found here"
    if found.reason == "memory" and found.unlimited is not None:
        return f"memory binds: without a limit it would be {found.unlimited.sharding}"
    if best is None or best.seconds is None:
        return "it is the cheapest: no other was found that fits"
    more = best.seconds / found.seconds - 1 if found.seconds else 0.0
    if more <= _EQUAL:
        return f"it is the cheapest, as {best.sharding} is"
    return f"it is the cheapest: the next, {best.sharding}, takes {_percent(more)} more"


def memory_text(found: Explanation) -> str:
    """What the step would take if memory did not matter."""
    assert found.unlimited is not None
    free = found.unlimited
    text = (
        f"without a limit a step takes {human_seconds(free.seconds)} and {human_bytes(free.memory_bytes)} "
        f"of the {human_bytes(found.limit_bytes)} that a device has"
    )
    return text if free.binds else text + "; the limit costs time elsewhere, not here"


def _sharding_table(found: Explanation) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.header_style = "bold"
    table.add_column("  sharding", no_wrap=True)
    for header in ("step", "over\nbest", "compute +\ncommunicate", "memory"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("sends")
    best = min((row.seconds for row in found.alternatives if row.seconds is not None), default=None)
    planned = next(row for row in found.alternatives if row.is_chosen)
    for row in found.alternatives:
        cells = _cells(row, best, planned)
        style = _CHOSEN if row.is_chosen else "default"
        quiet = row.seconds is None
        table.add_row(*(Text(cell, style=_QUIET if quiet else "") for cell in cells), style=style)
    return table


def _cells(row: Alternative, best: float | None, planned: Alternative) -> list[str]:
    sharding = f"{'→' if row.is_chosen else ' '} {row.sharding or 'scalar'}"
    if row.lacking_bytes:
        return [sharding, "", "", "", human_bytes(row.memory_bytes), f"{human_bytes(row.lacking_bytes)} too much"]
    if row.seconds is None:
        bound = "" if row.bound_seconds is None else f"≥ {human_seconds(row.bound_seconds)}"
        return [sharding, bound, "", "", "", "not finished"]
    over = 0.0 if not best else row.seconds / best - 1
    communication = row.communication_seconds or 0.0
    return [
        sharding,
        ("" if row.is_proved else "≤ ") + human_seconds(row.seconds),
        "" if over <= _EQUAL else _percent(over),
        _split(row.seconds, communication),
        human_bytes(row.memory_bytes),
        _sends(row, planned),
    ]


def _split(seconds: float, communication: float) -> str:
    """``8.36 + 1.78``: in the unit of the whole."""
    scale = next((scale for scale in (1.0, 1e-3) if seconds >= scale), 1e-6)
    digits = 2 if seconds < 99.95 * scale else 0
    return f"{(seconds - communication) / scale:.{digits}f} + {communication / scale:.{digits}f}"


def _sends(row: Alternative, planned: Alternative) -> str:
    """What a device sends by kind; of other shardings than the plan's, what they change."""
    before, own = dict(planned.sent_bytes), dict(row.sent_bytes)
    if row is planned:
        return "\n".join(f"{_kind(kind)} {human_bytes(nbytes)}" for kind, nbytes in row.sent_bytes) or "nothing"
    changes = {kind: own.get(kind, 0) - before.get(kind, 0) for kind in sorted({*before, *own})}
    words = (f"{_kind(kind)} {'+' if n > 0 else '-'}{human_bytes(abs(n))}" for kind, n in changes.items() if n)
    return "\n".join(words)


def _kind(kind: str) -> str:
    return kind.removeprefix("collective_").replace("_", "-")


def footnotes(found: Explanation) -> list[str]:
    """What the signs in the table mean, those that are there."""
    rows = found.alternatives
    whose = "a step" if found.stage is None else f"stage {found.stage}'s part of a step"
    lines = [f"{whose} with this sharding and the best of all others · → the plan's"]
    lines.append("memory and bytes sent are those of a device; + and - against the plan")
    if any(row.lacking_bytes for row in rows):
        lines.append(f"too much: at the least, with {human_bytes(found.limit_bytes)} on a device")
    if any(row.seconds is not None and not row.is_proved for row in rows):
        lines.append("≤ found, not proved to be the least")
    if any(row.seconds is None and not row.lacking_bytes for row in rows):
        lines.append("≥ at the least: there was no time for more (option --time-limit)")
    return lines


def unshardable_text(each: UnshardableDim) -> str:
    """``dim 0 of size 6 over model: 4 devices don't divide it``."""
    what = f"dim {each.dim} of size {each.size} over {'+'.join(each.axes)}"
    return (
        f"{what}: {each.op} needs it replicated" if each.op else f"{what}: {each.num_devices} devices don't divide it"
    )


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %" if ratio >= 0.0005 else "< 0.1 %"
