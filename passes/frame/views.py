"""Data that has a table. The data know only that they have one; who draws it registers with `view`.

The compiler's plans and explanations are plain data; their tables are drawn in `bactrian.driver.report`.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Protocol


class View(Protocol):
    """A table that was drawn."""

    def text(self) -> str:
        """As plain text of at most 100 columns."""
        ...

    def html(self) -> str:
        """As a piece of HTML, for notebooks."""
        ...

    def show(self) -> None:
        """Print it, in colour on a terminal."""
        ...


@singledispatch
def view(value: object) -> View:
    """The table of a value.

    Raises:
        TypeError: nothing that was imported draws such values.
    """
    raise TypeError(f"no table of {type(value).__name__} is known: import bactrian.driver.report.plan_table first")


class Viewable:
    """Mixin of data that have a table."""

    def show(self) -> None:
        """Print the table, in colour on a terminal."""
        view(self).show()

    def _repr_html_(self) -> str:
        return view(self).html()
