"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write the file, or leave what is there: the text goes to a file beside it, which then takes its place.

    Raises:
        OSError: the folder is missing, the disk is full, or the like.
    """
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
