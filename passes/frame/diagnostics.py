"""What passes tell the user: errors, warnings and remarks at a place of the user's program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import BactrianError, ProgramError, SourcePlace
from bactrian.passes.frame.location import Locatable, describe, location_of, user_place, where_text

E = TypeVar("E", bound=BactrianError)

Severity = Literal["error", "warning", "remark", "note"]


@dataclass(frozen=True)
class Diagnostic:
    """One message at one place.

    Args:
        severity: how bad it is.
        message: one line; lower case, no full stop.
        where: ``file:line (name stack)``, or the op when no file is known.
        place: the user's line, for sorting; None when unknown.
        why: who or what constrained it.
        fix: what to do about it.
    """

    severity: Severity
    message: str
    where: str = ""
    place: SourcePlace | None = None
    why: str = ""
    fix: str = ""

    def text(self) -> str:
        """The message with its where, why and fix, one per line."""
        return str(ProgramError(self.message, where=self.where, why=self.why, fix=self.fix))

    def __str__(self) -> str:
        prefix = (
            "" if self.place is None else f"{self.place}:{self.place.col}: " if self.place.line else f"{self.place}: "
        )
        return f"{prefix}{self.severity}: {self.text()}"


def sort_key(diagnostic: Diagnostic) -> tuple[bool, SourcePlace]:
    """Sort by place; what has no place comes last, in the order it was reported."""
    place = diagnostic.place
    return (place is None, place or SourcePlace("", 0, 0))


def merge_errors(errors: list[Diagnostic], limit: int) -> ProgramError:
    """One exception for all errors of a pass: the first in full, the others below it, at most ``limit``."""
    ordered = sorted(errors, key=sort_key)
    first, rest = ordered[0], ordered[1:limit]
    error = ProgramError(first.message, where=first.where, why=first.why, fix=first.fix, place=first.place)
    if not rest:
        return error
    more = "".join(f"\nalso: {diagnostic.text()}" for diagnostic in rest)
    if len(ordered) > limit:
        more += f"\n{len(ordered) - limit} more errors not shown"
    error.args = (f"{error}{more}",)
    return error


def error_at(kind: type[E], where: Locatable, message: str, *, why: str = "", fix: str = "") -> E:
    """An exception about an op, a value or a location: ``raise error_at(PassError, op, "...")``."""
    return kind(message, where=where_text(where), why=why, fix=fix, place=user_place(location_of(where)))


def diagnostic_of(error: BactrianError) -> Diagnostic:
    """What an exception says, as an error at its place."""
    return Diagnostic("error", error.message, error.where, error.place, error.why, error.fix)


def from_mlir(error: ir.MLIRError) -> list[Diagnostic]:
    """What MLIR itself reported (its parser, its verifier, its passes), with its notes as the why."""
    found: list[Diagnostic] = []
    for info in error.error_diagnostics:
        location = ir.Location.from_attr(info.location.attr)  # the location of a diagnostic is not downcast
        notes = "; ".join(note.message for note in info.notes)
        found.append(Diagnostic("error", info.message, describe(location), user_place(location), notes))
    return found
