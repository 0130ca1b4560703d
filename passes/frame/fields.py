"""Fields of files from outside: what each may be, in words and as a check, so that an error names field, value and range."""

from __future__ import annotations

import math
from typing import Any

from bactrian.passes.frame.errors import ConfigError

MAX_COUNT = 1 << 16
"""The most stages, layers, or microbatches of a step, in plans and in modules."""

MAX_INTEGER = (1 << 63) - 1


def number_between(value: Any, least: float, most: float, what: str, where: str = "") -> float:
    """The value as a number of a range.

    Raises:
        ConfigError: it is no number, or out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{what} is {brief(value)}, must be a number from {least:g} to {most:g}", where=where)
    return float(value)


def integer_between(value: Any, least: int, most: int, what: str, where: str = "") -> int:
    """The value as an integer of a range; ``8.0`` is one.

    Raises:
        ConfigError: it is no integer, or out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value % 1:
        raise ConfigError(f"{what} is {brief(value)}, must be an integer from {least} to {most}", where=where)
    return int(value)


def brief(value: Any) -> str:
    """A value for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        text = f"an integer of {math.floor(math.log10(2) * value.bit_length())} digits or more"
    return text if len(text) <= 60 else text[:57] + "..."
