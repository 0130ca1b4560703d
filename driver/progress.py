"""Progress bars: on rank 0 and a terminal only, and silent everywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from bactrian.runtime.rank_lifecycle import rank_environment

TERMINAL_VARIABLE = "BACTRIAN_TERMINAL"  # columns of the launcher's terminal: a rank's own stderr is a pipe


class Advance(Protocol):
    """Notes that so many units of the work are done."""

    def __call__(self, amount: float = 1.0) -> None: ...


def is_main_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return rank_environment().rank == 0


def shows_progress() -> bool:
    """Whether this process may draw: it is rank 0, and a person looks at stderr."""
    return is_main_rank() and (sys.stderr.isatty() or TERMINAL_VARIABLE in os.environ)


@contextmanager
def progress(what: str, total: float | None = None) -> Generator[Advance]:
    """A bar for ``total`` units of work (a spinner without a total) that goes away when the work is done.

    >>> with progress("compiling stages", total=4) as advance:
    ...     advance()
    """
    if not shows_progress():
        yield lambda amount=1.0: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    width = os.environ.get(TERMINAL_VARIABLE, "")
    console = Console(
        stderr=True,
        force_terminal=True if width else None,
        width=int(width) if width.isdecimal() and int(width) > 0 else None,
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount=1.0: bar.advance(task, amount)
