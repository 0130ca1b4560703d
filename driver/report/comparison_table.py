"""A comparison of predicted and compiled communication, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from bactrian.driver.xla.compare_bytes import CLASSES, Comparison, Difference, FunctionComparison, Sent
from bactrian.passes.frame.units import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render_comparison(comparison: Comparison) -> RenderableType:
    """Bytes by function and kind, and below them the differences by name."""
    from rich.console import Group

    return Group(_bytes_table(comparison), _differences_table(comparison))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data: bytes that a device sends, in a step and by function, and every difference."""
    return {
        "planned": comparison.planned,
        "compiled": comparison.compiled,
        "differences": comparison.classes,
        "functions": [_function_json(function) for function in comparison.functions],
    }


def _function_json(function: FunctionComparison) -> dict[str, Any]:
    return {
        "function": function.symbol,
        "runs": function.runs,
        "planned": function.planned,
        "compiled": function.compiled,
        "num_planned": function.num_planned,
        "num_compiled": function.num_compiled,
        "differences": [
            {
                "names": list(difference.names),
                "op": difference.op,
                "where": difference.where,
                "planned": [_sent_json(sent) for sent in difference.planned],
                "compiled": [_sent_json(sent) for sent in difference.compiled],
            }
            for difference in function.differences
        ],
    }


def _sent_json(sent: Sent) -> dict[str, Any]:
    return {"kind": sent.kind, "group": sent.group, "bytes": sent.nbytes}


def _table(*headers: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.header_style = "bold"
    for number, header in enumerate(headers):
        table.add_column(header, no_wrap=number < 2, justify="left" if number == 0 else "right")
    return table


def _bytes_table(comparison: Comparison) -> Table:
    table = _table("a device sends", "kind", "planned", "XLA", "to planned", "collectives")
    for function in comparison.functions:
        name = f"{function.symbol} × {function.runs}"
        combined = f"{function.num_planned} → {function.num_compiled}"
        for kind, planned, compiled in _kinds(function.planned, function.compiled):
            sizes = (human_bytes(function.runs * planned), human_bytes(function.runs * compiled))
            table.add_row(name, kind.replace("_", "-"), *sizes, _ratio(planned, compiled), combined)
            name = combined = ""
    planned, compiled = sum(comparison.planned.values()), sum(comparison.compiled.values())
    table.add_row("in a step", "", human_bytes(planned), human_bytes(compiled), _ratio(planned, compiled), "")
    return table


def _kinds(planned: dict[str, float], compiled: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    for kind in sorted({*planned, *compiled}):
        yield kind, planned.get(kind, 0.0), compiled.get(kind, 0.0)


def _ratio(planned: float, compiled: float) -> str:
    return f"{compiled / planned:.2f} ×" if planned else "" if compiled else "1.00 ×"


def _differences_table(comparison: Comparison) -> RenderableType:
    from rich.table import Table

    largest = dict[str, Difference]()
    counts = dict[str, int]()
    for function in comparison.functions:
        for difference in function.differences:
            name = difference.names[0]
            counts[name] = counts.get(name, 0) + 1
            if name not in largest or abs(difference.more_bytes) > abs(largest[name].more_bytes):
                largest[name] = difference
    if not counts:
        return "every collective is as planned"
    table = Table.grid(padding=(0, 2, 0, 0))
    for style in ("bold", "", ""):
        table.add_column(style=style, no_wrap=bool(style))
    for name, nbytes in sorted(comparison.classes.items(), key=lambda entry: -abs(entry[1])):
        one = largest[name]
        file, _, line = one.where.rpartition(":")
        place = f" ({one.op.split(',')[0]}{f' at {PurePath(file).name}:{line}' if file else ''})"
        sign = "-" if nbytes < 0 else "+"
        table.add_row(name, f"{counts[name]} ops, {sign}{human_bytes(abs(nbytes))}", f"{CLASSES[name]}{place}")
    return table
