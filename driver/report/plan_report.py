"""What the commands print about plans: the table, its explanation, and the difference of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bactrian.passes.plan.plan_table import render_explanation, render_plan
from bactrian.passes.plan.schema import Plan, diff

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["render_diff", "render_explanation", "render_plan"]


def render_diff(a: Plan, b: Plan) -> Text:
    """What changes from plan ``a`` to plan ``b``, one line each, or that nothing does."""
    from rich.text import Text

    lines = diff(a, b)
    return Text("\n".join(lines) if lines else "the plans are equal")
