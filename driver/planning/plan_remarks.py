"""What the passes tell of a program, as a plan keeps it: each remark once, with the user's lines."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import PurePath

from bactrian.passes.frame.diagnostics import Diagnostic
from bactrian.passes.plan.schema import Remark

_log = logging.getLogger("bactrian")
_PLACES = 3  # that a remark names


def remarks_of(diagnostics: Iterable[Diagnostic]) -> tuple[Remark, ...]:
    """Remarks and warnings, warnings first; what is said of several places is one of them, which names the first few."""
    places: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for each in diagnostics:
        if each.severity in ("remark", "warning"):
            places.setdefault((each.severity, each.message, each.why, each.fix), {})[_short(each)] = None
    remarks = [
        Remark(severity, message, _listed(list(where)), why, fix)
        for (severity, message, why, fix), where in places.items()
    ]
    return tuple(sorted(remarks, key=lambda remark: remark.severity != "warning"))


def _short(diagnostic: Diagnostic) -> str:
    """Its place without the folder, so that plans do not depend on it."""
    place = diagnostic.place
    return diagnostic.where if place is None else diagnostic.where.replace(place.file, PurePath(place.file).name)


def _listed(places: list[str]) -> str:
    more = len(places) - _PLACES
    return ", ".join(places[:_PLACES]) + (f" and {more} more" if more > 0 else "")


@functools.cache
def log_once(remark: Remark) -> None:
    """Write a remark into the log, the first time that this process comes by it."""
    _log.warning("%s", remark.text())
