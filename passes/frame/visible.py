"""Text of users' programs as terminals and pages may show it."""

from __future__ import annotations

import re

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with control characters, invisible ones and those that turn the direction written as escapes.

    Names in programs and plans are data: printed as they are, they could move a terminal's cursor, recolour or erase
    what stands there, or show a line in another order than it has. Line feeds and tabs stay.

    >>> visible("block\x1b[2J")
    'block\\x1b[2J'
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
