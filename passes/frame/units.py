"""Bytes, counts and seconds as people read them: three significant digits and a unit."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "–"


def human_bytes(value: float | None) -> str:
    """``18.4 GiB``, ``1.50 KiB``: three significant digits, ``–`` for unknown. 1,000 bytes are ``0.98 KiB``."""
    return _human(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def human_count(value: float | None, unit: str = "") -> str:
    """``1.23 M``, ``45.6 Tflop``: powers of a thousand with three significant digits, ``–`` for unknown."""
    return _human(value, 1000.0, tuple(prefix + unit for prefix in ("", "k", "M", "G", "T", "P", "E")))


def human_seconds(value: float | None) -> str:
    """``1.25 s``, ``12.3 ms``, ``850 µs``; ``–`` for unknown."""
    if value is None:
        return UNKNOWN
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale or value == 0:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-6)} µs"


def _human(value: float | None, base: float, units: Sequence[str]) -> str:
    if value is None:
        return UNKNOWN
    if value < 1000:
        return f"{value:,.0f} {units[0]}".rstrip()
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{_three(value)} {units[power]}"


def _three(value: float) -> str:
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
