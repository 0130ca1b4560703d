"""A comparison of predicted and compiled communication, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bactrian.driver.xla.compare_bytes import Comparison, FunctionComparison
from bactrian.passes.frame.units import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render_comparison(comparison: Comparison) -> RenderableType:
    """Bytes by function and kind, and below them the differences."""
    from rich.console import Group

    return Group(_bytes_table(comparison), _differences(comparison))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data: bytes that a device sends, in a step and by function, and every difference."""
    return {
        "planned": comparison.planned,
        "compiled": comparison.compiled,
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
                "kind": difference.kind,
                "group": difference.group,
                "planned": difference.planned,
                "compiled": difference.compiled,
            }
            for difference in function.differences
        ],
    }


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


def _differences(comparison: Comparison) -> str:
    lines = [
        f"{function.symbol}: {difference.kind.replace('_', '-')} among {difference.group} devices, "
        f"{human_bytes(difference.planned)} planned, {human_bytes(difference.compiled)} compiled"
        for function in comparison.functions
        for difference in function.differences
    ]
    return "\n".join(lines) or "every collective is as planned"
