"""How tables are printed: on a terminal, into a file and in a notebook. rich is imported when something is printed."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bactrian.passes.frame.visible import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

WIDTH = 100
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Names of users' programs are shown as they are, also where rich would read ``[/x]`` or ``:x:`` as something else."""


@dataclass(frozen=True)
class _WithoutControls:
    """What another renderable prints, with the control characters of users' names as escapes; rich's own stay."""

    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


@dataclass(frozen=True)
class RichView:
    """A table as rich has it; see `bactrian.passes.frame.views.View`."""

    renderable: RenderableType

    def text(self) -> str:
        """As plain text of at most 100 columns, without spaces at the ends of lines."""
        console = _console(record=False)
        with console.capture() as capture:
            console.print(_WithoutControls(self.renderable))
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def html(self) -> str:
        """As a piece of HTML with inline styles."""
        console = _console(record=True)
        console.print(_WithoutControls(self.renderable))
        frame = "<pre style=\"font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace;line-height:1.25\">{code}</pre>"
        return console.export_html(inline_styles=True, code_format=frame)

    def show(self) -> None:
        """Print to a terminal in colour, to anything else as plain text."""
        from rich.console import Console

        console = Console(**_PLAIN)
        if console.is_terminal:
            console.print(_WithoutControls(self.renderable))
        else:
            print(self.text())


def drop_output() -> None:
    """Let what is still buffered for standard output go nowhere: Python writes it at its end, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def why_output_fails() -> str:
    """Why standard output takes nothing any more, and from then on it goes nowhere; "" where it takes what there is."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:
        drop_output()
        return error.strerror or str(error)
    return ""


def _console(record: bool) -> Console:
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=WIDTH,
        record=record,
        **_PLAIN,
        force_terminal=record,
        color_system="truecolor" if record else None,
    )
