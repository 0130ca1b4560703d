"""The one tree of exceptions of Bactrian."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.frame.visible import visible


@dataclass(frozen=True, order=True)
class SourcePlace:
    """A line of a file. Ordered by file, line and column; line 0 is the file as a whole."""

    file: str
    line: int
    col: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class BactrianError(Exception):
    """Base of every error that Bactrian raises on purpose. Its text has no control characters, whatever names it quotes.

    Args:
        message: what can't be done, with numbers; lower case, no full stop.
        where: the user's ``file:line``, the name stack, or the op.
        why: who or what constrained it.
        fix: what to do about it.
        place: the line in a file that ``where`` means, where one is known.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, where: str = "", why: str = "", fix: str = "", place: SourcePlace | None = None
    ) -> None:
        self.message, self.where, self.why, self.fix, self.place = message, where, why, fix, place
        lines = [message]
        for label, text in (("where", where), ("why", why), ("fix", fix)):
            if text:
                lines.append(f"  {label}: {text}")
        super().__init__(visible("\n".join(lines)))


class ProgramError(BactrianError):
    """The user's program can't be parallelized as it is."""

    exit_code = 3


class ConfigError(BactrianError):
    """An option, environment or configuration is wrong."""

    exit_code = 3


class OtherSizeError(ConfigError):
    """What a program takes with microbatches of another size can't be told from this trace of it: trace it with them."""


class InfeasiblePlanError(BactrianError):
    """No plan satisfies the constraints.

    Args:
        stage: that does not fit; None where it is none, or not known.
        needed_bytes: that it needs of a device, at the least; None where that is not known.
    """

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        place: SourcePlace | None = None,
        stage: int | None = None,
        needed_bytes: int | None = None,
    ) -> None:
        self.stage, self.needed_bytes = stage, needed_bytes
        super().__init__(message, where=where, why=why, fix=fix, place=place)


class PassError(BactrianError):
    """A pass failed or produced invalid IR: our bug.

    Args:
        reproducer: the command that fails in the same way; "" where there is none.
    """

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        place: SourcePlace | None = None,
        reproducer: str = "",
    ) -> None:
        super().__init__(message, where=where, why=why, fix=fix, place=place)
        self.reproducer = reproducer
        if reproducer:
            self.args = (f"{self}\n  reproducer: {reproducer}",)


class RuntimeFault(BactrianError):
    """A peer was lost, or a step could not be carried out."""

    exit_code = 6
